"""Min-K %++: Min-K % on log-likelihoods standardised by the whole next-token distribution."""

from lightleak.evidence.readings import Floats, TokenStatistics
from lightleak.signals.registry import signal


@signal(needs=TokenStatistics, source="Zhang et al. 2025, arXiv:2404.02936")
def minkpp(tokens: TokenStatistics, *, k: float = 0.2) -> Floats:
    """Mean of the lowest max(1, ⌊k·T⌋) standardised token log-likelihoods."""
    return tokens.standardised().mean_of_lowest(k)
