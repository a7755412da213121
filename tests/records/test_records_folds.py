"""Folds: groups whole, both sides everywhere, and no side treated better."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightleak.errors import UserError
from lightleak.records import assign_folds

one_sided = st.tuples(st.integers(1, 4), st.just(0)) | st.tuples(st.just(0), st.integers(1, 4))
two_sided = st.tuples(st.integers(1, 4), st.integers(1, 4))
n_folds = st.integers(2, 5)
seeds = st.integers(0, 2**32)


def units(kind):
    """Groups as (members, non-members), enough of them for five folds."""
    return st.lists(kind, min_size=10, max_size=40).filter(
        lambda drawn: min(sum(unit[side] > 0 for unit in drawn) for side in (0, 1)) >= 5
    )


def expand(units):
    """Records of the groups; a group of one has no name."""
    is_member = np.concatenate([[True] * m + [False] * n for m, n in units])
    groups = [
        None if m + n == 1 else f"g{number}"
        for number, (m, n) in enumerate(units)
        for _ in range(m + n)
    ]
    return is_member, groups


@given(units(one_sided | two_sided), n_folds, seeds)
def test_groups_are_whole_and_every_fold_has_both_sides(units, n_folds, seed):
    is_member, groups = expand(units)
    folds = assign_folds(is_member, groups, n_folds, seed)
    for group in set(groups) - {None}:
        assert len(set(folds[[name == group for name in groups]])) == 1
    for side in (True, False):
        assert set(folds[is_member == side]) == set(range(n_folds))


@given(st.integers(5, 80), st.integers(5, 80), n_folds, seeds)
def test_ungrouped_sides_are_balanced_to_one_record(n_members, n_nonmembers, n_folds, seed):
    is_member = np.arange(n_members + n_nonmembers) < n_members
    folds = assign_folds(is_member, [None] * len(is_member), n_folds, seed)
    for side in (True, False):
        counts = np.bincount(folds[is_member == side], minlength=n_folds)
        assert np.ptp(counts) <= 1
    assert np.ptp(np.bincount(folds, minlength=n_folds)) <= 1


@given(units(one_sided), n_folds, seeds)
def test_groups_are_balanced_to_the_largest_one(units, n_folds, seed):
    is_member, groups = expand(units)
    folds = assign_folds(is_member, groups, n_folds, seed)
    for side in (True, False):
        counts = np.bincount(folds[is_member == side], minlength=n_folds)
        assert np.ptp(counts) <= max(map(max, units))


def test_single_records_fill_what_a_large_group_leaves_open():
    is_member, groups = expand([(1, 0)] * 30 + [(10, 0)] + [(0, 1)] * 40)
    for seed in range(20):
        folds = assign_folds(is_member, groups, 2, seed)
        assert np.bincount(folds[is_member]).tolist() == [20, 20]


def test_the_smaller_side_of_mixed_groups_is_balanced_too():
    random = np.random.default_rng(0)
    spreads = []
    for seed in range(20):
        sizes = zip(random.integers(1, 4, 40), random.integers(5, 80, 40), strict=True)
        is_member, groups = expand(list(sizes))
        counts = np.bincount(assign_folds(is_member, groups, 5, seed)[is_member])
        spreads.append(np.ptp(counts) / counts.mean())
    # Placing by the sum of both sides, which the larger one rules, leaves a spread of .3.
    assert np.mean(spreads) < 0.2


@given(units(one_sided | two_sided), n_folds, seeds)
def test_exchanging_the_sides_leaves_the_folds(units, n_folds, seed):
    is_member, groups = expand(units)
    assert np.array_equal(
        assign_folds(is_member, groups, n_folds, seed),
        assign_folds(~is_member, groups, n_folds, seed),
    )


def test_the_position_in_the_file_does_not_decide_the_fold():
    is_member = np.arange(40) < 20
    drawn = np.array([assign_folds(is_member, [None] * 40, 2, seed) for seed in range(400)])
    # Each record is in fold 1 in half of the draws; .5 ± .125 is five standard errors.
    assert np.abs(drawn.mean(axis=0) - 0.5).max() < 0.125


def test_the_seed_decides():
    is_member = np.arange(40) < 20
    first, again, other = (assign_folds(is_member, [None] * 40, 5, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_group_on_both_sides_stays_whole():
    is_member = np.tile([True, False], 20)
    groups = [f"patient {number // 2}" for number in range(40)]
    folds = assign_folds(is_member, groups, 4, seed=0)
    assert np.array_equal(folds[::2], folds[1::2])
    assert np.bincount(folds).tolist() == [10, 10, 10, 10]


def test_a_side_with_fewer_groups_than_folds_is_refused():
    is_member = np.arange(20) < 10
    groups = ["one patient"] * 9 + ["another"] + [None] * 10
    with pytest.raises(UserError, match=r"member \(suspect\) side has 2 groups for 3 folds"):
        assign_folds(is_member, groups, 3, seed=0)


def test_large_one_sided_groups_do_not_crowd_out_a_group_on_both_sides():
    is_member, groups = expand([(5, 0), (1, 4), (0, 5)])
    for seed in range(20):
        folds = assign_folds(is_member, groups, 2, seed)
        assert set(folds[is_member]) == set(folds[~is_member]) == {0, 1}


def test_one_fold_is_refused():
    with pytest.raises(UserError, match="too few"):
        assign_folds(np.array([True, False]), [None, None], 1, seed=0)
