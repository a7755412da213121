"""An estimate with its interval, and intervals of a proportion: over records, over groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from lightleak.statistics.arrays import Labels, label_codes


@dataclass(frozen=True)
class Estimate:
    """A number and how sure one may be of it; `low` and `high` bound a two-sided interval."""

    value: float
    low: float
    high: float


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Estimate:
    """The share of successes with its exact two-sided interval.

    Source: Clopper and Pearson (1934), Biometrika 26:404.

    Raises:
        ValueError: no trials, or successes outside 0 … trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials make no proportion")
    return _beta_interval(successes, trials, confidence)


def korn_graubard(success: npt.ArrayLike, groups: Labels, confidence: float = 0.95) -> Estimate:
    """The share of successes, one true or false for each record, with an interval over groups.

    Clopper–Pearson's at n*, the number of independent records that the n are worth: n over the
    design effect, that is the variance of the share between groups over that between records,
    times a factor for the few degrees of freedom of the former; never more than n. Where all
    records succeed, none does, or there is one group, no variance can be seen, and n* is what it
    is if the records of a group always agree: the number of groups, less where sizes differ.

    Source: Korn and Graubard (1998), Survey Methodology 24:193; without variance Kish (1965),
    Survey Sampling.

    Raises:
        ValueError: no records, or not one group for each.
    """
    passed = np.asarray(success, dtype=np.float64)
    if passed.size == 0:
        raise ValueError("no records make no proportion")
    codes = label_codes(groups, passed.size, "groups")
    n, share, sizes = passed.size, float(passed.mean()), np.bincount(codes)
    if share in (0.0, 1.0) or sizes.size == 1:
        worth = n**2 / float((sizes**2).sum())
        return _beta_interval(share * worth, worth, confidence)
    freedom = sizes.size - 1
    between = float((np.bincount(codes, weights=passed - share) ** 2).sum()) / n**2
    design_effect = between * sizes.size / freedom / (share * (1 - share) / (n - 1))
    tail = (1 + confidence) / 2
    few_groups = float(stats.t.ppf(tail, freedom) / stats.t.ppf(tail, n - 1)) ** 2
    worth = n / max(1.0, design_effect * few_groups)
    return _beta_interval(share * worth, worth, confidence)


def _beta_interval(successes: float, trials: float, confidence: float) -> Estimate:
    """Clopper–Pearson's interval; counts need not be whole."""
    tail = (1 - confidence) / 2
    failures = trials - successes
    low = 0.0 if successes == 0 else float(stats.beta.ppf(tail, successes, failures + 1))
    high = 1.0 if failures == 0 else float(stats.beta.ppf(1 - tail, successes + 1, failures))
    return Estimate(successes / trials, low, high)
