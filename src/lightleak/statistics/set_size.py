"""How many suspects would have been enough: p against the size of the set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from lightleak.statistics.arrays import Floats, Integers, Labels, label_codes, score_array


@dataclass(frozen=True)
class SetSizeCurve:
    """What random subsets of the suspects yield against all controls; vectors of one length.

    Attributes:
        sizes: how many groups of suspects.
        p_median: the one-sided p-value, its median over the subsets.
        p_low: its lower quartile.
        p_high: its upper quartile.
        found: the share of subsets with p ≤ alpha.
    """

    sizes: Integers
    p_median: Floats
    p_low: Floats
    p_high: Floats
    found: Floats


def set_size_curve(
    scores: npt.ArrayLike,
    is_suspect: npt.ArrayLike,
    *,
    groups: Labels | None = None,
    sizes: Sequence[int] | None = None,
    seed: int,
    draws: int = 200,
    alpha: float = 0.01,
) -> SetSizeCurve:
    """The p-value that fewer suspects would have yielded, with the controls as they are.

    The test is the permutation test over groups in its normal approximation, on the ranks among
    all records; with all suspects and no groups it is Mann–Whitney's z with correction for ties.
    A group found on both sides counts as two. Subsets near the full size are nearly the same,
    so the quartiles close in there: they show what chance of the draw adds, not the error of the
    whole set.

    Args:
        scores: one for each record, higher = more member-like; shape (n,).
        is_suspect: shape (n,).
        groups: what is sampled together, and drawn together.
        sizes: numbers of suspect groups; ten from 10 to all, evenly on a log scale.
        seed: of the subsets.
        draws: subsets of each size; one draw's subsets are nested.
        alpha: of `found`.

    Source: Hájek, Šidák and Sen (1999), Theory of Rank Tests, for the mean and variance of a linear
    statistic under permutation.

    Raises:
        ValueError: NaN, shapes that do not match, a side without records, or a size that is not
            between 1 and the number of suspect groups.
    """
    values, side = score_array(scores, "scores"), np.asarray(is_suspect, dtype=bool)
    if side.shape != values.shape or side.all() or not side.any():
        raise ValueError("is_suspect needs one entry for each score, and both kinds")
    codes = label_codes(groups, values.size, "groups")
    ranks = stats.rankdata(values) / values.size
    suspects, controls = _moments(ranks[side], codes[side]), _moments(ranks[~side], codes[~side])
    n_groups = len(suspects)
    if sizes is None:
        sizes = np.geomspace(min(10, n_groups), n_groups, 10).round().astype(int).tolist()
    taken = np.unique(np.asarray(sizes, dtype=np.int64))
    if not taken.size or taken[0] < 1 or taken[-1] > n_groups:
        raise ValueError(f"sizes must lie between 1 and the {n_groups} groups of suspects")
    rng = np.random.default_rng(seed)
    p_values = np.empty((draws, taken.size))
    starts = np.append(0, taken[:-1])
    for draw in p_values:
        drawn = suspects[rng.permutation(n_groups)[: taken[-1]]]
        draw[:] = _p_values(np.add.reduceat(drawn, starts).cumsum(axis=0), taken, controls)
    low, median, high = np.quantile(p_values, [0.25, 0.5, 0.75], axis=0)
    return SetSizeCurve(taken, median, low, high, (p_values <= alpha).mean(axis=0))


def _moments(ranks: Floats, codes: Integers) -> Floats:
    """Of each group: records n, rank sum r, and r², rn, n²; shape (groups, 5)."""
    size, total = np.bincount(codes).astype(np.float64), np.bincount(codes, weights=ranks)
    size, total = size[size > 0], total[size > 0]
    return np.column_stack([size, total, total**2, total * size, size**2])


def _p_values(subsets: Floats, taken: Integers, controls: Floats) -> Floats:
    """One a row of summed moments.

    A group adds y = r − n·m, m the mean rank of subset and controls; their sum over all groups is
    nil. Were `taken` of all groups drawn at random, the sum of their y would have mean nil and
    the variance of a sample without replacement.
    """
    both = subsets + controls.sum(axis=0)
    mean = both[:, 1] / both[:, 0]
    observed = subsets[:, 1] - subsets[:, 0] * mean
    squares = both[:, 2] - 2 * mean * both[:, 3] + mean**2 * both[:, 4]
    n_groups = taken + len(controls)
    variance = taken * len(controls) * squares / (n_groups * (n_groups - 1))
    # Constant scores leave rounding errors of either sign, and no evidence.
    moves = variance > 1e-12
    z = np.divide(observed, np.sqrt(np.abs(variance)), out=np.full(mean.size, -np.inf), where=moves)
    return np.asarray(stats.norm.sf(z), dtype=np.float64)
