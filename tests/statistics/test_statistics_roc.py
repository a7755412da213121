"""AUC, TPR at FPR, and the curve: right values, and intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightleak.statistics import (
    RocPoint,
    Unresolvable,
    auc,
    auc_across_folds,
    auc_bootstrap,
    auc_delong,
    clopper_pearson,
    roc_curve,
    tpr_at_fpr,
    tpr_at_fpr_across_folds,
)
from lightleak.statistics.intervals import korn_graubard

TIED_SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=30)


def normal_scores(seed: int, members: int, nonmembers: int, shift: float = 0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, members), rng.normal(0, 1, nonmembers)


@settings(deadline=None)
@given(TIED_SCORES, TIED_SCORES)
def test_auc_ignores_monotone_transformations_and_flips_with_the_labels(member, nonmember):
    value = auc(member, nonmember)
    assert auc(np.exp(member), np.exp(nonmember)) == pytest.approx(value)
    assert auc(nonmember, member) == pytest.approx(1 - value)


@settings(deadline=None)
@given(TIED_SCORES, TIED_SCORES)
def test_delong_interval_holds_its_value_and_flips_with_the_labels(member, nonmember):
    estimate, flipped = auc_delong(member, nonmember), auc_delong(nonmember, member)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert flipped.low == pytest.approx(1 - estimate.high, abs=1e-9)


def test_perfect_separation_gets_the_interval_of_as_many_disjoint_pairs():
    estimate = auc_delong(np.arange(10, 20), np.arange(8))
    assert estimate.value == 1
    assert estimate.low == pytest.approx(clopper_pearson(8, 8).low)
    assert auc_bootstrap(np.arange(10, 20), np.arange(8), seed=0) == estimate


def test_scores_that_are_all_the_same_say_nothing():
    estimate = auc_delong(np.zeros(20), np.zeros(20))
    assert estimate.value == 0.5
    assert estimate.low < 0.3
    assert estimate.high > 0.7


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_intervals_cover_the_true_auc(shift):
    truth = 0.5 if shift == 0 else 0.7602499
    delong = bootstrap = 0
    for seed in range(300):
        member, nonmember = normal_scores(seed, 60, 40, shift)
        estimate = auc_delong(member, nonmember)
        delong += estimate.low <= truth <= estimate.high
        estimate = auc_bootstrap(member, nonmember, seed=seed, replicates=500)
        bootstrap += estimate.low <= truth <= estimate.high
    assert 0.91 <= delong / 300 <= 0.985
    assert 0.91 <= bootstrap / 300 <= 0.985


@pytest.mark.parametrize("method", ["delong", "bootstrap"])
def test_intervals_over_groups_cover_where_those_over_records_do_not(method):
    def interval(seed, **groups):
        rng = np.random.default_rng(seed)
        member, nonmember = (
            rng.normal(size=30).repeat(6) + 0.5 * rng.normal(size=180) for _ in range(2)
        )
        if method == "delong":
            return auc_delong(member, nonmember, **groups)
        return auc_bootstrap(member, nonmember, seed=seed, replicates=400, **groups)

    groups = {name: np.arange(30).repeat(6) for name in ("member_groups", "nonmember_groups")}
    covers = {"records": 0, "groups": 0}
    for seed in range(150):
        for name, given_groups in (("records", {}), ("groups", groups)):
            estimate = interval(seed, **given_groups)
            covers[name] += estimate.low <= 0.5 <= estimate.high
    assert covers["groups"] / 150 >= 0.9
    assert covers["records"] / 150 <= 0.75


def test_bootstrap_and_delong_agree_on_a_large_set():
    member, nonmember = normal_scores(3, 2000, 1500, 0.4)
    bootstrap, delong = auc_bootstrap(member, nonmember, seed=1), auc_delong(member, nonmember)
    assert bootstrap.low == pytest.approx(delong.low, abs=0.002)
    assert bootstrap.high == pytest.approx(delong.high, abs=0.002)


def test_scores_of_different_fits_are_compared_within_folds_only():
    member, nonmember = normal_scores(4, 400, 400, 1.0)
    member_folds, nonmember_folds = np.arange(400) % 2, np.arange(400) % 2
    expected = auc(member, nonmember)
    # A second fit with another scale: pooled, half of the members fall below all non-members.
    member, nonmember = member - 100 * member_folds, nonmember - 100 * nonmember_folds
    estimate = auc_across_folds(member, nonmember, member_folds, nonmember_folds)
    assert auc(member, nonmember) < 0.7
    assert estimate.value == pytest.approx(expected, abs=0.01)


def test_the_interval_across_folds_is_that_of_one_fold():
    member, nonmember = normal_scores(5, 300, 300)
    folds = np.repeat([0, 1], 300)
    estimate = auc_across_folds(np.tile(member, 2), np.tile(nonmember, 2), folds, folds)
    # Two folds with the same scores are as dependent as folds can be.
    alone = auc_delong(member, nonmember)
    assert (estimate.low, estimate.high) == pytest.approx((alone.low, alone.high))


def test_a_fold_without_nonmembers_is_refused():
    with pytest.raises(ValueError, match="every fold"):
        auc_across_folds([1, 2], [3, 4], [0, 1], [0, 0])


@settings(deadline=None)
@given(TIED_SCORES, st.lists(st.integers(-5, 5), min_size=9, max_size=60), st.floats(0.1, 0.6))
def test_realised_fpr_never_exceeds_the_target(member, nonmember, fpr):
    point = tpr_at_fpr(member, nonmember, fpr)
    assert isinstance(point, RocPoint)
    assert point.fpr.value <= fpr + 1e-9
    let_through = [np.mean(np.array(nonmember) > value) for value in set(nonmember)]
    # No lower threshold among the scores would have kept the target.
    assert point.fpr.value == max(share for share in let_through if share <= fpr + 1e-9)


def test_a_calibrated_threshold_keeps_the_fpr_on_average():
    rng = np.random.default_rng(7)
    rates = []
    for _ in range(400):
        calibration, member, nonmember = rng.normal(size=(3, 99))
        point = tpr_at_fpr(member, nonmember, 0.05, calibration=calibration)
        assert isinstance(point, RocPoint)
        assert point.threshold == np.sort(calibration)[-5]
        rates.append(point.fpr.value)
    assert np.mean(rates) == pytest.approx(0.05, abs=0.005)


def test_each_fold_takes_its_threshold_from_the_controls_of_the_others():
    member = np.array([5.0, 50.0, 5.0, 50.0])
    nonmember = np.concatenate([np.arange(10.0), np.arange(10.0, 20.0)])
    folds = np.repeat([0, 1], 10)
    point = tpr_at_fpr_across_folds(member, nonmember, [0, 0, 1, 1], folds, 0.1)
    assert isinstance(point, RocPoint)
    # Fold 0 is held to 19, fold 1 to 9: one and one member pass, and all of fold 1's controls.
    assert point.tpr.value == 0.5
    assert point.fpr.value == 0.5


@pytest.mark.parametrize(("fpr", "needed"), [(0.01, 99), (0.001, 999)])
def test_too_few_controls_are_said_to_be_too_few(fpr, needed):
    missing = tpr_at_fpr(np.ones(5), np.zeros(needed - 1), fpr)
    assert isinstance(missing, Unresolvable)
    assert str(needed) in missing.reason
    assert isinstance(tpr_at_fpr(np.ones(5), np.zeros(needed), fpr), RocPoint)


@pytest.mark.parametrize("truth", [0.02, 0.3])
@pytest.mark.parametrize("sizes", [[5] * 60, [3, 4, 6, 7] * 15])
def test_rates_of_groups_that_agree_cover_where_those_of_records_do_not(truth, sizes):
    groups = np.repeat(np.arange(60), sizes)
    controls = np.arange(-100.0, 0.0)
    covers = {"records": 0, "groups": 0}
    for seed in range(300):
        # Above all controls is detected; the records of a group are, or are not, together.
        detected = np.random.default_rng(seed).random(60) < truth
        members = np.where(detected, 1.0, -200.0)[groups]
        for name, own in (("records", None), ("groups", groups)):
            point = tpr_at_fpr(members, controls, 0.05, member_groups=own)
            assert isinstance(point, RocPoint)
            covers[name] += point.tpr.low <= truth <= point.tpr.high
    assert covers["groups"] / 300 >= 0.93
    assert covers["records"] / 300 <= 0.85


def test_rates_across_folds_are_over_groups_too():
    member, nonmember = normal_scores(8, 60, 60, 1.0)
    folds, groups = np.arange(240) % 2, np.repeat(np.arange(60), 4)

    def point(**given_groups):
        return tpr_at_fpr_across_folds(
            member[groups], nonmember[groups], folds, folds, 0.05, **given_groups
        )

    plain, grouped = point(), point(member_groups=groups, nonmember_groups=groups)
    detected = round(plain.tpr.value * 60)
    assert plain.tpr == clopper_pearson(4 * detected, 240)
    # Four records that are always alike are worth one.
    exact = clopper_pearson(detected, 60)
    assert (grouped.tpr.low, grouped.tpr.high) == pytest.approx((exact.low, exact.high), abs=0.01)
    assert grouped.fpr.high - grouped.fpr.low > 1.5 * (plain.fpr.high - plain.fpr.low)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=1, max_size=40))
def test_groups_never_tell_more_than_as_many_records_and_single_ones_as_much(records):
    passed, groups = zip(*records, strict=True)
    plain, grouped = clopper_pearson(sum(passed), len(passed)), korn_graubard(passed, groups)
    assert grouped.value == pytest.approx(plain.value)
    assert grouped.low <= plain.low + 1e-9
    assert plain.high - 1e-9 <= grouped.high
    single = korn_graubard(passed, range(len(passed)))
    assert (single.low, single.high) == pytest.approx((plain.low, plain.high))


def test_groups_without_any_success_or_failure_count_once_each():
    groups = np.repeat(np.arange(20), 7)
    for success in (0, 1):
        expected = clopper_pearson(20 * success, 20)
        grouped = korn_graubard(np.full(140, success), groups)
        assert (grouped.low, grouped.high) == pytest.approx((expected.low, expected.high))


@settings(max_examples=25, deadline=None)
@given(TIED_SCORES, TIED_SCORES)
def test_the_curve_passes_through_every_point_of_tpr_at_fpr(member, nonmember):
    curve = roc_curve(member, nonmember, seed=0, replicates=20)
    assert (np.diff(curve.tpr) >= 0).all()
    assert curve.tpr[-1] == 1
    for fpr, tpr in zip(curve.fpr, curve.tpr, strict=True):
        if 1 / (len(nonmember) + 1) <= fpr < 1:
            point = tpr_at_fpr(member, nonmember, float(fpr))
            assert isinstance(point, RocPoint)
            assert point.tpr.value == pytest.approx(tpr)


def test_the_band_of_the_curve_covers_the_true_curve():
    covers = []
    for seed in range(100):
        member, nonmember = normal_scores(seed, 200, 200)
        curve = roc_curve(
            member, nonmember, seed=seed, replicates=300, grid=np.array([0.1, 0.3, 0.5, 0.8])
        )
        covers.append((curve.low <= curve.fpr) & (curve.fpr <= curve.high))
    assert np.mean(covers) >= 0.9
    assert np.mean(covers) <= 0.99


def test_the_band_over_groups_covers_where_that_over_records_does_not():
    covers = {"records": [], "groups": []}
    groups = np.arange(40).repeat(5)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        sides = [rng.normal(size=40)[groups] + 0.2 * rng.normal(size=200) for _ in range(2)]
        for name, own in (("records", None), ("groups", groups)):
            curve = roc_curve(
                *sides,
                seed=seed,
                replicates=300,
                grid=np.array([0.3, 0.5, 0.7]),
                member_groups=own,
                nonmember_groups=own,
            )
            covers[name].append((curve.low <= curve.fpr) & (curve.fpr <= curve.high))
    assert np.mean(covers["groups"]) >= 0.88
    assert np.mean(covers["records"]) <= 0.75


def test_one_group_a_side_is_drawn_as_it_is():
    member, nonmember = normal_scores(9, 30, 20, 1.0)
    curve = roc_curve(
        member, nonmember, seed=0, member_groups=[0] * 30, nonmember_groups=[0] * 20, replicates=5
    )
    np.testing.assert_array_equal(curve.low, curve.tpr)
    np.testing.assert_array_equal(curve.high, curve.tpr)


@pytest.mark.parametrize("function", [auc, auc_delong])
def test_nan_is_refused(function):
    with pytest.raises(ValueError, match="NaN"):
        function([1.0, np.nan], [0.0])
