"""Tests of a set: do the suspects score higher than the controls?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations, islice, product

import numpy as np
import numpy.typing as npt
from scipy import stats

from lightleak.statistics.arrays import (
    BLOCK_ENTRIES,
    Booleans,
    Floats,
    Integers,
    Labels,
    label_codes,
    score_array,
)

# Scipy knows no exact distribution with ties; up to this many assignments one can list them all.
EXACT_ASSIGNMENTS = 20_000


def mann_whitney(member: npt.ArrayLike, nonmember: npt.ArrayLike) -> float:
    """One-sided p-value that members score higher, over records as independent units.

    Exact for small sets, otherwise normal with correction for ties and continuity.

    Source: Mann and Whitney (1947), Ann. Math. Stat. 18:50.

    Raises:
        ValueError: an empty side, or NaN.
    """
    members, nonmembers = score_array(member, "member"), score_array(nonmember, "nonmember")
    pooled = np.concatenate([members, nonmembers])
    if math.comb(pooled.size, members.size) <= EXACT_ASSIGNMENTS:
        is_member = np.arange(pooled.size) < members.size
        return permutation_test(pooled, is_member, seed=0, permutations=EXACT_ASSIGNMENTS)
    if np.ptp(pooled) == 0:
        return 1.0
    return float(stats.mannwhitneyu(members, nonmembers, alternative="greater").pvalue)


def welch(member: npt.ArrayLike, nonmember: npt.ArrayLike) -> float:
    """One-sided p-value that members' mean score is higher, variances not assumed equal.

    1 where a side has one score or nothing varies.

    Source: Welch (1947), Biometrika 34:28.

    Raises:
        ValueError: an empty side, or NaN.
    """
    members, nonmembers = score_array(member, "member"), score_array(nonmember, "nonmember")
    if min(members.size, nonmembers.size) < 2:
        return 1.0
    # What differs in the last bits only does not vary.
    spread, size = max(np.ptp(members), np.ptp(nonmembers)), np.abs(members).max()
    if spread <= 1e-12 * size:
        return 1.0
    moments = [(each.mean(), each.std(ddof=1), each.size) for each in (members, nonmembers)]
    test = stats.ttest_ind_from_stats(
        *moments[0], *moments[1], equal_var=False, alternative="greater"
    )
    return float(test.pvalue)


def permutation_test(
    scores: npt.ArrayLike,
    is_member: npt.ArrayLike,
    *,
    groups: Labels | None = None,
    seed: int,
    permutations: int = 10_000,
) -> float:
    """One-sided p-value that members score higher, by permuting what was assigned.

    The statistic is the AUC. Labels move over the unit of assignment: a group that lies wholly on
    one side is one unit, and so is a record without a group; they trade labels with each other,
    the number of suspect units kept. A group with records on both sides cannot have been assigned
    whole: its records trade labels among themselves and with nobody else, as in a blocked design.

    All assignments are listed when there are at most `permutations` (the p-value is exact);
    otherwise `permutations` are drawn and p = (1 + count)/(permutations + 1).

    Source: Phipson and Smyth (2010), Stat. Appl. Genet. Mol. Biol. 9:39.

    Raises:
        ValueError: NaN, one side empty, or not one label and one group for each score.
    """
    values = score_array(scores, "scores")
    member = np.asarray(is_member, dtype=bool)
    if member.shape != values.shape or member.all() or not member.any():
        raise ValueError("is_member needs one entry for each score, and both kinds")
    units = _units(values, member, label_codes(groups, values.size, "groups"))
    rows = max(1, BLOCK_ENTRIES // units.is_member.size)
    exact = _count_assignments(units) <= permutations
    blocks = (
        _every_assignment(units, rows)
        if exact
        else _random_assignments(units, rows, permutations, seed)
    )
    observed = _aucs(units, units.is_member[None, :])[0]
    # Assignments with the same AUC may differ in the last bits, and count as reached.
    reached = np.concatenate([_aucs(units, block) >= observed - 1e-12 for block in blocks])
    if exact:
        return float(reached.mean())
    return float((1 + reached.sum()) / (permutations + 1))


def combine_splits(p_values: npt.ArrayLike) -> float:
    """One p-value from those of repeated random splits of the same data: min(1, 2 × median).

    Source: Meinshausen, Meier and Bühlmann (2009), JASA 104:1671, with γ = ½.

    Raises:
        ValueError: no p-values, or NaN.
    """
    return min(1.0, 2 * float(np.median(score_array(p_values, "p_values"))))


@dataclass(frozen=True)
class _Units:
    """What trades labels, strata lying one after the other: sums over the unit's records, its kind.

    Within a stratum, numbered 0, 1, …, units trade labels with each other.
    """

    rank_sum: Floats
    size: Floats
    is_member: Booleans
    stratum: Integers


def _units(scores: Floats, is_member: Booleans, groups: Integers) -> _Units:
    """Each straddling group is a stratum of its records; the last stratum holds whole groups."""
    members_in = np.bincount(groups, weights=is_member)
    straddles = ((members_in > 0) & (members_in < np.bincount(groups)))[groups]
    n = groups.size
    label = np.where(straddles, groups * n + np.arange(n), n * n + groups)
    _, first, unit = np.unique(label, return_index=True, return_inverse=True)
    return _Units(
        rank_sum=np.bincount(unit, weights=stats.rankdata(scores)).astype(np.float64),
        size=np.bincount(unit).astype(np.float64),
        is_member=is_member[first],
        stratum=label_codes(np.where(straddles, groups, n)[first], first.size, "strata"),
    )


def _aucs(units: _Units, labels: Booleans) -> Floats:
    """One AUC for each row of labels, shape (rows, units)."""
    sums = labels.astype(np.float64) @ np.column_stack([units.size, units.rank_sum])
    members, ranks = sums.T
    wins = ranks - members * (members + 1) / 2
    return np.asarray(wins / (members * (units.size.sum() - members)), dtype=np.float64)


def _sizes(units: _Units) -> tuple[Integers, Integers]:
    """Units, and suspects among them, in each stratum."""
    suspects = np.bincount(units.stratum, weights=units.is_member).astype(np.int64)
    return np.bincount(units.stratum), suspects


def _count_assignments(units: _Units) -> int:
    return math.prod(map(math.comb, *(each.tolist() for each in _sizes(units))))


def _every_assignment(units: _Units, rows: int) -> Iterator[Booleans]:
    sizes, suspects = _sizes(units)
    choices = product(
        *(
            combinations(range(end - size, end), chosen)
            for end, size, chosen in zip(sizes.cumsum(), sizes, suspects, strict=True)
        )
    )
    while block := [list(chain.from_iterable(choice)) for choice in islice(choices, rows)]:
        labels = np.zeros((len(block), units.is_member.size), dtype=bool)
        np.put_along_axis(labels, np.array(block), True, axis=1)
        yield labels


def _random_assignments(
    units: _Units, rows: int, permutations: int, seed: int
) -> Iterator[Booleans]:
    """In each stratum the units with the least random keys, as many as there are suspects."""
    rng = np.random.default_rng(seed)
    sizes, suspects = _sizes(units)
    # Only the last stratum may be without suspects; its cut is then the end of the one before.
    cuts = sizes.cumsum() - sizes + suspects - 1
    while permutations > 0:
        shape = min(rows, permutations), units.is_member.size
        keys = rng.integers(2**32, size=shape, dtype=np.uint32)
        if sizes.size == 1:
            # A tenth of the time of a shuffle.
            cut = np.partition(keys, cuts[0], axis=1)[:, cuts]
        else:
            keys = keys + (units.stratum << 32)
            cut = np.sort(keys, axis=1)[:, cuts[units.stratum]]
        labels = keys <= cut
        # Keys that tie at a cut, about once in 2³²/n rows, make one suspect too many.
        labels = labels[labels.sum(axis=1) == suspects.sum()]
        permutations -= len(labels)
        yield labels
