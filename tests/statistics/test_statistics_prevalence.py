"""The share that was used is within its interval, and no interval is narrower than the evidence."""

from __future__ import annotations

import numpy as np
import pytest

from lightleak.statistics.prevalence import prevalence, prevalence_lower_bound


def mixture(rng, size, share, effect):
    """Scores of records of which a share was used, which raises them by `effect`."""
    return rng.normal(size=size) + effect * (rng.random(size) < share)


def three_sides(seed, share, effect, size=200):
    rng = np.random.default_rng(seed)
    return [mixture(rng, size, each, effect) for each in (share, 1, 0)]


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize("effect", [0.3, 1, 2])
def test_the_interval_covers_the_true_share(share, effect):
    intervals = [prevalence(*three_sides(seed, share, effect)) for seed in range(150)]
    assert np.mean([each.low <= share <= each.high for each in intervals]) >= 0.91


def test_a_strong_signal_finds_the_share():
    found = prevalence(*three_sides(0, 0.4, 2, size=4000))
    assert found.value == pytest.approx(0.4, abs=0.03)
    assert found.high - found.low < 0.1


def test_a_signal_that_sees_nothing_leaves_every_share_possible():
    found = [prevalence(*three_sides(seed, 0.5, 0)) for seed in range(40)]
    assert np.mean([(each.low, each.high) == (0, 1) for each in found]) >= 0.85
    assert prevalence([1.0] * 9, [1.0] * 9, [1.0] * 9).high == 1


def test_suspects_below_the_controls_do_not_pass_for_certainty():
    rng = np.random.default_rng(0)
    found = prevalence(rng.normal(-0.4, 1, 200), rng.normal(1, 1, 200), rng.normal(0, 1, 200))
    assert found.value == found.low == 0
    assert found.high > 0.02


def test_only_the_order_of_the_scores_matters():
    sides = three_sides(1, 0.5, 1)
    assert prevalence(*map(np.exp, sides)) == prevalence(*sides)


def test_copies_in_one_group_are_not_counted_as_more_evidence():
    sides = three_sides(2, 0.5, 1)
    copies = [side.repeat(5) for side in sides]
    labels = tuple(np.arange(start, start + 200).repeat(5) for start in (0, 200, 400))
    once, grouped = prevalence(*sides), prevalence(*copies, groups=labels)
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high), abs=0.005)
    assert prevalence(*copies).high - prevalence(*copies).low < 0.6 * (once.high - once.low)


def test_a_few_large_groups_do_not_narrow_the_interval():
    covered = []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        sides, labels = [], []
        for share in (0.5, 1, 0):
            # One photographer with many pictures, and many with a few.
            group = np.repeat(np.arange(20), [100, *rng.integers(1, 8, 19)])
            common = rng.normal(size=20) + (rng.random(20) < share)
            sides.append(0.6 * common[group] + 0.8 * rng.normal(size=group.size))
            labels.append(group + 20 * len(labels))
        found = prevalence(*sides, groups=tuple(labels))
        covered.append(found.low <= 0.5 <= found.high)
    assert np.mean(covered) >= 0.91


def test_the_lower_bound_is_zero_without_use_and_rises_with_it():
    rng = np.random.default_rng(0)
    bounds = [
        np.mean(
            [
                prevalence_lower_bound(mixture(rng, 400, share, 3), mixture(rng, 400, 0, 3))
                for _ in range(30)
            ]
        )
        for share in (0, 0.3, 0.6, 1)
    ]
    assert bounds[0] < 0.005
    assert bounds[1] > 0.1
    assert bounds[2] > bounds[1] + 0.2
    assert bounds[3] > bounds[2] + 0.2


def test_the_lower_bound_holds_where_it_is_hardest_to():
    # Members above all controls: there the bound has nothing to spare but its bands.
    rng = np.random.default_rng(1)
    bounds = [
        prevalence_lower_bound(mixture(rng, 300, 0.5, 50), rng.normal(size=300)) for _ in range(400)
    ]
    assert np.mean(np.array(bounds) <= 0.5) >= 0.95
    assert np.mean(bounds) > 0.35


def test_the_lower_bound_counts_groups_not_copies():
    rng = np.random.default_rng(2)
    suspect, control = mixture(rng, 100, 0.7, 4), rng.normal(size=100)
    groups = np.arange(100).repeat(20)
    copies = suspect.repeat(20), control.repeat(20)
    grouped = prevalence_lower_bound(*copies, suspect_groups=groups, control_groups=groups)
    assert grouped == pytest.approx(prevalence_lower_bound(suspect, control))
    assert grouped < prevalence_lower_bound(*copies) - 0.1
