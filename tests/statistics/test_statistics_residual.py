"""The residual test: quiet when only the records differ, loud when the target tells more."""

from __future__ import annotations

import numpy as np
import pytest

from lightleak.statistics import mann_whitney, residual_test


def shifted_audit(seed: int, *, effect: float = 0.0, records: int = 300):
    """Features that differ between the sides (blind AUC near .75) and also drive the scores."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(records, 5))
    visible = features[:, :2].sum(axis=1) / np.sqrt(2)
    is_suspect = rng.random(records) < 1 / (1 + np.exp(-visible * 1.2))
    scores = visible + rng.normal(size=records) + effect * is_suspect
    return scores, is_suspect, features


def test_it_holds_its_level_under_a_shift_that_deceives_the_naive_test():
    adjusted, naive = [], []
    for seed in range(40):
        scores, is_suspect, features = shifted_audit(seed)
        adjusted.append(residual_test(scores, is_suspect, features, seed=0, folds=2).p_value)
        naive.append(mann_whitney(scores[is_suspect], scores[~is_suspect]))
    assert np.mean(np.array(adjusted) <= 0.05) <= 0.125
    assert np.mean(np.array(naive) <= 0.05) >= 0.95


def test_it_finds_an_effect_under_the_same_shift():
    p_values = [
        residual_test(*shifted_audit(seed, effect=0.8), seed=0, folds=2).p_value
        for seed in range(10)
    ]
    assert np.mean(np.array(p_values) <= 0.05) >= 0.9


def test_either_family_alone_can_veto():
    # The score follows the square of a feature that tells the sides apart; no linear model can.
    rng = np.random.default_rng(0)
    features = rng.normal(size=(800, 3))
    visible = features[:, 0] ** 2 - 1
    is_suspect = rng.random(800) < 1 / (1 + np.exp(-2 * visible))
    result = residual_test(visible + rng.normal(size=800), is_suspect, features, seed=0)
    assert result.p_by_family["linear"] < 1e-6
    assert result.p_by_family["trees"] > 0.01
    assert result.p_value == result.p_by_family["trees"]


def test_copies_of_a_record_in_one_group_are_not_counted_as_more_evidence():
    scores, is_suspect, features = shifted_audit(1, effect=0.4, records=120)
    alone = residual_test(scores, is_suspect, features, seed=0)
    repeat = [array.repeat(6, axis=0) for array in (scores, is_suspect, features)]
    grouped = residual_test(*repeat, groups=np.arange(120).repeat(6), seed=0)
    ungrouped = residual_test(*repeat, seed=0)
    # The linear family: trees would also learn the copies that stray into their training folds.
    once = alone.statistic_by_family["linear"]
    assert grouped.statistic_by_family["linear"] == pytest.approx(once, rel=0.3)
    assert ungrouped.statistic_by_family["linear"] > 1.8 * once


def test_the_same_seed_gives_the_same_answer():
    audit = shifted_audit(2)
    assert residual_test(*audit, seed=5, folds=2) == residual_test(*audit, seed=5, folds=2)


def test_without_features_it_is_a_plain_test_of_the_difference():
    scores, is_suspect, _ = shifted_audit(3)
    result = residual_test(scores, is_suspect, np.empty((300, 0)), seed=0)
    assert result.p_value < 1e-6


def test_constant_scores_are_no_evidence():
    _, is_suspect, features = shifted_audit(4)
    assert residual_test(np.ones(300), is_suspect, features, seed=0, folds=2).p_value == 1.0


def test_missing_features_are_refused():
    scores, is_suspect, features = shifted_audit(5)
    features[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        residual_test(scores, is_suspect, features, seed=0)
