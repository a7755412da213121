"""An estimate with its interval, and the exact interval of a proportion."""

from __future__ import annotations

from dataclasses import dataclass

from scipy import stats


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
    tail = (1 - confidence) / 2
    failures = trials - successes
    low = 0.0 if successes == 0 else float(stats.beta.ppf(tail, successes, failures + 1))
    high = 1.0 if failures == 0 else float(stats.beta.ppf(1 - tail, successes + 1, failures))
    return Estimate(successes / trials, low, high)
