"""The blind baseline: near .5 when the sets are alike, loud and in plain words when not."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lightleak.errors import UserError
from lightleak.records import Record
from lightleak.validity.blind import blind_baseline

WORDS = ["red", "green", "blue", "kettle", "lamp", "dog", "cat", "house", "tree", "boat", "small"]
WORDS += ["large", "old", "new", "on", "under", "beside", "table", "street", "river", "quiet"]


def picture(rng: np.random.Generator, *, side: int = 48, file_type: str = "PNG") -> bytes:
    image = Image.new("RGB", (side, side), tuple(rng.integers(60, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for x, y in rng.integers(0, side - 14, (3, 2)).tolist():
        draw.ellipse((x, y, x + 12, y + 12), fill=tuple(rng.integers(0, 256, 3).tolist()))
    buffer = BytesIO()
    image.save(buffer, file_type)
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


def test_intervals_cover_one_half_when_the_sets_are_alike():
    covers = []
    for seed in range(8):
        baseline = blind_baseline(alike(seed, 80), sides(80), seed=seed)
        for each in (baseline.text, baseline.image, baseline.joint):
            covers.append(each.low <= 0.5 <= each.high)
    assert np.mean(covers) >= 0.9


def test_the_same_records_on_both_sides_show_no_difference():
    # Each record and its copy form a group, so no fold has seen the records that it tells apart.
    records = alike(0, 60) * 2
    baseline = blind_baseline(records, sides(120), seed=0)
    assert baseline.joint.low <= 0.5 <= baseline.joint.high
    assert baseline.differences == ()


def test_captions_of_another_style_are_told_apart_and_named():
    rng = np.random.default_rng(1)
    suspects = [
        Record(f"s{index}", picture(rng), caption(rng, 20).capitalize() + ".")
        for index in range(61)
    ]
    controls = [Record(f"c{index}", picture(rng), caption(rng, 8)) for index in range(61)]
    baseline = blind_baseline(suspects + controls, sides(122), seed=0)
    assert baseline.text.value > 0.95
    assert baseline.joint.low > 0.5
    assert baseline.image.low <= 0.5 <= baseline.image.high
    sentences = {each.feature: each.sentence for each in baseline.differences}
    medians = [np.median([len(each.text) for each in side]) for side in (suspects, controls)]
    assert sentences["text length"] == (
        f"suspect texts are {medians[0] / medians[1]:.1f}× longer "
        f"(median {medians[0]:.0f} against {medians[1]:.0f} characters)"
    )
    assert sentences["final full stop"] == (
        "100% of suspect texts end with a full stop, against 0% of control texts"
    )


def test_a_word_that_only_suspects_use_is_named():
    records = alike(2, 100)
    records = [
        Record(each.id, each.image, each.text + (" pictured" if index < 50 else ""))
        for index, each in enumerate(records)
    ]
    baseline = blind_baseline(records, sides(100), seed=0)
    assert "100% of suspect texts contain “pictured”, against 0% of control texts" in [
        each.sentence for each in baseline.differences
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"file_type": "JPEG"}, "100% of suspect images are JPEG files"),
        ({"side": 64}, "suspect images are 1.3× wider (median 64 against 48 pixels)"),
    ],
)
def test_images_of_another_kind_are_told_apart_and_named(change, sentence):
    rng = np.random.default_rng(3)
    suspects = [Record(f"s{index}", picture(rng, **change), caption(rng)) for index in range(40)]
    controls = [Record(f"c{index}", picture(rng), caption(rng)) for index in range(40)]
    baseline = blind_baseline(suspects + controls, sides(80), seed=0)
    assert baseline.image.value > 0.95
    assert baseline.text.low <= 0.5 <= baseline.text.high
    assert any(each.sentence.startswith(sentence) for each in baseline.differences)


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
    grouped = blind_baseline(records, sides(160), seed=0)
    ungrouped = [Record(each.id, each.image, each.text) for each in records]
    assert grouped.joint.low <= 0.5 <= grouped.joint.high
    assert blind_baseline(ungrouped, sides(160), seed=0).joint.low > 0.7


def test_features_are_dense_named_and_never_constant():
    baseline = blind_baseline(alike(5, 60), sides(60), seed=0)
    assert baseline.features.shape == (60, len(baseline.feature_names))
    assert np.isfinite(baseline.features).all()
    assert (np.ptp(baseline.features, axis=0) > 0).all()
    assert {"text length", "red", "text direction 1"} <= set(baseline.feature_names)
    # All images are PNG files of one size without EXIF.
    assert not {"format PNG", "image width", "EXIF"} & set(baseline.feature_names)


def test_the_same_seed_gives_the_same_answer():
    records = alike(6, 40)
    first, second = (blind_baseline(records, sides(40), seed=3) for _ in range(2))
    assert first.joint == second.joint
    assert np.array_equal(first.features, second.features)


def test_one_group_on_a_side_is_too_few():
    with pytest.raises(UserError, match="too few groups"):
        blind_baseline(alike(7, 20, per_group=10), sides(20), seed=0)
