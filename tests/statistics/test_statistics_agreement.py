"""The same numbers as scikit-learn, SciPy and statsmodels, and as the papers' tables."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.nonparametric import rank_compare_2indep, samplesize_rank_compare_onetail
from statsmodels.stats.proportion import proportion_confint

from lightleak.statistics import (
    RocPoint,
    auc,
    auc_delong,
    benjamini_hochberg,
    clopper_pearson,
    fpr_upper_bound,
    holm,
    mann_whitney,
    minimum_set_size,
    roc_curve,
    tpr_at_fpr,
)
from lightleak.statistics.intervals import korn_graubard

TIED_SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=30)
COUNTS = st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def normal_scores(members: int, nonmembers: int, shift: float):
    rng = np.random.default_rng(0)
    return rng.normal(shift, 1, members), rng.normal(0, 1, nonmembers)


def logit_error(estimate):
    """The standard error on the logit scale that the interval was made from."""
    return (special.logit(estimate.high) - special.logit(estimate.low)) / 2 / 1.959963985


@settings(deadline=None)
@given(TIED_SCORES, TIED_SCORES)
def test_auc_is_sklearns_with_ties(member, nonmember):
    labels = [1] * len(member) + [0] * len(nonmember)
    assert auc(member, nonmember) == pytest.approx(roc_auc_score(labels, member + nonmember))


@pytest.mark.parametrize("decimals", [9, 0])
def test_delong_error_is_that_of_all_pairs_and_statsmodels(decimals):
    member, nonmember = (side.round(decimals) for side in normal_scores(17, 23, 0.5))
    wins = (member[:, None] > nonmember) + 0.5 * (member[:, None] == nonmember)
    variance = wins.mean(1).var(ddof=1) / 17 + wins.mean(0).var(ddof=1) / 23
    estimate = auc_delong(member, nonmember)
    error = logit_error(estimate) * estimate.value * (1 - estimate.value)
    assert error == pytest.approx(variance**0.5)
    compared = rank_compare_2indep(member, nonmember, use_t=False)
    assert estimate.value == pytest.approx(compared.prob1)
    assert error == pytest.approx((compared.var / compared.nobs) ** 0.5)


def test_delong_error_over_groups_is_that_of_all_pairs_summed_over_groups():
    member, nonmember = normal_scores(60, 80, 0.5)
    groups = np.arange(60) // 4, np.arange(80) // 5
    wins = (member[:, None] > nonmember).astype(float)
    variance = 0.0
    for rows, own in zip((wins, wins.T), groups, strict=True):
        off = rows.mean(1) - wins.mean()
        sums = np.array([off[own == group].sum() for group in np.unique(own)])
        variance += sums.size / (sums.size - 1) * (sums**2).sum() / off.size**2
    estimate = auc_delong(member, nonmember, member_groups=groups[0], nonmember_groups=groups[1])
    error = logit_error(estimate) * estimate.value * (1 - estimate.value)
    assert error == pytest.approx(variance**0.5)


def test_tpr_is_the_highest_on_sklearns_curve_within_the_target():
    member, nonmember = normal_scores(500, 400, 1.0)
    fpr, tpr, _ = sklearn_roc_curve(
        np.repeat([1, 0], [500, 400]), np.concatenate([member, nonmember]), drop_intermediate=False
    )
    point = tpr_at_fpr(member, nonmember, 0.05)
    assert isinstance(point, RocPoint)
    assert point.tpr.value == tpr[fpr <= 0.05].max()
    assert point.tpr == clopper_pearson(round(point.tpr.value * 500), 500)
    curve = roc_curve(member, nonmember, seed=0, replicates=2)
    assert curve.tpr == pytest.approx([tpr[fpr <= each + 1e-9].max() for each in curve.fpr])


@pytest.mark.parametrize("sizes", [(6, 7), (80, 90)])
def test_mann_whitney_is_scipys(sizes):
    member, nonmember = normal_scores(*sizes, 0.3)
    expected = stats.mannwhitneyu(member, nonmember, alternative="greater").pvalue
    assert mann_whitney(member, nonmember) == pytest.approx(expected)


@settings(deadline=None)
@given(COUNTS)
def test_clopper_pearson_is_statsmodels(counts):
    estimate = clopper_pearson(*counts)
    expected = proportion_confint(*counts, method="beta")
    assert (estimate.low, estimate.high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"), [(8, 800, 0.0043, 0.0196), (0, 1000, 0.0, 0.0037)]
)
def test_clopper_pearson_vectors(successes, trials, low, high):
    estimate = clopper_pearson(successes, trials)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)


def test_the_effective_sample_size_is_that_of_statsmodels_cluster_robust_variance():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(40), rng.integers(1, 9, 40))
    passed = rng.random(groups.size) < rng.beta(1, 2, 40)[groups]
    robust = sm.OLS(passed.astype(float), np.ones(groups.size)).fit(
        cov_type="cluster", cov_kwds={"groups": groups}
    )
    n, share = groups.size, passed.mean()
    few = (stats.t.ppf(0.975, 39) / stats.t.ppf(0.975, n - 1)) ** 2
    worth = share * (1 - share) / robust.bse[0] ** 2 / few * n / (n - 1)
    assert worth < n
    expected = proportion_confint(share * worth, worth, method="beta")
    grouped = korn_graubard(passed, groups)
    assert (grouped.low, grouped.high) == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 7, 40])
def test_holm_and_benjamini_hochberg_are_statsmodels(count):
    p_values = np.random.default_rng(count).beta(0.2, 1, count).round(2)
    stepped = multipletests(p_values, method="holm")[1]
    assert holm(p_values) == pytest.approx(stepped)
    rejected, adjusted, *_ = multipletests(p_values, alpha=0.05, method="fdr_bh")
    found = benjamini_hochberg(p_values, 0.05)
    assert found.adjusted == pytest.approx(adjusted)
    # On the level itself the last bit decides.
    clear = abs(adjusted - 0.05) > 1e-12
    np.testing.assert_array_equal(found.rejected[clear], rejected[clear])


def test_benjamini_hochberg_worked_example():
    # Benjamini and Hochberg (1995), section 3: of 15 p-values the first four are rejected.
    p_values = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344]
    p_values += [0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    assert benjamini_hochberg(p_values, 0.05).rejected.sum() == 4


@pytest.mark.parametrize(("value", "ratio"), [(0.55, 1.0), (0.6, 1.0), (0.6, 3.0), (0.7, 0.5)])
def test_the_smallest_set_is_about_that_of_statsmodels(value, ratio):
    # Normal scores with that AUC.
    control = stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
    suspect = control + 2**0.5 * stats.norm.ppf(value)
    expected = samplesize_rank_compare_onetail(
        suspect, control, alpha=0.05, power=0.9, nobs_ratio=ratio, alternative="larger"
    )
    size = minimum_set_size(value, controls_per_suspect=ratio, alpha=0.05, power=0.9)
    assert size == pytest.approx(expected.nobs_treat, rel=0.06)


@pytest.mark.parametrize(
    ("controls", "fpr", "bound"),
    [(300, 0.01, 0.0208), (800, 0.01, 0.0164), (1000, 0.001, 0.0030), (10_000, 0.001, 0.0016)],
)
def test_what_a_threshold_certifies(controls, fpr, bound):
    k = int(fpr * (controls + 1))
    assert fpr_upper_bound(controls, k) == pytest.approx(bound, abs=5e-5)


def test_the_fewest_controls_that_certify_a_false_positive_rate():
    for controls, fpr in ((299, 0.01), (2995, 0.001)):
        assert fpr_upper_bound(controls, 1) <= fpr < fpr_upper_bound(controls - 1, 1)
