"""Min-K %: text that was not trained on holds a few tokens that surprise the model."""

from lightleak.evidence.readings import Floats, TokenStatistics
from lightleak.signals.registry import signal


@signal(needs=TokenStatistics, source="Shi et al. 2024, arXiv:2310.16789")
def mink(tokens: TokenStatistics, *, k: float = 0.2) -> Floats:
    """Mean of the lowest max(1, ⌊k·T⌋) token log-likelihoods."""
    return tokens.logprob.mean_of_lowest(k)
