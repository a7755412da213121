"""Copies are found across and within the sets; pictures that only resemble each other are not."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from lightleak.errors import UserError
from lightleak.lab.corpora import scenes
from lightleak.records import Record
from lightleak.validity import duplicates
from lightleak.validity.duplicates import DuplicatePair, find_duplicates, read_embeddings

LONG = "a small red kettle stands beside the old blue lamp on a table"


LONGER = (
    "The kettle that we found in the kitchen of the old mill is red, has lost its lid, and leaks "
    "where the spout was soldered on; behind it stands a lamp with a green shade, a gift of the "
    "miller to his sister, who never lit it."
)
CHINESE = (
    "厨房里有一只红色的小水壶，旁边放着一盏旧的蓝色台灯，桌子上还有三个苹果和一本打开的书，"
    "窗外正下着雨，一只猫蹲在门口。"
)


def draw_picture(seed: int, side: int = 64) -> Image.Image:
    """A few shapes on a flat ground, as in small synthetic sets."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(rng.integers(60, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for x, y in rng.integers(0, side - 18, (3, 2)).tolist():
        draw.ellipse((x, y, x + 16, y + 16), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def encoded(image: Image.Image, file_type: str = "PNG", **options: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_type, **options)
    return buffer.getvalue()


def record(number: int, image: Image.Image | bytes, text: str = "", **options: str) -> Record:
    image = image if isinstance(image, bytes) else encoded(image)
    return Record(f"r{number}", image, text or f"text {number}", **options)


def test_the_same_pixels_in_another_file_are_the_same_image():
    image = draw_picture(0)
    records = [record(0, image), record(1, draw_picture(1)), record(2, encoded(image, "BMP"))]
    found = find_duplicates(records, [True, True, False])
    assert found.across == (DuplicatePair(0, 2, "identical image"),)
    assert found.within == ()


def test_the_same_record_is_the_same_image_and_text():
    records = [record(0, draw_picture(0), "A red lamp."), record(1, draw_picture(0), "a  red lamp")]
    found = find_duplicates(records, [True, False])
    assert found.across == (DuplicatePair(0, 1, "same image and text"),)


@pytest.mark.parametrize("change", ["recompressed", "enlarged"])
def test_most_changed_copies_are_found_and_nothing_else(change):
    pictures = [draw_picture(seed) for seed in range(60)]
    if change == "recompressed":
        copies = [encoded(image, "JPEG", quality=75) for image in pictures]
    else:
        copies = [encoded(image.resize((96, 96))) for image in pictures]
    records = [record(number, image) for number, image in enumerate([*pictures, *copies])]
    found = find_duplicates(records, np.arange(120) < 60)
    assert {pair.kind for pair in found.across} == {"near-identical image"}
    assert {(pair.second - pair.first) for pair in found.across} == {60}
    assert len(found.across) >= 54
    assert found.within == ()


def test_flat_pictures_that_differ_in_one_small_shape_are_no_copies():
    def scene(x: int) -> Image.Image:
        image = Image.new("RGB", (64, 64), (200, 210, 220))
        draw = ImageDraw.Draw(image)
        draw.rectangle((5, 5, 17, 17), fill=(200, 30, 30))
        draw.ellipse((x, 40, x + 10, 50), fill=(30, 30, 200))
        return image

    records = [record(x, scene(x)) for x in range(4, 50, 4)]
    records += [record(60 + tone, Image.new("RGB", (64, 64), (tone,) * 3)) for tone in (0, 60, 120)]
    found = find_duplicates(records, np.arange(len(records)) % 2 == 0)
    assert (found.across, found.within) == ((), ())


def test_long_texts_count_by_themselves_and_short_ones_do_not():
    texts = [LONG, LONG.upper() + "!", "a red lamp", "a red lamp"]
    records = [record(number, draw_picture(number), text) for number, text in enumerate(texts)]
    found = find_duplicates(records, [True, False, True, False])
    assert found.across == (DuplicatePair(0, 1, "same text"),)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (LONGER, LONGER.replace("green", "yellow")),
        (LONGER, f"{LONGER} Photograph: the author."),
        (CHINESE, CHINESE.replace("猫", "狗")),
    ],
    ids=["word", "credit", "no spaces"],
)
def test_a_long_text_that_was_changed_a_little_is_a_copy(text, changed):
    texts = [text, LONG, changed, " ".join(reversed(LONGER.split())), text[: len(text) // 2]]
    records = [record(number, draw_picture(number), each) for number, each in enumerate(texts)]
    found = find_duplicates(records, [True, True, False, False, False])
    assert found.across == (DuplicatePair(0, 2, "near-identical text"),)
    assert found.within == ()


def test_a_changed_text_is_paired_once_though_its_source_stands_there_many_times():
    texts = [LONGER] * 30 + [LONGER.replace("green", "yellow")] * 30
    records = [record(number, draw_picture(number), text) for number, text in enumerate(texts)]
    found = find_duplicates(records, np.arange(60) < 30)
    assert {pair.kind for pair in found.across} == {"near-identical text"}
    assert {index for pair in found.across for index in (pair.first, pair.second)} == set(range(60))
    assert len(found.across) < 60


def test_texts_made_from_one_template_are_no_copies():
    rng = np.random.default_rng(0)
    texts = [scene.caption() for scene in scenes(700, seed=0)]
    texts += [f"This picture was taken on a sunny day in the old town of {n}." for n in range(100)]
    noise = rng.integers(0, 256, (len(texts), 16, 16, 3), dtype=np.uint8)
    records = [
        record(number, Image.fromarray(image), text)
        for number, (image, text) in enumerate(zip(noise, texts, strict=True))
    ]
    found = find_duplicates(records, np.arange(len(texts)) % 2 == 0)
    assert (found.across, found.within) == ((), ())


def test_embeddings_that_nearly_agree_are_of_copies(monkeypatch):
    monkeypatch.setattr(duplicates, "BLOCK_PAIRS", 60 * 52)
    vectors = np.random.default_rng(0).normal(size=(60, 32))
    vectors[55] = 3 * vectors[2] + 0.1 * vectors[3]
    vectors[9] = -vectors[4]
    records = [record(number, draw_picture(number)) for number in range(60)]
    side = np.arange(60) < 30
    found = find_duplicates(records, side, embeddings=vectors)
    assert found.across == (DuplicatePair(2, 55, "near-identical embedding"),)
    assert found.within == ()
    stricter = find_duplicates(records, side, embeddings=vectors, cosine=0.9999)
    assert (stricter.across, stricter.within) == ((), ())
    alike = find_duplicates(records, side, embeddings=np.ones((60, 4)))
    assert len(alike.across) + len(alike.within) < 2 * 60
    assert len(set(alike.groups)) == 2


def write_embeddings(file, rows):
    ids, vectors = zip(*rows, strict=True)
    pq.write_table(pa.table({"id": list(ids), "embedding": list(vectors)}), file)


def test_embeddings_are_read_in_the_order_of_the_records(tmp_path):
    write_embeddings(tmp_path / "e.parquet", [("a", [1.0, 2.0]), ("b", [3.0, 4.0]), ("c", [0, 1])])
    read = read_embeddings(tmp_path / "e.parquet", ["c", "a"])
    assert read.tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("a", [1.0])], "1 record(s) have no embedding in it, the first 'b'"),
        ([("a", [1.0, 2.0]), ("b", [1.0])], "b: it has 1 numbers"),
        ([("a", [1.0, 2.0]), ("b", None)], "b: it has 0 numbers"),
        ([("a", [1.0, 2.0]), ("b", [1.0, float("nan")])], "b: its embedding is zero or not finite"),
        ([("a", [1.0, 2.0]), ("b", [None, 1.0])], "b: its embedding is zero or not finite"),
        ([("a", [1.0, 2.0]), ("b", [0.0, 0.0])], "b: its embedding is zero or not finite"),
        ([("a", "x"), ("b", "y")], "no embeddings can be read from it"),
    ],
)
def test_embeddings_that_do_not_serve_are_named(tmp_path, rows, said):
    write_embeddings(tmp_path / "e.parquet", rows)
    with pytest.raises(UserError) as mistake:
        read_embeddings(tmp_path / "e.parquet", ["a", "b"])
    assert said in str(mistake.value)


def test_a_file_without_embeddings_is_one_line(tmp_path):
    (tmp_path / "e.txt").write_text("id,embedding")
    pq.write_table(pa.table({"id": ["a"], "vector": [[1.0]]}), tmp_path / "e.parquet")
    for name in ("e.txt", "e.parquet", "none.parquet"):
        with pytest.raises(UserError, match="no embeddings can be read from it"):
            read_embeddings(tmp_path / name, ["a"])


def test_removing_one_partner_of_every_pair_across_leaves_no_copy_on_both_sides():
    image = draw_picture(0)
    records = [record(number, image) for number in range(6)]
    side = np.array([True, True, True, False, False, False])
    found = find_duplicates(records, side)
    assert {index for pair in found.across for index in (pair.first, pair.second)} == set(range(6))
    suspects = {pair.first for pair in found.across}
    kept = [index for index in range(6) if index not in suspects]
    assert find_duplicates([records[index] for index in kept], side[kept]).across == ()


def test_copies_within_a_side_and_records_of_a_group_are_one_unit():
    records = [
        record(0, draw_picture(0), group="a"),
        record(1, draw_picture(1), group="a"),
        record(2, draw_picture(1)),
        record(3, draw_picture(3)),
        record(4, draw_picture(3)),
    ]
    found = find_duplicates(records, [True, True, True, True, False])
    assert found.within == (DuplicatePair(1, 2, "identical image"),)
    assert found.across == (DuplicatePair(3, 4, "identical image"),)
    first, *others = found.groups
    assert others[:2] == [first, first]
    # The copy on the other side is a failure to be removed, not a unit to be permuted.
    assert len({first, *others[2:]}) == 3


def test_thousands_of_copies_of_one_text_stay_a_short_list():
    image = encoded(draw_picture(0, 32))
    records = [record(number, image, LONG) for number in range(400)]
    found = find_duplicates(records, np.arange(400) < 200)
    assert len(found.across) + len(found.within) < 2 * 400
    assert len(set(found.groups)) == 2
