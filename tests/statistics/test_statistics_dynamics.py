"""Means over batches: intervals that cover, pairs that stay pairs, trends that are slopes."""

from __future__ import annotations

import numpy as np
import pytest

from lightleak.statistics import batch_dynamics, mean_over_batches

SIZES = (1, 2, 4, 8, 16)


def simulated(rng, batches=60, effect=0.2):
    """Two comparisons that share each batch's luck; the first is lower, by effect/√size."""
    luck = rng.normal(0, 0.1, (batches, 1)) + rng.normal(0, 0.02, (batches, len(SIZES)))
    second = 0.8 + luck + rng.normal(0, 0.01, luck.shape)
    first = 0.8 - effect / np.sqrt(SIZES) + luck + rng.normal(0, 0.01, luck.shape)
    return np.stack([first, second], axis=2)


def test_intervals_cover_the_truth_as_often_as_they_say():
    truth = -0.2 / np.sqrt(SIZES)
    slope = np.polyfit(np.log2(SIZES), truth, 1)[0]
    rng = np.random.default_rng(0)
    covered = []
    for seed in range(200):
        found = batch_dynamics(simulated(rng), SIZES, [(0, 1)], seed=seed, replicates=500)
        covered.append(
            [
                found.cosines.low[0, 1] <= 0.8 <= found.cosines.high[0, 1],
                found.differences.low[0, 0] <= truth[0] <= found.differences.high[0, 0],
                found.trends.low[0] <= slope <= found.trends.high[0],
            ]
        )
    # Of so few batches a percentile interval covers 94 %: below 177 once in a thousand times.
    assert np.sum(covered, axis=0).min() >= 177


def test_an_effect_that_shrinks_is_told_from_one_that_stays():
    rng = np.random.default_rng(0)
    shrinking = batch_dynamics(simulated(rng), SIZES, [(0, 1)], seed=0)
    assert shrinking.differences.high[0, 0] < 0 < shrinking.trends.low[0]
    staying = simulated(rng, effect=0.0)
    staying[:, :, 0] -= 0.2
    same = batch_dynamics(staying, SIZES, [(0, 1)], seed=0)
    assert same.differences.high[-1, 0] < 0
    assert same.trends.low[0] < 0 < same.trends.high[0]


def test_differences_are_paired_within_batches():
    found = batch_dynamics(simulated(np.random.default_rng(0)), SIZES, [(0, 1)], seed=0)
    width = found.differences.high - found.differences.low
    alone = (found.cosines.high - found.cosines.low).min(axis=1)
    assert (width[:, 0] < alone / 3).all()


def test_means_and_intervals_are_those_of_a_plain_bootstrap():
    values = np.random.default_rng(0).normal(size=(40, 2, 3))
    found = mean_over_batches(values, seed=1, replicates=20_000)
    rng = np.random.default_rng(2)
    means = [values[rng.integers(0, 40, 40)].mean(axis=0) for _ in range(20_000)]
    np.testing.assert_allclose(found.value, values.mean(axis=0))
    for ends, share in ((found.low, 0.025), (found.high, 0.975)):
        np.testing.assert_allclose(ends, np.quantile(means, share, axis=0), atol=0.02)


def test_the_trend_is_the_slope_of_the_mean_differences():
    values = np.random.default_rng(0).normal(size=(30, 5, 3, 4))
    found = batch_dynamics(values, SIZES, [(0, 2), (1, 2)], seed=0, replicates=100)
    assert found.cosines.value.shape == (5, 3, 4)
    assert found.differences.value.shape == (5, 2, 4)
    for pair, first in enumerate((0, 1)):
        mean = (values[:, :, first] - values[:, :, 2]).mean(axis=0)
        slopes = np.polyfit(np.log2(SIZES), mean, 1)[0]
        np.testing.assert_allclose(found.trends.value[pair], slopes)


def test_a_missing_cosine_is_left_out_and_a_layer_without_any_has_no_mean():
    values = np.random.default_rng(0).normal(size=(30, 2, 2, 2))
    whole = mean_over_batches(values[1:], seed=0)
    values[0, 0, 0, 0] = values[:, :, :, 1] = np.nan
    found = mean_over_batches(values, seed=0)
    assert found.value[0, 0, 0] == pytest.approx(whole.value[0, 0, 0])
    assert found.low[0, 0, 0] < found.value[0, 0, 0] < found.high[0, 0, 0]
    assert np.isnan([found.value[..., 1], found.low[..., 1], found.high[..., 1]]).all()


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [((5, 3, 2), (1, 2), "shape"), ((5, 1, 2), (4,), "two sizes"), ((0, 2, 2), (1, 2), "batch")],
)
def test_what_makes_no_sense_is_refused(shape, sizes, message):
    with pytest.raises(ValueError, match=message):
        batch_dynamics(np.zeros(shape), sizes, [(0, 1)], seed=0)
