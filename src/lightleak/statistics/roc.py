"""How well scores separate members from non-members: AUC, TPR at a low FPR, the curve.

Everywhere a higher score is the more member-like one. An AUC below .5 is reported as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from lightleak.statistics.arrays import (
    BLOCK_ENTRIES,
    Booleans,
    Floats,
    Integers,
    Labels,
    label_codes,
    score_array,
)
from lightleak.statistics.intervals import Estimate, clopper_pearson, korn_graubard

# 0.29 × 100 is 28.999… in floating point; counts are meant exactly.
ROUNDING = 1e-9

# Each block of resamples is read several times: it should fit a core's cache, and be small enough
# for the allocator to hand out the same memory again.
RESAMPLED_ENTRIES = BLOCK_ENTRIES // 40


def auc(member: npt.ArrayLike, nonmember: npt.ArrayLike) -> float:
    """P(member score > non-member score), ties counted ½; O(n log n).

    Source: Mann and Whitney (1947), Ann. Math. Stat. 18:50.

    Raises:
        ValueError: an empty side, or NaN.
    """
    members, nonmembers = score_array(member, "member"), score_array(nonmember, "nonmember")
    return float(_share_below(members, nonmembers).mean())


def auc_delong(
    member: npt.ArrayLike,
    nonmember: npt.ArrayLike,
    confidence: float = 0.95,
    *,
    member_groups: Labels | None = None,
    nonmember_groups: Labels | None = None,
) -> Estimate:
    """The AUC with DeLong's variance and an interval on the logit scale.

    With groups the variance is that of group sums. A group that lies on both sides counts as
    two; what its halves have in common would narrow the interval, so this errs on the wide side.

    Where the variance is nil (AUC 0 or 1, all scores tied, a side with one unit) the interval is
    Clopper–Pearson's over min(n₁, n₀) pairs: partners that share no record are independent
    trials, each won with probability AUC, so the interval is exact at 0 and 1, and wide.

    Source: DeLong, DeLong and Clarke-Pearson (1988), Biometrics 44:837; groups after
    Obuchowski (1997), Biometrics 53:567.

    Raises:
        ValueError: an empty side, NaN, or not one group for each score.
    """
    members, nonmembers = score_array(member, "member"), score_array(nonmember, "nonmember")
    member_codes = label_codes(member_groups, members.size, "member_groups")
    nonmember_codes = label_codes(nonmember_groups, nonmembers.size, "nonmember_groups")
    part = _delong(members, nonmembers, member_codes, nonmember_codes)
    return _logit_interval(part.auc, part.standard_error, part.pairs, confidence)


def auc_across_folds(
    member: npt.ArrayLike,
    nonmember: npt.ArrayLike,
    member_folds: Labels,
    nonmember_folds: Labels,
    confidence: float = 0.95,
    *,
    member_groups: Labels | None = None,
    nonmember_groups: Labels | None = None,
) -> Estimate:
    """The AUC of scores that were fitted on other folds: mean of the within-fold AUCs.

    Scores of different fits share no scale, so they are compared within a fold only. The fits
    share training records, so the folds' AUCs are correlated by an unknown amount, and treating
    K folds as independent understates the standard error by up to √K (√2 for two folds). The
    mean of the folds' standard errors bounds that of the mean AUC under every dependence
    (Minkowski), and is used here.

    Raises:
        ValueError: NaN, a fold without members or without non-members, or not one fold (and
            group, if given) for each score.
    """
    members, nonmembers = score_array(member, "member"), score_array(nonmember, "nonmember")
    member_codes = label_codes(member_groups, members.size, "member_groups")
    nonmember_codes = label_codes(nonmember_groups, nonmembers.size, "nonmember_groups")
    splits = _splits(member_folds, nonmember_folds, members.size, nonmembers.size)
    parts = [
        _delong(
            members[own.member],
            nonmembers[own.nonmember],
            member_codes[own.member],
            nonmember_codes[own.nonmember],
        )
        for own in splits
    ]
    width = stats.norm.ppf((1 + confidence) / 2)
    errors = []
    for part in parts:
        # A fold of AUC 1 has no DeLong variance, yet it does not know its AUC to be 1.
        exact = _interval_of_pairs(part.auc, part.pairs, confidence)
        errors.append(part.standard_error or (exact.high - exact.low) / (2 * width))
    mean = float(np.mean([part.auc for part in parts]))
    return _logit_interval(
        mean, float(np.mean(errors)), min(part.pairs for part in parts), confidence
    )


def auc_bootstrap(
    member: npt.ArrayLike,
    nonmember: npt.ArrayLike,
    *,
    seed: int,
    replicates: int = 10_000,
    member_groups: Labels | None = None,
    nonmember_groups: Labels | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """The AUC with a stratified percentile bootstrap interval.

    Each side is resampled by itself; with groups, whole groups are drawn. Where no replicate
    differs from the others, the interval is that of `auc_delong` without variance.

    Source: Efron and Tibshirani (1993), chapters 13 and 8.

    Raises:
        ValueError: an empty side, NaN, or not one group for each score.
    """
    members, nonmembers = score_array(member, "member"), score_array(nonmember, "nonmember")
    member_codes = label_codes(member_groups, members.size, "member_groups")
    nonmember_codes = label_codes(nonmember_groups, nonmembers.size, "nonmember_groups")
    # In ascending order every look-up of a replicate goes forward through memory.
    ascending, order = np.argsort(members), np.argsort(nonmembers)
    below = np.searchsorted(nonmembers[order], members[ascending], side="left")
    not_above = np.searchsorted(nonmembers[order], members[ascending], side="right")
    resamples = _resamples(member_codes[ascending], nonmember_codes[order], replicates, seed)
    aucs = np.concatenate([_weighted_auc(drawn, below, not_above) for drawn in resamples])
    value = auc(members, nonmembers)
    low, high = np.quantile(aucs, [(1 - confidence) / 2, (1 + confidence) / 2])
    if low == high:
        pairs = min(np.unique(member_codes).size, np.unique(nonmember_codes).size)
        return _interval_of_pairs(value, pairs, confidence)
    return Estimate(value, float(low), float(high))


@dataclass(frozen=True)
class RocPoint:
    """The true-positive rate where the false-positive rate is held at a target.

    Attributes:
        fpr_target: the rate asked for.
        threshold: scores strictly above it count as detected; None when each fold has its own.
        tpr: detected share of the members, Clopper–Pearson interval (Korn–Graubard over groups).
        fpr: realised share among the non-members, interval likewise.
    """

    fpr_target: float
    threshold: float | None
    tpr: Estimate
    fpr: Estimate


@dataclass(frozen=True)
class Unresolvable:
    """There are too few controls for the false-positive rate that was asked for."""

    reason: str


def tpr_at_fpr(
    member: npt.ArrayLike,
    nonmember: npt.ArrayLike,
    fpr: float,
    *,
    calibration: npt.ArrayLike | None = None,
    member_groups: Labels | None = None,
    nonmember_groups: Labels | None = None,
) -> RocPoint | Unresolvable:
    """The conservative TPR at an FPR of at most `fpr`.

    Without `calibration` the threshold is the smallest value that lets at most `fpr` of the
    non-members through; ties count against. With `calibration`, controls that the signal was
    not fitted on and that are not scored here, it is the ⌊fpr(n₀ + 1)⌋-th largest of them, which
    a further control exceeds with probability at most `fpr`.

    Records are independent trials of the intervals; with groups, only groups are.

    Raises:
        ValueError: an empty side, NaN, `fpr` outside (0, 1), or not one group for each score.
    """
    members, nonmembers = score_array(member, "member"), score_array(nonmember, "nonmember")
    controls = nonmembers if calibration is None else score_array(calibration, "calibration")
    if missing := _too_few(controls.size, fpr):
        return missing
    if calibration is None:
        threshold = np.sort(nonmembers)[::-1][math.floor(fpr * controls.size + ROUNDING)]
    else:
        threshold = _calibrated_threshold(controls, fpr)
    return RocPoint(
        fpr_target=fpr,
        threshold=float(threshold),
        tpr=_share(members > threshold, member_groups),
        fpr=_share(nonmembers > threshold, nonmember_groups),
    )


def tpr_at_fpr_across_folds(
    member: npt.ArrayLike,
    nonmember: npt.ArrayLike,
    member_folds: Labels,
    nonmember_folds: Labels,
    fpr: float,
    *,
    member_groups: Labels | None = None,
    nonmember_groups: Labels | None = None,
) -> RocPoint | Unresolvable:
    """The TPR at `fpr`, each fold's threshold set by the controls of the other folds.

    All folds are pooled before the intervals are taken, which are those of `tpr_at_fpr`.

    Raises:
        ValueError: NaN, `fpr` outside (0, 1), fewer than two folds, a fold without members or
            without non-members, or not one fold (and group, if given) for each score.
    """
    members, nonmembers = score_array(member, "member"), score_array(nonmember, "nonmember")
    splits = _splits(member_folds, nonmember_folds, members.size, nonmembers.size)
    if len(splits) < 2:
        raise ValueError("thresholds from other folds need at least two folds")
    detected, false_alarms = np.zeros(members.size, bool), np.zeros(nonmembers.size, bool)
    for own in splits:
        controls = np.delete(nonmembers, own.nonmember)
        if missing := _too_few(controls.size, fpr):
            return missing
        threshold = _calibrated_threshold(controls, fpr)
        detected[own.member] = members[own.member] > threshold
        false_alarms[own.nonmember] = nonmembers[own.nonmember] > threshold
    return RocPoint(
        fpr_target=fpr,
        threshold=None,
        tpr=_share(detected, member_groups),
        fpr=_share(false_alarms, nonmember_groups),
    )


def fpr_upper_bound(n_controls: int, k: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of the true FPR at the k-th largest of n₀ control scores.

    The share of the population above the k-th largest of n₀ continuous draws is
    Beta(k, n₀ − k + 1). So k = 1, the largest control itself, certifies 1 % from 299 controls.

    Source: David and Nagaraja (2003), Order Statistics, section 2.3.

    Raises:
        ValueError: k outside 1 … n₀.
    """
    if not 1 <= k <= n_controls:
        raise ValueError(f"there is no {k}-th largest of {n_controls} controls")
    return float(stats.beta.ppf(confidence, k, n_controls - k + 1))


@dataclass(frozen=True)
class RocCurve:
    """The curve on a grid of false-positive rates, with a pointwise band; vectors of one length."""

    fpr: Floats
    tpr: Floats
    low: Floats
    high: Floats


# Even steps for a linear axis, and steps down to 1 in 10,000 for a logarithmic one.
DEFAULT_GRID = np.unique(
    np.concatenate([np.linspace(0, 1, 101), np.logspace(-4, 0, 41).round(6)])
).astype(np.float64)


def roc_curve(
    member: npt.ArrayLike,
    nonmember: npt.ArrayLike,
    *,
    seed: int,
    replicates: int = 2000,
    grid: Floats = DEFAULT_GRID,
    confidence: float = 0.95,
    member_groups: Labels | None = None,
    nonmember_groups: Labels | None = None,
) -> RocCurve:
    """The conservative TPR at each FPR of `grid`, with a pointwise stratified bootstrap band.

    With groups, whole groups are drawn.

    Raises:
        ValueError: an empty side, NaN, or not one group for each score.
    """
    members, member_codes = _descending(member, member_groups, "member")
    nonmembers, nonmember_codes = _descending(nonmember, nonmember_groups, "nonmember")
    # Non-members above v are let through together, so tied ones share one cumulative count.
    last_of_tie = np.flatnonzero(np.append(nonmembers[1:] != nonmembers[:-1], True))
    thresholds = np.append(nonmembers[last_of_tie], -np.inf)
    members_above = np.searchsorted(-members, -thresholds, side="left")

    def tprs(drawn: _Sides) -> Floats:
        let_through = drawn.nonmember.cumsum(axis=1)[:, last_of_tie]
        # Groups of unequal size make replicates of unequal size.
        allowed = np.floor(grid * let_through[:, -1:] + ROUNDING).astype(np.int64)
        # One sorted search over all rows: each row is lifted above the one before.
        row = np.arange(len(let_through))[:, None]
        lift = row * (let_through[:, -1].max() + 1)
        place = np.searchsorted((let_through + lift).ravel(), (allowed + lift).ravel(), "right")
        place = place.reshape(allowed.shape) - row * last_of_tie.size
        detected = _counts_before(drawn.member)
        above = np.take_along_axis(detected, members_above[place], axis=1)
        return np.asarray(above / detected[:, -1:], dtype=np.float64)

    resamples = _resamples(member_codes, nonmember_codes, replicates, seed)
    resampled = np.concatenate([tprs(drawn) for drawn in resamples])
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    as_is = _Sides(np.ones((1, members.size), np.int64), np.ones((1, nonmembers.size), np.int64))
    return RocCurve(grid, tprs(as_is)[0], low, high)


def _descending(values: npt.ArrayLike, groups: Labels | None, name: str) -> tuple[Floats, Integers]:
    """The scores from the highest down, and their groups' codes in that order."""
    scores = score_array(values, name)
    order = np.argsort(scores)[::-1]
    return scores[order], label_codes(groups, scores.size, f"{name}_groups")[order]


def _share(passed: Booleans, groups: Labels | None) -> Estimate:
    if groups is None:
        return clopper_pearson(int(passed.sum()), passed.size)
    return korn_graubard(passed, groups)


def _share_below(values: Floats, reference: Floats) -> Floats:
    """For each value the share of `reference` below it, ties ½."""
    ascending = np.sort(reference)
    below = np.searchsorted(ascending, values, side="left")
    not_above = np.searchsorted(ascending, values, side="right")
    return (below + not_above) / (2 * reference.size)


@dataclass(frozen=True)
class _Delong:
    auc: float
    standard_error: float
    pairs: int


def _delong(
    members: Floats, nonmembers: Floats, member_codes: Integers, nonmember_codes: Integers
) -> _Delong:
    """AUC, standard error of it (0 where nothing varies), and how many disjoint pairs there are."""
    variance, units = 0.0, []
    for values, reference, codes in (
        (members, nonmembers, member_codes),
        (nonmembers, members, nonmember_codes),
    ):
        placements = _share_below(values, reference)
        sums = np.bincount(codes, weights=placements - placements.mean())
        present = np.unique(codes).size
        units.append(present)
        variance += present / max(present - 1, 1) * float((sums**2).sum()) / values.size**2
    if variance < ROUNDING**2 or min(units) < 2:
        variance = 0.0
    return _Delong(auc(members, nonmembers), math.sqrt(variance), min(units))


def _logit_interval(value: float, standard_error: float, pairs: int, confidence: float) -> Estimate:
    if standard_error == 0 or value in (0.0, 1.0):
        return _interval_of_pairs(value, pairs, confidence)
    width = stats.norm.ppf((1 + confidence) / 2) * standard_error / (value * (1 - value))
    low, high = special.expit(special.logit(value) + np.array([-width, width]))
    return Estimate(value, float(low), float(high))


def _interval_of_pairs(value: float, pairs: int, confidence: float) -> Estimate:
    """Clopper–Pearson over disjoint pairs, a fractional count rounded outwards."""
    won = value * pairs
    low = clopper_pearson(math.floor(won + ROUNDING), pairs, confidence).low
    high = clopper_pearson(math.ceil(won - ROUNDING), pairs, confidence).high
    return Estimate(value, low, high)


@dataclass(frozen=True)
class _Sides:
    """Indices, or weights with one row a replicate, for the members and the non-members."""

    member: Integers
    nonmember: Integers


def _splits(
    member_folds: Labels, nonmember_folds: Labels, n_members: int, n_nonmembers: int
) -> list[_Sides]:
    """The positions of each fold's members and non-members."""
    both = np.concatenate([np.asarray(member_folds), np.asarray(nonmember_folds)])
    codes = label_codes(both, n_members + n_nonmembers, "folds")
    folds = [
        _Sides(np.flatnonzero(codes[:n_members] == fold), np.flatnonzero(codes[n_members:] == fold))
        for fold in range(int(codes.max()) + 1)
    ]
    if any(fold.member.size == 0 or fold.nonmember.size == 0 for fold in folds):
        raise ValueError("every fold needs members and non-members")
    return folds


def _resamples(
    member_codes: Integers, nonmember_codes: Integers, replicates: int, seed: int
) -> Iterator[_Sides]:
    """How often each record is drawn, in blocks of replicates, whole groups at a time."""
    rng = np.random.default_rng(seed)
    rows = max(1, RESAMPLED_ENTRIES // (member_codes.size + nonmember_codes.size))
    for start in range(0, replicates, rows):
        block = min(rows, replicates - start)
        yield _Sides(
            _draw_counts(rng, member_codes, block), _draw_counts(rng, nonmember_codes, block)
        )


def _draw_counts(rng: np.random.Generator, codes: Integers, rows: int) -> Integers:
    groups = int(codes.max()) + 1
    drawn = rng.integers(groups, size=(rows, groups), dtype=np.int64)
    drawn += np.arange(rows)[:, None] * groups
    counts = np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups)
    return counts if groups == codes.size else counts[:, codes]


def _weighted_auc(drawn: _Sides, below: Integers, not_above: Integers) -> Floats:
    """One AUC a row; both sides ascending, `below`/`not_above` each member's place."""
    ahead = _counts_before(drawn.nonmember)
    wins = np.einsum("ij,ij->i", drawn.member, ahead[:, below]).astype(np.float64)
    if (tied := np.flatnonzero(not_above > below)).size:
        ties = ahead[:, not_above[tied]] - ahead[:, below[tied]]
        wins += np.einsum("ij,ij->i", drawn.member[:, tied], ties) / 2
    return np.asarray(wins / drawn.member.sum(axis=1) / ahead[:, -1], dtype=np.float64)


def _counts_before(counts: Integers) -> Integers:
    """Sums of the first 0, 1, … entries of each row; one column more than `counts`."""
    before = np.zeros((len(counts), counts.shape[1] + 1), np.int64)
    np.cumsum(counts, axis=1, out=before[:, 1:])
    return before


def _too_few(n_controls: int, fpr: float) -> Unresolvable | None:
    if not 0 < fpr < 1:
        raise ValueError(f"the false-positive rate must lie between 0 and 1, not {fpr}")
    needed = math.ceil(1 / fpr - 1 - ROUNDING)
    if n_controls >= needed:
        return None
    return Unresolvable(f"TPR at {fpr:.3g} FPR needs {needed} controls; there are {n_controls}")


def _calibrated_threshold(controls: Floats, fpr: float) -> float:
    k = math.floor(fpr * (controls.size + 1) + ROUNDING)
    return float(np.sort(controls)[-k])
