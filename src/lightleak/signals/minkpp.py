"""Min-K %++: Min-K % on log-likelihoods standardised by the whole next-token distribution."""

import numpy as np

from lightleak.evidence.readings import Floats, TokenStatistics
from lightleak.signals.registry import signal


def standardised(logprob: Floats, mean: Floats, variance: Floats) -> Floats:
    """(ℓ_t − μ_t)/σ_t; 0 where the distribution has no spread (ℓ_t = μ_t there)."""
    spread = np.sqrt(np.maximum(variance, 0.0))
    return np.divide(logprob - mean, spread, out=np.zeros_like(spread), where=spread > 0)


@signal(needs=TokenStatistics, source="Zhang et al. 2025, arXiv:2404.02936")
def minkpp(tokens: TokenStatistics, *, k: float = 0.2) -> Floats:
    """Mean of the lowest max(1, ⌊k·T⌋) standardised token log-likelihoods."""
    return tokens.logprob.map(standardised, tokens.mean, tokens.variance).mean_of_lowest(k)
