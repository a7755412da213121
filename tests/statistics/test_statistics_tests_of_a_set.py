"""Permutation, Mann–Whitney, conformal claims, and how many of them are false."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightleak.statistics import (
    benjamini_hochberg,
    combine_splits,
    conformal_p_values,
    conformal_p_values_within_folds,
    holm,
    mann_whitney,
    permutation_test,
    smallest_resolvable,
)


def test_mann_whitney_with_ties_is_exact_in_small_sets_and_nil_without_differences():
    # Of the 20 ways to choose 3 of (0, 1, 1, 1, 2, 2), 3 reach the rank sum of (1, 2, 2) or more.
    assert mann_whitney([1, 2, 2], [0, 1, 1]) == pytest.approx(3 / 20)
    assert mann_whitney(np.zeros(50), np.zeros(50)) == 1.0


def test_permutation_of_records_agrees_with_mann_whitney():
    rng = np.random.default_rng(1)
    scores, is_member = rng.normal(size=120), np.arange(120) < 50
    scores[is_member] += 0.3
    expected = mann_whitney(scores[is_member], scores[~is_member])
    p_value = permutation_test(scores, is_member, seed=0, permutations=20_000)
    assert p_value == pytest.approx(expected, abs=0.01)
    assert p_value == permutation_test(scores, is_member, seed=0, permutations=20_000)


def test_no_permutation_reaching_the_observed_leaves_one_in_b_plus_one():
    scores, is_member = np.arange(100), np.arange(100) >= 50
    assert permutation_test(scores, is_member, seed=0, permutations=999) == 1 / 1000


def test_groups_on_one_side_move_as_one():
    # 3 suspect and 3 control patients of 10 records: 20 assignments, however many records.
    groups = np.repeat(np.arange(6), 10)
    p_value = permutation_test(np.arange(60), groups >= 3, groups=groups, seed=0)
    assert p_value == 1 / 20


def test_groups_on_both_sides_trade_labels_inside_only():
    # 5 pages with one suspect and one control record each, the suspect always a little higher.
    page = np.repeat(np.arange(5), 2)
    is_member = np.tile([True, False], 5)
    p_value = permutation_test(page * 10 + is_member, is_member, groups=page, seed=0)
    assert p_value == 1 / 2**5


def test_whole_groups_and_divided_groups_are_permuted_together():
    groups = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    is_member = np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 0], dtype=bool)
    scores = np.where(is_member, 10.0, 0.0) + groups
    # C(4, 2) ways for the whole groups, 2 for the divided one.
    assert permutation_test(scores, is_member, groups=groups, seed=0) == 1 / 12


@pytest.mark.parametrize(("whole", "suspects", "divided"), [(12, 5, 0), (7, 2, 5), (3, 0, 7)])
def test_drawn_assignments_are_as_likely_as_those_that_are_listed(whole, suspects, divided):
    # Whole units, some of them suspects, and divided groups of one suspect and two controls.
    groups = np.concatenate([np.arange(whole), whole + np.repeat(np.arange(divided), 3)])
    is_member = np.append(np.arange(whole) < suspects, np.tile([True, False, False], divided))
    scores = np.random.default_rng(0).normal(size=groups.size) + 0.2 * is_member

    def p_value(permutations):
        arguments = {"groups": groups, "seed": 0, "permutations": permutations}
        return permutation_test(scores, is_member, **arguments)

    assignments = math.comb(whole, suspects) * 3**divided
    assert 500 < assignments < 6000
    listed = p_value(assignments)
    assert 0.05 < listed < 0.95
    # One draw fewer than there are assignments, and they are drawn.
    drawn = p_value(assignments - 1)
    assert drawn != listed
    assert drawn == pytest.approx(listed, abs=4 * (listed / assignments) ** 0.5)


def test_permutation_over_groups_holds_its_level_where_that_over_records_does_not():
    groups = np.repeat(np.arange(40), 5)
    over_groups, over_records = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=40).repeat(5) + 0.3 * rng.normal(size=200)
        arguments = {"seed": seed, "permutations": 199}
        over_groups.append(permutation_test(scores, groups < 20, groups=groups, **arguments))
        over_records.append(permutation_test(scores, groups < 20, **arguments))
    assert np.mean(np.array(over_groups) <= 0.05) <= 0.1
    assert np.mean(np.array(over_records) <= 0.05) >= 0.15


def test_splits_combine_to_twice_the_median():
    assert combine_splits([0.01, 0.02, 0.9]) == pytest.approx(0.04)
    assert combine_splits([0.7, 0.8]) == 1.0


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=20),
    st.lists(st.integers(0, 9), min_size=1, max_size=20),
)
def test_conformal_p_values_are_counts(scores, controls):
    expected = [(1 + sum(c >= s for c in controls)) / (len(controls) + 1) for s in scores]
    assert conformal_p_values(scores, controls) == pytest.approx(expected)


def test_scores_of_a_fit_meet_the_controls_of_that_fit_only():
    p_values = conformal_p_values_within_folds([5, 105], [0, 1], [1, 2, 103, 104], [0, 0, 1, 1])
    assert p_values == pytest.approx([1 / 3, 1 / 3])


def test_false_claims_stay_below_q():
    rng = np.random.default_rng(2)
    shares = []
    for _ in range(200):
        suspects = np.concatenate([rng.normal(size=150), rng.normal(4, 1, 50)])
        rejected = benjamini_hochberg(
            conformal_p_values(suspects, rng.normal(size=1000)), 0.1
        ).rejected
        shares.append(rejected[:150].sum() / max(rejected.sum(), 1))
    assert 0.02 < np.mean(shares) <= 0.1


@pytest.mark.parametrize(("tests", "controls"), [(100, 499), (200, 1000), (1000, 99)])
def test_fewer_discoveries_than_resolvable_are_never_made(tests, controls):
    fewest = smallest_resolvable(tests, controls, 0.05)
    for found in (fewest - 1, fewest):
        p_values = np.ones(max(tests, found))
        p_values[:found] = 1 / (controls + 1)
        discovered = benjamini_hochberg(p_values, 0.05).rejected.any()
        assert discovered == (found == fewest and fewest <= tests)


@pytest.mark.parametrize("function", [holm, benjamini_hochberg, combine_splits])
def test_p_values_that_are_missing_are_refused(function):
    with pytest.raises(ValueError, match="NaN"):
        function([0.1, np.nan])
