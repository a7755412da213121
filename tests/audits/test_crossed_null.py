"""Crossed folds share what they learn: the test that lightleak uses holds its level, pooling fails.

Gradients are drawn at random with labels that mean nothing, so every rejection is false.
"""

import numpy as np
import pytest
from scipy.stats import norm

from lightleak import signals
from lightleak import statistics as st
from lightleak.audits.set_tests import SetTests
from lightleak.audits.settings import AuditSettings
from lightleak.audits.stored import Compared
from lightleak.evidence.readings import GradientSlices, SliceBlock, slice_axes
from lightleak.signals import cross

SETTINGS = AuditSettings.read(target="t", suspect="s", control="c")
TESTS = SetTests(SETTINGS, "gradaudit")
LEVEL, DRAWS = 0.05, 300


def crossed_scores(rng, n=120, shape=(30, 30)):
    whole = rng.normal(size=(n, *shape))
    side = np.array(["suspect", "control"] * (n // 2))
    folds = np.arange(n) // 2 % 2
    inside = np.stack([(side == "suspect") & (folds != k) for k in range(2)], axis=1)
    references = np.stack([whole[inside[:, k]].mean(0) for k in range(2)])

    def both(values):
        return np.concatenate([values.sum(-1), values.sum(-2)], axis=-1)

    block = SliceBlock(np.arange(n), both(whole**2), both(whole[:, None] * references), inside)
    slices = GradientSlices(
        n,
        slice_axes({"w": shape}),
        both(references**2),
        inside.sum(0),
        lambda: iter([block]),
        lora=False,
    )
    fits = cross("crossfit", 2, side, folds)
    options = {"mask": "fixed_tau", "tau": -2.0}  # Keep every slice: only the reference is fitted.
    scores = signals.get("gradaudit").score(slices, fits, options)
    return Compared(scores, side == "suspect", folds, np.arange(n).astype(str), np.arange(n))


def test_level_of_crossed_fits():
    rng = np.random.default_rng(0)

    def test(part):
        return st.mann_whitney(part.scores[part.suspect], part.scores[~part.suspect])

    ours, pooled = [], []
    for _ in range(DRAWS):
        data = crossed_scores(rng)
        ours.append(TESTS.by_fold(data, test))
        pooled.append(test(data))
    assert np.mean(np.array(ours) <= LEVEL) <= LEVEL
    # Pooled, the statistic spreads wider than the test believes (measured: 1.2 times).
    assert np.std(norm.isf(np.clip(pooled, 1e-9, 1 - 1e-9))) > 1.1


@pytest.mark.parametrize("effect", [0.35])
def test_a_real_alignment_is_still_found(effect):
    rng = np.random.default_rng(1)
    data = crossed_scores(rng)
    shifted = data.scores + effect * data.suspect
    found = Compared(shifted, data.suspect, data.folds, data.groups, data.rows)

    def test(part):
        return st.mann_whitney(part.scores[part.suspect], part.scores[~part.suspect])

    assert TESTS.by_fold(found, test) < 1e-4
