"""Copies are found across and within the sets; pictures that only resemble each other are not."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lightleak.records import Record
from lightleak.validity.duplicates import DuplicatePair, find_duplicates

LONG = "a small red kettle stands beside the old blue lamp on a table"


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
