"""LiRA: is the target's loss on a record like that of models which saw it, or of those without?"""

from typing import Literal

import numpy as np
from scipy.stats import norm

from lightleak.evidence.readings import Floats, ReferenceLosses, mean_where
from lightleak.signals.registry import signal

# With fewer references on one side, the paper's variance is that of all records together.
_ENOUGH_TO_VARY = 32


@signal(
    needs=ReferenceLosses,
    source="Carlini et al. 2022, arXiv:2112.03570",
    unscorable="too few references read it",
)
def lira(models: ReferenceLosses, *, mode: Literal["auto", "online", "offline"] = "auto") -> Floats:
    """Likelihood ratio of φ = log p/(1 − p), p = exp(mean_t log p_t), under two normal fits.

    `online`: log N(φ; μ_in, σ_in) − log N(φ; μ_out, σ_out); `offline`: (φ − μ_out)/σ_out, which
    ranks as the published Φ of it; `auto`: online where every record has references with it and
    without it. σ² is pooled over records below 64 references.
    """
    own, others = logit(models.loss), logit(models.reference_losses)
    mean_out, spread_out = _normal(others, ~models.seen)
    if mode == "offline" or (mode == "auto" and not models.paired):
        return np.asarray((own - mean_out) / spread_out)
    mean_in, spread_in = _normal(others, models.seen)
    inside, outside = norm.logpdf(own, mean_in, spread_in), norm.logpdf(own, mean_out, spread_out)
    return np.asarray(inside - outside)


def logit(loglikelihood: Floats) -> Floats:
    """log p − log(1 − p) of p = exp(log-likelihood), which is below 1."""
    tiny = np.finfo(np.float64).tiny
    return np.asarray(loglikelihood - np.log(np.maximum(-np.expm1(loglikelihood), tiny)))


def _normal(values: Floats, chosen: np.ndarray) -> tuple[Floats, Floats]:
    """Mean (n,) and spread (n,) or (1,) of the chosen of (k, n) values; NaN where there is none."""
    chosen = chosen & np.isfinite(values)
    count = chosen.sum(0)
    mean = mean_where(values, chosen)
    squares = np.where(chosen, (values - mean) ** 2, 0.0).sum(0)
    if count.size and count.min() >= _ENOUGH_TO_VARY:
        return mean, np.sqrt(squares / (count - 1))
    freedom = np.maximum(count - 1, 0).sum()
    if not freedom:
        return np.full_like(mean, np.nan), np.full(1, np.nan)
    return mean, np.sqrt(np.full(1, squares.sum() / freedom))
