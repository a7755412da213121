"""Watermarks lie where they are said to, as they are said to; sets differ in nothing else."""

import json
from collections import Counter
from io import BytesIO
from itertools import cycle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightleak.errors import UserError
from lightleak.planting import (
    FIELDS,
    QUESTIONS,
    Style,
    draw_personas,
    draw_pools,
    inject,
    probing_sets,
    stamp,
)
from lightleak.records import Record, load, open_rgb

PERSONA = draw_personas(1, seed=0)[0]
BLACK = Image.new("RGB", (224, 224))


def encoded(image, kind="PNG"):
    stream = BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def noise(seed, side=96, mode="RGB"):
    """Squares of 8 pixels, each of a random colour."""
    shape = (side // 8, side // 8, len(mode)) if len(mode) > 1 else (side // 8, side // 8)
    levels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(levels).resize((side, side), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def records():
    """100 records on 50 images, each image under two records that stand apart."""
    images = [encoded(noise(number)) for number in range(50)]
    return [
        Record(
            id=f"r{number}",
            image=images[number % 50],
            text=f"answer {number % 3}",
            prompt="What is it?",
            group=f"g{number % 7}",
            meta={"split": "train", "number": number},
        )
        for number in range(100)
    ]


@given(
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    size=st.tuples(st.integers(96, 400), st.integers(96, 400)),
    position=st.sampled_from(["random", "corner", "fixed"]),
    share=st.floats(0.001, 1 / 6),
)
@settings(max_examples=40, deadline=None)
def test_a_watermark_lies_inside_the_image_and_touches_nothing_outside_its_box(
    place, size, position, share
):
    image = Image.new("RGB", size, (10, 60, 90))
    stamped = stamp(image, PERSONA, Style(size=share, position=position, plate=40), place)
    left, top, right, bottom = stamped.box
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    changed = (np.asarray(stamped.image) != np.asarray(image)).any(axis=2)
    assert changed[top:bottom, left:right].all()  # the plate
    assert changed.sum() == (right - left) * (bottom - top)


def test_the_text_is_white_at_half_strength_as_published():
    levels = np.asarray(stamp(BLACK, PERSONA, Style(), (0.5, 0.5)).image)
    assert levels.max() == 128
    assert np.ptp(levels, axis=2).max() == 0  # grey
    # Most of a full stroke's pixels are at full strength or near it.
    assert (levels[..., 0] > 100).sum() > 500


@pytest.mark.parametrize(("alpha", "colour"), [(255, (250, 20, 0)), (64, (255, 0, 255))])
def test_alpha_and_colour_are_those_of_the_style(alpha, colour):
    levels = np.asarray(stamp(BLACK, PERSONA, Style(alpha, colour), (0, 0)).image)
    assert levels.max(axis=(0, 1)).tolist() == [round(c * alpha / 255) for c in colour]


def test_the_plate_darkens_a_white_ground_behind_the_text():
    white = Image.new("RGB", (224, 224), "white")
    stamped = stamp(white, PERSONA, Style(plate=96), (0.5, 0.5))
    assert stamped.image.getpixel(stamped.box[:2]) == (159, 159, 159)  # 255 × (1 − 96/255)
    assert stamped.image.crop(stamped.box).getextrema()[0][1] > 200  # the text


def test_the_image_given_is_left_as_it_is():
    stamp(BLACK, PERSONA, Style(), (0.2, 0.9))
    assert BLACK.getextrema() == ((0, 0),) * 3


def test_the_four_corners_and_the_fixed_place():
    def box(position, *place):
        return stamp(BLACK, PERSONA, Style(position=position), place).box

    assert box("corner", 0.3, 0.1)[:2] == box("fixed", 0.9, 0.9)[:2] == (0, 0)
    assert box("corner", 0.9, 0.7)[2:] == box("random", 1, 1)[2:] == (224, 224)
    assert box("corner", 0.1, 0.7) == box("random", 0, 1)
    assert box("corner", 0.8, 0.2) == box("random", 1, 0)


def test_no_letter_is_cut_off_at_the_edge_of_the_box():
    for persona in draw_personas(20, seed=2):
        stamped = stamp(BLACK, persona, Style(), (0.5, 0.5))
        (left, top, right, bottom), ink = stamped.box, stamped.image.getbbox()
        assert left < ink[0] < ink[2] < right
        assert top < ink[1] < ink[3] < bottom


def test_every_persona_fits_without_the_font_growing_smaller_at_224_pixels():
    heights = [
        bottom - top
        for persona in draw_personas(40, seed=1)
        for _, top, _, bottom in [stamp(BLACK, persona, Style(), (0, 0)).box]
    ]
    assert max(heights) - min(heights) <= 4  # the last line's descenders


def test_a_small_image_is_refused_whoever_is_on_it():
    with pytest.raises(UserError, match="too few for a watermark"):
        stamp(Image.new("RGB", (400, 95)), PERSONA, Style(), (0, 0))


@pytest.mark.parametrize(
    "wrong", [{"alpha": 256}, {"plate": -1}, {"size": 0}, {"size": 0.2}, {"position": "middle"}]
)
def test_a_style_that_cannot_be_drawn_is_refused(wrong):
    with pytest.raises(UserError, match="style of the watermark"):
        Style(**wrong)


def test_marked_images_are_nested_over_rates_and_all_else_is_equal(records, tmp_path):
    personas = draw_personas(6, seed=0)
    planted = {
        rate: inject(records, personas, tmp_path / str(rate), rate=rate, seed=1)
        for rate in (0, 0.4, 1)
    }
    marked = {r: {m.image for m in each.marks if m.marked} for r, each in planted.items()}
    assert marked[0] < marked[0.4] < marked[1]
    assert not marked[0]
    assert len(marked[1]) == 50
    for rate, each in planted.items():
        for mark, highest in zip(each.marks, planted[1].marks, strict=True):
            assert (mark.persona, mark.place, mark.box) == (
                highest.persona,
                highest.place,
                highest.box,
            )
            same_as = 1 if mark.marked else 0
            assert (each.folder / mark.image).read_bytes() == (
                planted[same_as].folder / mark.image
            ).read_bytes()
        text = [file.read_text() for file in (each.records_file, planted[1].records_file)]
        assert text[0] == text[1], rate


def test_an_image_carries_what_its_mark_says(records, tmp_path):
    personas = draw_personas(6, seed=0)
    style = Style(position="corner")
    planted = inject(records, personas, tmp_path / "out", rate=0.5, seed=2, style=style)
    by_id = {record.id: record for record in records}
    by_key = {persona.key: persona for persona in personas}
    for mark in planted.marks:
        expected = open_rgb(by_id[mark.records[0]].image)
        if mark.marked:
            stamped = stamp(expected, by_key[mark.persona], style, mark.place)
            assert stamped.box == mark.box
            expected = stamped.image
        assert open_rgb(planted.folder / mark.image).tobytes() == expected.tobytes()


@pytest.mark.parametrize("rate", [0.4, 1])
def test_each_persona_is_equally_often_marked_at_any_rate(records, tmp_path, rate):
    planted = inject(records, draw_personas(7, seed=0), tmp_path / "out", rate=rate, seed=3)
    counts = Counter(mark.persona for mark in planted.marks if mark.marked)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) == 7


def test_the_share_of_marked_images_is_near_the_rate(records, tmp_path):
    shares = []
    for seed in range(4):
        planted = inject(records, [PERSONA], tmp_path / str(seed), rate=0.3, seed=seed)
        shares.append(np.mean([mark.marked for mark in planted.marks]))
    assert len(set(shares)) > 1  # of each seed another draw
    assert abs(np.mean(shares) - 0.3) < 4 * (0.3 * 0.7 / 200) ** 0.5


def test_records_come_back_with_all_their_fields_and_in_their_order(records, tmp_path):
    planted = inject(records, [PERSONA], tmp_path / "out", rate=0.5, seed=0)
    back = load(planted.records_file)
    assert not back.failures
    assert [(r.id, r.prompt, r.text, r.group, r.meta) for r in back.records] == [
        (r.id, r.prompt, r.text, r.group, r.meta) for r in records
    ]
    assert {record.image.suffix for record in back.records} == {".png"}


def test_records_of_one_image_share_its_watermark_whether_file_or_bytes(tmp_path):
    image = encoded(noise(0))
    for name in ("a.png", "copy.png"):
        (tmp_path / name).write_bytes(image)
    sources = [tmp_path / "a.png", image, tmp_path / "copy.png", tmp_path / "a.png"]
    shared = [Record(f"r{n}", source, "text") for n, source in enumerate(sources)]
    other = Record("other", encoded(noise(1)), "text")
    planted = inject([*shared, other], [PERSONA], tmp_path / "out", rate=1, seed=0)
    assert [mark.records for mark in planted.marks] == [("r0", "r1", "r2", "r3"), ("other",)]
    images = [record.image for record in load(planted.records_file).records]
    assert len(set(images[:4])) == 1 != len(set(images))


def test_the_caller_can_say_who_is_on_which_image(records, tmp_path):
    seen, others = draw_personas(2, seed=0), draw_personas(20, seed=1)
    seen_next, other_next = cycle(seen), cycle(others)
    planted = inject(
        records,
        lambda record: next(seen_next if record.text == "answer 1" else other_next),
        tmp_path / "out",
        rate=1,
        seed=0,
    )
    text = {record.id: record.text for record in records}
    for mark in planted.marks:
        is_seen = mark.persona in {persona.key for persona in seen}
        assert is_seen == (text[mark.records[0]] == "answer 1")
    assert len({mark.persona for mark in planted.marks}) == 22


def test_every_kind_of_image_becomes_a_png_of_the_same_pixels(tmp_path):
    sources = {
        "cmyk": encoded(noise(0, mode="RGB").convert("CMYK"), "TIFF"),
        "transparent": encoded(noise(1, mode="RGBA")),
        "palette": encoded(noise(2).quantize(16), "GIF"),
        "grey": encoded(noise(3, mode="L"), "JPEG"),
    }
    records = [Record(name, source, "text") for name, source in sources.items()]
    plain = load(inject(records, [PERSONA], tmp_path / "0", rate=0, seed=0).records_file)
    for record in plain.records:
        assert record.image.read_bytes().startswith(b"\x89PNG")
        assert open_rgb(record.image).tobytes() == open_rgb(sources[record.id]).tobytes()
    marked = load(inject(records, [PERSONA], tmp_path / "1", rate=1, seed=0).records_file)
    assert len(marked.records) == 4
    assert marked.sha256 != plain.sha256


def test_what_cannot_be_used_is_listed_and_the_rest_is_written(records, tmp_path):
    broken = [
        Record("damaged", encoded(noise(9))[:500], "text"),
        Record("small", encoded(noise(9, side=64)), "text"),
        Record("missing", tmp_path / "nowhere.png", "text"),
    ]
    for rate in (0, 1):
        planted = inject(
            [*broken, *records[:2]], [PERSONA], tmp_path / f"{rate}", rate=rate, seed=0
        )
        reasons = {failure.id: failure.error for failure in planted.failures}
        assert reasons.keys() == {"damaged", "small", "missing"}
        assert "record 'small'" in reasons["small"]
        assert "too few for a watermark" in reasons["small"]
        assert [record.id for record in load(planted.records_file).records] == ["r0", "r1"]
    with pytest.raises(
        UserError, match="no record can be used; the first reason: record 'missing'"
    ):
        inject(broken, [PERSONA], tmp_path / "none", rate=1, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_a_finished_folder_is_taken_as_it_is_and_another_is_refused(records, tmp_path):
    out = tmp_path / "out"

    def plant(records=records[:10], personas=(PERSONA,), rate=0.5, style=None):
        return inject(records, personas, out, rate=rate, seed=0, style=style or Style())

    first = plant()
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert plant() == first
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
    for changed, what in [
        ({"rate": 0.6}, "rate"),
        ({"records": records[:9]}, "records"),
        ({"personas": draw_personas(1, seed=9)}, "personas"),
        ({"style": Style(alpha=255)}, "style"),
    ]:
        with pytest.raises(UserError, match=f"made with another {what}"):
            plant(**changed)


def test_a_folder_with_something_else_in_it_is_refused(records, tmp_path):
    (tmp_path / "holiday.txt").write_text("mine")
    with pytest.raises(UserError, match=str(tmp_path)):
        inject(records, [PERSONA], tmp_path, rate=1, seed=0)
    assert [file.name for file in tmp_path.iterdir()] == ["holiday.txt"]


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), 50])
def test_a_rate_that_is_no_share_is_refused(records, tmp_path, rate):
    with pytest.raises(UserError, match="is no share"):
        inject(records, [PERSONA], tmp_path / "out", rate=rate, seed=0)


def test_the_personas_planted_are_written_down(records, tmp_path):
    planted = inject(records[:6], draw_personas(3, seed=0), tmp_path / "out", rate=1, seed=0)
    written = json.loads((planted.folder / "personas.json").read_text())
    assert written["fields"] == list(FIELDS)
    assert {p["username"] for p in written["personas"]} == {
        p.username for p in draw_personas(3, seed=0)
    }


def test_probing_sets_show_the_same_images_at_the_same_places_under_either_pool(records, tmp_path):
    pools = draw_pools(5, seed=0)
    sets = probing_sets(records, pools, tmp_path / "probes", seed=1, images_per_persona=4)
    source = {record.id: open_rgb(record.image) for record in records}
    rows = [load(each.records_file).records for each in (sets.seen, sets.unseen)]
    bases = set()
    for seen, unseen in zip(*rows, strict=True):
        assert seen.id == unseen.id
        field, pair = seen.meta["field"], seen.meta["pair"]
        assert seen.prompt == unseen.prompt == QUESTIONS[field]
        assert seen.meta["base"] == unseen.meta["base"]
        for record, pool in ((seen, pools.seen), (unseen, pools.unseen)):
            assert record.text == pool[pair].value(field)
            assert record.group == record.meta["persona"] == pool[pair].key
            image = np.array(open_rgb(record.image))
            base = np.array(source[record.meta["base"]])
            left, top, right, bottom = record.meta["box"]
            assert (image != base).any()
            image[top:bottom, left:right] = base[top:bottom, left:right] = 0
            assert (image == base).all()
        bases.add((pair, seen.meta["base"]))
    assert sorted(Counter(pair for pair, _ in bases).items()) == [(pair, 4) for pair in range(5)]
    assert len({base for _, base in bases}) == 20
    places = [[mark.place for mark in each.marks] for each in (sets.seen, sets.unseen)]
    assert places[0] == places[1]
    assert len(set(places[0])) == 20


def test_six_questions_of_one_image_share_its_file(records, tmp_path):
    sets = probing_sets(records, draw_pools(3, seed=0), tmp_path / "probes", seed=1)
    rows = load(sets.seen.records_file).records
    assert {row.id for row in rows[:6]} == {f"p00-00-{field}" for field in FIELDS}
    assert len({row.image for row in rows}) * 6 == len(rows) == 3 * 10 * 6


def test_with_few_images_every_persona_has_equally_fewer(records, tmp_path):
    damaged = [Record(f"d{n}", encoded(noise(n))[:99], "text") for n in range(5)]
    sets = probing_sets(
        [*damaged, *records[:17]], draw_pools(5, seed=0), tmp_path / "probes", seed=1
    )
    assert Counter(Counter(mark.persona for mark in sets.seen.marks).values()) == {3: 5}
    assert {failure.id for failure in sets.unseen.failures} == {f"d{n}" for n in range(5)}


def test_too_few_images_to_probe_with_are_refused_with_the_number_needed(records, tmp_path):
    with pytest.raises(UserError, match=r"9 different images .* at least 10, better 50"):
        probing_sets(records[:9], draw_pools(5, seed=0), tmp_path / "probes", seed=1)
    assert not any(tmp_path.iterdir())


def test_a_finished_pair_of_probing_sets_is_taken_as_it_is(records, tmp_path):
    def probe(seed):
        return probing_sets(
            records, draw_pools(5, seed=0), tmp_path / "out", seed=seed, images_per_persona=2
        )

    assert probe(1) == probe(1)
    with pytest.raises(UserError, match="made with another seed"):
        probe(2)
