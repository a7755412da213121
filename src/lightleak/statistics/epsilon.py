"""Privacy lost, from below: what one training run with canaries drawn by coin says of ε.

m canaries were each put in or left out with probability ½. An auditor guesses about r of them and
is right v times; how many to guess, and which, was fixed before the truth was looked at.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from scipy import optimize, special, stats

# Lower bounds are resolved to this much.
RESOLUTION = 1e-7


def epsilon_lower_bound(
    m: int, r: int, v: int, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """The largest ε for which (ε, δ)-differential privacy is refuted; 0 where none is.

    Against such a model each guess is right with probability at most q = e^ε/(1 + e^ε), but for
    what δ allows: P[v or more right] ≤ β + 2mδα, with β = P[Bin(r, q) ≥ v] and
    α = max over 1 ≤ i ≤ v of P[v − i ≤ Bin(r, q) < v]/i.

    Source: Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, theorem 5.2.

    Raises:
        ValueError: not 0 ≤ v ≤ r ≤ m with r ≥ 1, `delta` not in [0, 1), `confidence` not in (0, 1).
    """
    _check(m, r, v, delta, confidence)
    if v == 0:
        return 0.0

    def p_value_above_level(epsilon: float) -> float:
        q = special.expit(epsilon)
        fewer = np.cumsum(stats.binom.pmf(np.arange(v - 1, -1, -1), r, q))
        alpha = float((fewer / np.arange(1, v + 1)).max())
        return float(stats.binom.sf(v - 1, r, q)) + 2 * m * delta * alpha - (1 - confidence)

    # Without δ the bound is Clopper–Pearson's of q; with it, less.
    most = float(special.logit(stats.beta.ppf(1 - confidence, v, r - v + 1)))
    if delta == 0 or most <= 0:
        return max(0.0, most)
    if p_value_above_level(0.0) >= 0:
        return 0.0
    if p_value_above_level(most) <= 0:
        return most
    return float(optimize.brentq(p_value_above_level, 0.0, most, xtol=RESOLUTION))


def gaussian_mu_lower_bound(m: int, r: int, v: int, confidence: float = 0.95) -> float:
    """The largest μ for which μ-Gaussian differential privacy is refuted; 0 where none is.

    Were the model μ-private and v right guesses as likely as the level, the chances of being
    right and wrong (at the v-th right guess, the one before, …) would grow by its trade-off
    function until they exceed the share r/m of canaries guessed about.

    Source: Mahloujifar, Melis and Chaudhuri 2024, arXiv:2410.22235, algorithm 3.

    Raises:
        ValueError: not 0 ≤ v ≤ r ≤ m with r ≥ 1, or `confidence` not in (0, 1).
    """
    _check(m, r, v, 0.0, confidence)
    normal, level = NormalDist(), 1 - confidence

    def refuted(mu: float) -> bool:
        right, wrong = level * v / m, level * (r - v) / m
        for i in range(v - 1, -1, -1):
            grown = max(wrong, normal.cdf(normal.inv_cdf(right) - mu))
            right += i / (r - i) * (grown - wrong)
            wrong = grown
            if right + wrong >= r / m:
                return True
        return False

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > RESOLUTION:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def epsilon_of_gaussian(mu: float, delta: float) -> float:
    """The least ε for which μ-Gaussian privacy implies (ε, δ)-differential privacy.

    Solves δ = Φ(−ε/μ + μ/2) − e^ε Φ(−ε/μ − μ/2).

    Source: Dong, Roth and Su (2022), J. R. Stat. Soc. B 84:3, corollary 2.13.

    Raises:
        ValueError: `mu` negative or not finite, or `delta` not in [0, 1).
    """
    if not (0 <= mu < math.inf and 0 <= delta < 1):
        raise ValueError(f"mu {mu} must be finite and at least 0, delta {delta} in [0, 1)")
    if mu == 0:
        return 0.0
    if delta == 0:
        return math.inf

    def excess(epsilon: float) -> float:
        without, given = special.log_ndtr(np.array([mu / 2, -mu / 2]) - epsilon / mu)
        return math.exp(without) - math.exp(epsilon + given) - delta

    if excess(0.0) <= 0:
        return 0.0
    # The first term alone reaches δ here.
    return float(optimize.brentq(excess, 0.0, mu * (mu / 2 - special.ndtri(delta))))


def _check(m: int, r: int, v: int, delta: float, confidence: float) -> None:
    if not (1 <= r <= m and 0 <= v <= r):
        raise ValueError(f"{v} right of {r} guesses about {m} canaries are impossible")
    if not (0 <= delta < 1 and 0 < confidence < 1):
        raise ValueError(f"delta {delta} must lie in [0, 1), confidence {confidence} in (0, 1)")
