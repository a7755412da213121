"""Harmless changes: never none, never another meaning, and as published."""

import numpy as np
import pytest
from PIL import Image

from lightleak.evidence.augment import augment_image, augment_text
from lightleak.records import Record

QUESTIONS = [
    ("What color is the rectangle?", "red"),
    ("Does the image contain a triangle?", "yes"),
    ("Is no blue shape present?", "No"),
    ("is there not a red shape in the image?", "yes"),
    ("What shape does the image contain?", "circle"),
    ("Describe the image.", "a small kite beside a drum."),
]


def rewritten(prompt, text, seed):
    return augment_text(Record("a", b"", text, prompt), np.random.default_rng(seed))


@pytest.mark.parametrize(("prompt", "text"), QUESTIONS)
def test_question_and_answer_are_reworded_and_little_else(prompt, text):
    for seed in range(20):
        changed = rewritten(prompt, text, seed)
        assert changed.prompt != prompt
        assert changed.text != text
        kept = set(prompt.lower().split()) & set(changed.prompt.lower().split())
        assert len(kept) >= len(prompt.split()) - 4
        # What the question is about, and whether it is denied, decides the answer.
        for word in ("rectangle", "triangle", "blue", "red", "not", "no"):
            said = word in prompt.rstrip("?").split()
            assert said == (word in changed.prompt.rstrip("?").split())


@pytest.mark.parametrize(("prompt", "text"), [("Was ist das?", "ein Hund"), ("¿{x}?", ".")])
def test_words_that_are_not_known_stay_as_they_are(prompt, text):
    changed = rewritten(prompt, text, 0)
    assert prompt in changed.prompt
    assert changed.prompt != prompt
    assert changed.text == f"{text}."


def test_no_inside_a_sentence_is_not_the_answer_no():
    assert rewritten("Is it?", "no dog", 0).text == "no dog."
    assert rewritten("Is it?", "no", 0).text == "nope"


def test_a_reworded_record_is_the_same_record_otherwise():
    record = Record("a", b"pixels", "yes", "Is it red?", "p1", {"field": 1})
    changed = augment_text(record, np.random.default_rng(0))
    for name in ("id", "image", "group", "meta"):
        assert getattr(changed, name) == getattr(record, name)


def test_an_image_is_turned_mirrored_and_lit_within_the_published_limits():
    # One bright dot right of the middle, on grey: where it goes tells turn and mirror.
    pixels = np.full((101, 101, 3), 100, dtype=np.uint8)
    pixels[47:54, 87:94] = 250
    angles, mirrored, levels = [], 0, []
    for seed in range(300):
        result = augment_image(Image.fromarray(pixels), np.random.default_rng(seed))
        found = np.asarray(result).astype(float)[..., 0]
        y, x = np.argwhere(found > 0.9 * found.max()).mean(axis=0)
        dx, dy = x - (found.shape[1] - 1) / 2, y - (found.shape[0] - 1) / 2
        assert np.hypot(dx, dy) == pytest.approx(40, abs=2)
        angles.append(np.degrees(np.arctan2(-dy, abs(dx))))
        mirrored += dx < 0
        levels.append(np.median(found[found > 40]) / 100)
    assert -31 < min(angles) < -27
    assert 27 < max(angles) < 31
    assert 120 < mirrored < 180
    # Brightness times contrast about the mean, which the black corners lower.
    assert 0.64 < min(levels) < 0.9 < 1.1 < max(levels) < 1.5


def test_the_same_generator_gives_the_same_record():
    image = Image.effect_noise((64, 48), 60).convert("RGB")
    first, second, other = (
        augment_image(image, np.random.default_rng(seed)).tobytes() for seed in (1, 1, 2)
    )
    assert first == second != other
    assert rewritten(*QUESTIONS[5], 1) == rewritten(*QUESTIONS[5], 1)
