"""Signals that are weak alone convict together, and fitting them convicts nobody."""

from __future__ import annotations

import numpy as np
import pytest

from lightleak.statistics.dataset_inference import dataset_inference


def audit(seed, *, effect=0.0, groups=100, group_size=1, within=0.0):
    """Six correlated signals, a tenth unscorable; `within` is the share a group has in common."""
    rng = np.random.default_rng(seed)
    codes = np.arange(groups).repeat(group_size)
    is_suspect = codes < groups // 2
    common = rng.normal(size=(groups, 6))[codes]
    own = rng.normal(size=(codes.size, 6)) + rng.normal(size=(codes.size, 1))
    features = np.sqrt(within) * common + np.sqrt(1 - within) * own / np.sqrt(2)
    features += effect * is_suspect[:, None]
    features[rng.random(features.shape) < 0.1] = np.nan
    return features, is_suspect, codes


def p_values(number, **how):
    found = []
    for seed in range(number):
        features, is_suspect, codes = audit(seed, **how)
        found.append(dataset_inference(features, is_suspect, groups=codes, seed=seed, splits=8))
    return (
        np.array([each.p_value for each in found]),
        np.array([[each.control_p_value, each.shuffled_p_value] for each in found]),
    )


@pytest.mark.parametrize("how", [{}, {"groups": 40, "group_size": 5, "within": 0.8}])
def test_the_same_distribution_is_not_told_apart(how):
    observed, null = p_values(30, **how)
    assert np.mean(observed <= 0.05) <= 0.1
    assert np.mean(null <= 0.05) <= 0.1


def test_weak_signals_are_found_together_while_the_null_runs_stay_quiet():
    observed, null = p_values(10, effect=0.5, groups=400)
    assert np.mean(observed <= 0.01) >= 0.9
    assert np.mean(null <= 0.05) <= 0.1


def test_suspects_that_score_lower_are_found_as_well():
    observed, _ = p_values(5, effect=-0.6, groups=400)
    assert np.all(observed <= 0.01)


def test_an_outlier_does_not_hide_the_others():
    features, is_suspect, _ = audit(0, effect=0.6, groups=400)
    features[[0, -1]] = [[-1e9], [1e9]]
    assert dataset_inference(features, is_suspect, seed=0).p_value <= 0.01


def test_copies_in_one_group_are_not_counted_as_more_evidence():
    features, is_suspect, _ = audit(3, effect=0.3, groups=100)
    copies = features.repeat(6, axis=0), is_suspect.repeat(6)
    once = dataset_inference(features, is_suspect, seed=0).p_value
    grouped = dataset_inference(*copies, groups=np.arange(100).repeat(6), seed=0).p_value
    assert grouped == pytest.approx(once)
    assert dataset_inference(*copies, seed=0).p_value < grouped / 10


def test_groups_that_lie_on_both_sides_are_compared_as_well():
    features, _, codes = audit(0, groups=150, group_size=4, within=0.3)
    is_suspect = np.arange(codes.size) % 4 < 2
    found = dataset_inference(
        features + 0.4 * is_suspect[:, None], is_suspect, groups=codes, seed=0
    )
    assert found.p_value <= 0.01
    assert min(found.control_p_value, found.shuffled_p_value) > 0.05


def test_signals_that_say_nothing_are_no_evidence():
    is_suspect = np.arange(40) < 20
    nothing = np.column_stack([np.ones(40), np.full(40, np.nan)])
    assert dataset_inference(nothing, is_suspect, seed=0).p_value == 1


def test_too_few_groups_are_refused():
    with pytest.raises(ValueError, match="8 groups"):
        dataset_inference(np.ones((20, 1)), np.arange(20) < 13, seed=0)
