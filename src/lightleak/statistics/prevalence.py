"""What share of the suspects was used: an estimate beside known members, a bound without them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

from lightleak.statistics.arrays import Floats, Integers, Labels, label_codes, score_array
from lightleak.statistics.intervals import Estimate

# Shares that the interval is made of; its ends are exact to the step.
SHARES = np.linspace(0, 1, 2001)


def prevalence(
    suspect: npt.ArrayLike,
    member: npt.ArrayLike,
    control: npt.ArrayLike,
    *,
    groups: tuple[Labels, Labels, Labels] | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """The share π of the suspects that was used, from known members and controls.

    Suspects are taken for a mixture: a share π that scores like the members, the others like the
    controls. Then E_s[h] = πE_m[h] + (1 − π)E_c[h] for every function h of the score, and
    π̂ = (h̄_s − h̄_c)/(h̄_m − h̄_c), clipped to [0, 1]. With h = 1{score > t} that is the quantifier
    (share above t − FPR)/(TPR − FPR); here h is the normal score of the pooled rank, which needs
    no threshold and varies less. At the true π the identity holds for every h, so that h was
    found on the same records has no first-order effect.

    The interval holds each share that the identity does not refute: with
    T(π) = h̄_s − πh̄_m − (1 − π)h̄_c and its variance V(π) over groups, T²/V less its least value over
    [0, 1] is at most the squared t quantile (degrees of freedom: the least effective number of
    groups on a side, less one). It is never empty, errs on the wide side near 0 and 1, and widens
    as the signal weakens. Where members do not score above controls beyond chance, nothing is
    known: the value is ½ and the interval [0, 1].

    Args:
        suspect: scores, higher = more member-like; shape (n,).
        member: scores of records known to have been used, of the suspects' kind; shape (m,).
        control: scores of records known not to have been; shape (k,).
        groups: what is sampled together, of the suspects, members and controls; a label found on
            two sides is one group.
        confidence: of the two-sided interval.

    Source: Forman (2008), Data Min. Knowl. Discov. 17:164, for the quantifier; the interval after
    Fieller (1954), J. R. Stat. Soc. B 16:175, ordered at the bounds as by Feldman and Cousins
    (1998), Phys. Rev. D 57:3873.

    Raises:
        ValueError: an empty side, NaN, or not one group for each score.
    """
    sides = [
        score_array(suspect, "suspect"),
        score_array(member, "member"),
        score_array(control, "control"),
    ]
    scores = np.concatenate(sides)
    labels = None if groups is None else np.concatenate([np.asarray(each) for each in groups])
    side = np.repeat(np.arange(3), [values.size for values in sides])
    means, covariance, freedom = _side_means(
        _normal_scores(scores), side, label_codes(labels, scores.size, "groups")
    )
    unknown = Estimate(0.5, 0.0, 1.0)
    if freedom < 1 or not covariance.diagonal().all():
        return unknown
    effect = np.array([0.0, 1.0, -1.0])
    gap = float(effect @ means)
    if gap <= stats.t.ppf(confidence, freedom) * math.sqrt(effect @ covariance @ effect):
        return unknown
    weights = np.column_stack([np.ones(SHARES.size), -SHARES, SHARES - 1])
    # Suspects that are copies of the controls, in their groups, leave no variance at π = 0.
    variance = np.einsum("pi,ij,pj->p", weights, covariance, weights) + np.finfo(float).tiny
    refuted = (weights @ means) ** 2 / variance
    width = stats.t.ppf((1 + confidence) / 2, freedom)
    held = SHARES[refuted - refuted.min() <= width**2]
    share = float(np.clip((means[0] - means[2]) / gap, held[0], held[-1]))
    return Estimate(share, float(held[0]), float(held[-1]))


def prevalence_lower_bound(
    suspect: npt.ArrayLike,
    control: npt.ArrayLike,
    *,
    suspect_groups: Labels | None = None,
    control_groups: Labels | None = None,
    confidence: float = 0.95,
) -> float:
    """What share of the suspects was used at the least, with no member known.

    If a share π was used and the others score like the controls, then F_s ≥ (1 − π)F_c, whatever
    members score. So π ≥ max_t 1 − (F_s(t) + ε_s)/(F_c(t) − ε_c), which is
    (P(s > t | suspect) − P(s > t | control))/(1 − P(s > t | control)) less its bands. The bands
    hold for all t at once, each side's with probability 1 − (1 − confidence)/2.

    With groups, Massart's ε takes the effective number of groups (Σn_g)²/Σn_g². However alike
    the records of a group are, this is Hoeffding's bound at each single t; at all t at once it is
    Massart's own where groups are of one size and one score, and simulated elsewhere.

    Source: Massart (1990), Ann. Probab. 18:1269; the bound as in Scott (2015), AISTATS, PMLR
    38:838.

    Raises:
        ValueError: an empty side, NaN, or not one group for each score.
    """
    suspects, controls = score_array(suspect, "suspect"), score_array(control, "control")
    thresholds = np.unique(np.concatenate([suspects, controls]))
    at_most = _share_at_most(suspects, thresholds) + _band(
        label_codes(suspect_groups, suspects.size, "suspect_groups"), confidence
    )
    at_least = _share_at_most(controls, thresholds) - _band(
        label_codes(control_groups, controls.size, "control_groups"), confidence
    )
    usable = at_least > 0
    return float(np.max(1 - at_most[usable] / at_least[usable], initial=0.0))


def _normal_scores(scores: Floats) -> Floats:
    """The normal quantile of each score's place among all; ties share their mean rank."""
    return np.asarray(stats.norm.ppf((stats.rankdata(scores) - 0.5) / scores.size))


def _side_means(values: Floats, side: Integers, groups: Integers) -> tuple[Floats, Floats, float]:
    """Means of the three sides, their covariance over groups, and its degrees of freedom."""
    means, sums, freedom = np.empty(3), np.empty((3, int(groups.max()) + 1)), []
    for each in range(3):
        own = side == each
        means[each] = values[own].mean()
        residuals = np.where(own, values - means[each], 0.0) / own.sum()
        freedom.append(_effective_groups(groups[own]) - 1)
        sums[each] = np.bincount(groups, weights=residuals)
        sums[each] *= math.sqrt(1 + 1 / max(freedom[-1], 1.0))
    return means, sums @ sums.T, min(freedom)


def _share_at_most(scores: Floats, thresholds: Floats) -> Floats:
    return np.searchsorted(np.sort(scores), thresholds, side="right") / scores.size


def _band(groups: Integers, confidence: float) -> float:
    """Massart's one-sided ε, the error split between the two sides."""
    return math.sqrt(math.log(2 / (1 - confidence)) / (2 * _effective_groups(groups)))


def _effective_groups(groups: Integers) -> float:
    """How many groups of one size would vary as much: (Σn_g)²/Σn_g²."""
    return groups.size**2 / float((np.bincount(groups) ** 2).sum())
