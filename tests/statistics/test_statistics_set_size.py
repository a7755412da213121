"""The curve ends at the test of the whole set, and its shares are what smaller sets would find."""

from __future__ import annotations

import numpy as np
import pytest

from lightleak.statistics import mann_whitney, permutation_test
from lightleak.statistics.set_size import set_size_curve


def test_all_suspects_give_the_p_value_of_mann_whitney_with_ties():
    rng = np.random.default_rng(0)
    is_suspect = np.arange(500) < 200
    scores = (rng.normal(size=500) + 0.2 * is_suspect).round(1)
    curve = set_size_curve(scores, is_suspect, seed=0)
    whole = mann_whitney(scores[is_suspect], scores[~is_suspect])
    assert curve.sizes[[0, -1]].tolist() == [10, 200]
    assert curve.p_median[-1] == pytest.approx(whole, rel=0.01)
    assert curve.p_low[-1] == pytest.approx(curve.p_high[-1])


def test_all_groups_give_the_p_value_of_the_permutation_test():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(120), rng.integers(1, 9, 120))
    is_suspect = groups % 2 == 0
    scores = rng.normal(size=120)[groups] + rng.normal(size=groups.size) + 0.3 * is_suspect
    curve = set_size_curve(scores, is_suspect, groups=groups, seed=0)
    whole = permutation_test(scores, is_suspect, groups=groups, seed=0)
    assert curve.p_median[-1] == pytest.approx(whole, rel=0.15)
    # As if each record were on its own, the copies would pass for evidence.
    assert set_size_curve(scores, is_suspect, seed=0).p_median[-1] < whole / 3


def test_the_share_found_is_what_mann_whitney_finds_with_so_many_suspects():
    rng = np.random.default_rng(2)
    is_suspect = np.arange(3000) < 1500
    scores = rng.normal(size=3000) + 0.4 * is_suspect
    sizes = [30, 90]
    curve = set_size_curve(scores, is_suspect, sizes=sizes, seed=0, draws=400)
    suspects, controls = scores[is_suspect], scores[~is_suspect]
    found = [
        np.mean(
            [
                mann_whitney(rng.choice(suspects, size, replace=False), controls) <= 0.01
                for _ in range(200)
            ]
        )
        for size in sizes
    ]
    assert curve.found == pytest.approx(found, abs=0.1)
    assert curve.found[1] > curve.found[0] + 0.2
    assert curve.p_median[1] < curve.p_median[0]


def test_without_an_effect_no_size_finds_more_than_its_level():
    # Fresh suspects for every curve: within one, all subsets share the chance of their set.
    found = []
    for seed in range(60):
        scores = np.random.default_rng(seed).normal(size=600)
        is_suspect = np.arange(600) < 300
        curve = set_size_curve(scores, is_suspect, sizes=[10, 50], seed=seed, draws=50, alpha=0.05)
        found.append(curve.found)
    assert np.mean(found, axis=0) == pytest.approx(0.05, abs=0.025)


def test_constant_scores_are_no_evidence():
    curve = set_size_curve(np.full(40, 0.3), np.arange(40) < 20, seed=0)
    assert np.all(curve.p_median == 1)


def test_a_size_beyond_the_set_is_refused():
    with pytest.raises(ValueError, match="20 groups"):
        set_size_curve(np.arange(40.0), np.arange(40) < 20, sizes=[21], seed=0)
