"""What an audit could have detected, before and after it is run."""

from __future__ import annotations

import math

from scipy import optimize, stats


def minimum_detectable_auc(
    n_suspect: int, n_control: int, alpha: float = 0.01, power: float = 0.9
) -> float:
    """The least AUC that a one-sided Mann–Whitney test at `alpha` finds with probability `power`.

    Solves A = ½ + z₁₋α σ₀ + z_power σ(A) with the null variance σ₀² = (n₁ + n₀ + 1)/(12 n₁ n₀) and
    Hanley–McNeil's variance at A. `math.inf` when the sets are too small for any AUC.

    Source: Hanley and McNeil (1982), Radiology 143:29, equation 1.

    Raises:
        ValueError: an empty set, `alpha` not in (0, ½), or `power` not in [½, 1).
    """
    if min(n_suspect, n_control) < 1:
        raise ValueError("power needs at least one suspect and one control")
    if not 0 < alpha < 0.5 <= power < 1:
        raise ValueError("alpha must lie in (0, 0.5) and power in [0.5, 1)")
    null_deviation = math.sqrt((n_suspect + n_control + 1) / (12 * n_suspect * n_control))
    critical = 0.5 + stats.norm.isf(alpha) * null_deviation

    def shortfall(auc: float) -> float:
        deviation = math.sqrt(_variance(auc, n_suspect, n_control))
        return float(critical + stats.norm.ppf(power) * deviation - auc)

    if shortfall(1.0) >= 0:
        return math.inf
    return float(optimize.brentq(shortfall, 0.5, 1.0))


def minimum_set_size(
    auc: float, *, controls_per_suspect: float = 1.0, alpha: float = 0.05, power: float = 0.9
) -> int:
    """The fewest suspects with which an `auc` is detected, given so many controls for each.

    Raises:
        ValueError: `auc` not in (½, 1], or `controls_per_suspect` not positive.
    """
    if not 0.5 < auc <= 1 or controls_per_suspect <= 0:
        raise ValueError("auc must lie in (0.5, 1], and controls_per_suspect above 0")

    def enough(suspects: int) -> bool:
        controls = math.ceil(suspects * controls_per_suspect)
        return minimum_detectable_auc(suspects, controls, alpha, power) <= auc

    high = 1
    while not enough(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _variance(auc: float, n_suspect: int, n_control: int) -> float:
    two_suspects = auc / (2 - auc)
    two_controls = 2 * auc**2 / (1 + auc)
    return (
        auc * (1 - auc)
        + (n_suspect - 1) * (two_suspects - auc**2)
        + (n_control - 1) * (two_controls - auc**2)
    ) / (n_suspect * n_control)
