"""The blind baseline: near .5 when the sets are alike, loud and in plain words when not."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from lightleak.errors import UserError
from lightleak.records import Record
from lightleak.validity import blind
from lightleak.validity.blind import BlindBaseline, blind_baseline
from lightleak.validity.blind_features import blind_features

WORDS = ["red", "green", "blue", "kettle", "lamp", "dog", "cat", "house", "tree", "boat", "small"]
WORDS += ["large", "old", "new", "on", "under", "beside", "table", "street", "river", "quiet"]


CAMERA = Image.Exif()
CAMERA[0x0110] = "a camera of some kind"
EXIF = CAMERA.tobytes()
NOTE = PngInfo()
NOTE.add_text("parameters", "a red kettle, 20 steps")


def picture(
    rng: np.random.Generator,
    *,
    side: int = 48,
    file_type: str = "PNG",
    mode: str = "RGB",
    **options: object,
) -> bytes:
    image = Image.new("RGB", (side, side), tuple(rng.integers(60, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for x, y in rng.integers(0, side - 14, (3, 2)).tolist():
        draw.ellipse((x, y, x + 12, y + 12), fill=tuple(rng.integers(0, 256, 3).tolist()))
    buffer = BytesIO()
    image.convert(mode).save(buffer, file_type, **options)
    return buffer.getvalue()


def caption(rng: np.random.Generator, words: int | None = None) -> str:
    return " ".join(rng.choice(WORDS, words or int(rng.integers(5, 12))))


def alike(seed: int, count: int, *, per_group: int = 1) -> list[Record]:
    rng = np.random.default_rng(seed)
    return [
        Record(str(index), picture(rng), caption(rng), group=f"g{index // per_group}")
        for index in range(count)
    ]


def sides(count: int) -> np.ndarray:
    return np.arange(count) < count // 2


def compare(records: list[Record], *, fields: tuple[str, ...] = (), seed: int = 0) -> BlindBaseline:
    """The first half as suspects against the other."""
    features = blind_features(records, fields=fields, seed=seed)
    groups = [record.group for record in records]
    return blind_baseline(features, sides(len(records)), groups, seed=seed)


def sentences(baseline: BlindBaseline) -> dict[str, str]:
    return {each.feature: each.sentence for each in baseline.differences}


def test_sides_drawn_at_random_from_one_pool_are_not_told_apart():
    pool = blind_features(alike(0, 90), seed=0)
    groups = [f"g{index // 2}" for index in range(90)]
    rng = np.random.default_rng(0)
    covers, p_values = [], []
    for seed in range(16):
        # Groups are assigned whole, but for a few whose records are drawn one by one.
        drawn = np.repeat(rng.permutation(45) < 22, 2)
        drawn[:10] = np.tile([True, False], 5)
        rows = rng.permutation(90)[:70]
        found = blind_baseline(
            pool.take(rows),
            drawn[rows],
            [groups[row] for row in rows],
            seed=seed,
            permutations=99,
        )
        p_values.append(found.p_value)
        covers += [
            each.low <= 0.5 <= each.high
            for each in (found.text, found.image, found.joint, found.trees)
        ]
    assert np.mean(covers) >= 0.9
    # Of 16 uniform p-values the mean is within .24 of ½, and at most 6 are below .1 (99.9 %).
    assert abs(np.mean(p_values) - 0.5) < 0.24
    assert np.sum(np.array(p_values) <= 0.1) <= 6


def test_the_same_records_on_both_sides_show_no_difference():
    # Each record and its copy form a group, so no fold has seen the records that it tells apart.
    records = alike(0, 60) * 2
    baseline = compare(records)
    assert baseline.joint.low <= 0.5 <= baseline.joint.high
    assert baseline.p_value > 0.05
    assert baseline.differences == ()


def test_captions_of_another_style_are_told_apart_and_named():
    rng = np.random.default_rng(1)
    suspects = [
        Record(f"s{index}", picture(rng), caption(rng, 20).capitalize() + ".")
        for index in range(61)
    ]
    controls = [Record(f"c{index}", picture(rng), caption(rng, 8)) for index in range(61)]
    baseline = compare(suspects + controls)
    assert baseline.text.value > 0.95
    assert baseline.auc.value > 0.95
    assert baseline.p_value == 0.001
    assert baseline.image.low <= 0.5 <= baseline.image.high
    named = sentences(baseline)
    medians = [np.median([len(each.text) for each in side]) for side in (suspects, controls)]
    assert named["text length"] == (
        f"suspect texts are {medians[0] / medians[1]:.1f}× longer "
        f"(median {medians[0]:.0f} against {medians[1]:.0f} characters)"
    )
    assert named["final full stop"] == (
        "100% of suspect texts end with a full stop, against 0% of control texts"
    )


def test_a_word_that_only_suspects_use_is_named():
    records = alike(2, 100)
    records = [
        Record(each.id, each.image, each.text + (" pictured" if index < 50 else ""))
        for index, each in enumerate(records)
    ]
    baseline = compare(records)
    assert (
        "100% of suspect texts contain “pictured”, against 0% of control texts"
        in sentences(baseline).values()
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"file_type": "JPEG"}, "100% of suspect images are JPEG files, against 0% of control"),
        ({"side": 64}, "suspect images are 1.3× wider (median 64 against 48 pixels)"),
        ({"mode": "RGBA"}, "100% of suspect images are stored as RGBA, against 0% of control"),
        ({"exif": EXIF}, "100% of suspect images carry EXIF data, against 0% of control"),
        ({"icc_profile": b"profile"}, "100% of suspect images carry a colour profile, against 0%"),
        ({"dpi": (300, 300)}, "100% of suspect images state a resolution, against 0% of control"),
        ({"pnginfo": NOTE}, "100% of suspect images carry the mark “parameters”, against 0%"),
    ],
)
def test_images_of_another_kind_are_told_apart_and_named(change, sentence):
    rng = np.random.default_rng(3)
    suspects = [Record(f"s{index}", picture(rng, **change), caption(rng)) for index in range(40)]
    controls = [Record(f"c{index}", picture(rng), caption(rng)) for index in range(40)]
    baseline = compare(suspects + controls)
    assert baseline.image.value > 0.95
    assert baseline.text.low <= 0.5 <= baseline.text.high
    assert any(each.startswith(sentence) for each in sentences(baseline).values())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"quality": 60}, "suspect images are compressed 1.6× more"),
        ({"progressive": True}, "100% of suspect images are progressive JPEG files, against 0%"),
        ({"subsampling": 0}, "100% of suspect images are JPEG files that keep colour at full"),
        (
            {"dpi": (300, 300)},
            "suspect images state 4.2× more dots (median 300 against 72 per inch)",
        ),
        (
            {"exif": EXIF + bytes(400)},
            "suspect images carry 8.4× more EXIF (median 454 against 54 bytes)",
        ),
        ({"comment": b"made with care"}, "100% of suspect images carry the mark “comment”"),
    ],
)
def test_jpeg_files_of_another_encoder_are_named(change, sentence):
    rng = np.random.default_rng(8)
    plain = {"file_type": "JPEG", "dpi": (72, 72), "exif": EXIF}
    records = [
        Record(str(index), picture(rng, **plain | (change if index < 30 else {})), caption(rng))
        for index in range(60)
    ]
    assert any(each.startswith(sentence) for each in sentences(compare(records)).values())


def test_sets_of_equal_means_and_other_spread_are_told_apart_by_trees():
    rng = np.random.default_rng(9)
    words = [*rng.choice([4, 16], 100), *rng.integers(9, 12, 100)]
    image = picture(rng)
    records = [Record(str(index), image, caption(rng, count)) for index, count in enumerate(words)]
    baseline = compare(records)
    assert abs(baseline.joint.value - 0.5) < 0.15
    assert baseline.trees.value > 0.95
    assert baseline.auc == baseline.trees


def dated(index: int) -> dict[str, object]:
    """What stands in a record's meta; the first 40 are suspects."""
    suspect = index < 40
    meta: dict[str, object] = {
        "taken": f"{2021 if suspect else 2019}-03-{1 + index % 28:02d}",
        "views": (200 if suspect else 100) + index % 7,
        "source": "flickr" if suspect and index % 5 else "museum",
    }
    return meta | ({"licence": "CC0"} if suspect else {})


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ("taken", "suspect records have a later “taken” (median 2021-03-10 against 2019-03-16)"),
        ("views", "suspect records have 2.0× higher “views” (median 203 against 103)"),
        ("source", "80% of suspect records have source = flickr, against 0% of control records"),
        ("licence", "0% of suspect records have no “licence”, against 100% of control records"),
    ],
)
def test_a_chosen_field_is_used_and_named(field, sentence):
    records = alike(10, 80)
    records = [replace(each, meta=dated(index)) for index, each in enumerate(records)]
    assert not sentences(compare(records))
    baseline = compare(records, fields=(field,))
    assert sentence in sentences(baseline).values()
    assert baseline.joint.low > 0.6
    assert baseline.trees.low > 0.6
    assert any(field in name for name in baseline.feature_names)


def test_a_field_of_every_kind_of_value_gives_finite_features():
    values = [3, -2.5, "2020-01-05T10:00:00+02:00", "n/a", None, float("nan"), "1e999", True, ""]
    records = [
        replace(each, meta={"odd": values[index % len(values)]})
        for index, each in enumerate(alike(11, 63))
    ]
    baseline = compare(records, fields=("odd",))
    assert np.isfinite(baseline.features).all()
    shown = {name for name in baseline.feature_names if "odd" in name}
    assert {"field odd", "no field odd", "field odd = n/a", "field odd = True"} <= shown


def test_a_field_that_no_record_has_is_refused_with_those_that_exist():
    records = [replace(each, meta={"source": "a", "taken": None}) for each in alike(12, 4)]
    with pytest.raises(UserError, match=r"'licence'.*source, taken"):
        blind_features(records, fields=("licence",), seed=0)


@pytest.mark.parametrize("per_group", [1, 8])
def test_the_null_of_many_records_is_drawn_from_some_of_them(monkeypatch, per_group):
    monkeypatch.setattr(blind, "LARGEST_NULL", 48)
    records = alike(13, 192, per_group=per_group)
    longer = [replace(each, text=f"{each.text} {each.text}") for each in records[:96]]
    assert compare(longer + records[96:]).p_value < 0.05
    assert compare(records).p_value > 0.05


def test_what_a_group_has_in_common_does_not_tell_the_sides_apart():
    # Ten photographers, each with a ground colour; without groups a fold knows its photographers.
    rng = np.random.default_rng(4)
    records = []
    for group in range(20):
        colour = tuple(rng.integers(0, 256, 3).tolist())
        for index in range(8):
            buffer = BytesIO()
            Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
            text = f"{WORDS[group]} {caption(rng)}"
            records.append(Record(f"{group}-{index}", buffer.getvalue(), text, group=str(group)))
    grouped = compare(records)
    ungrouped = [Record(each.id, each.image, each.text) for each in records]
    assert grouped.joint.low <= 0.5 <= grouped.joint.high
    assert grouped.p_value > 0.05
    without = compare(ungrouped)
    assert without.joint.low > 0.6
    assert without.p_value == 0.001


def test_features_are_dense_named_and_never_constant():
    baseline = compare(alike(5, 60))
    assert baseline.features.shape == (60, len(baseline.feature_names))
    assert np.isfinite(baseline.features).all()
    assert (np.ptp(baseline.features, axis=0) > 0).all()
    assert {"text length", "red", "text direction 1"} <= set(baseline.feature_names)
    # All images are PNG files of one size without EXIF.
    assert not {"format PNG", "image width", "EXIF"} & set(baseline.feature_names)


def test_the_same_seed_gives_the_same_answer():
    records = alike(6, 40)
    first, second = (compare(records, seed=3) for _ in range(2))
    assert (first.joint, first.trees, first.p_value) == (second.joint, second.trees, second.p_value)
    assert np.array_equal(first.features, second.features)


def test_one_group_on_a_side_is_too_few():
    with pytest.raises(UserError, match="too few groups"):
        compare(alike(7, 20, per_group=10))
