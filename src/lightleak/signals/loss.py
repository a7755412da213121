"""Loss: training drives the loss on what was trained on down."""

from lightleak.evidence.readings import Floats, TokenStatistics
from lightleak.signals.registry import signal


@signal(needs=TokenStatistics, source="Yeom et al. 2018, arXiv:1709.01604")
def loss(tokens: TokenStatistics) -> Floats:
    """Mean log-likelihood of the answer's tokens: mean_t log p_t(y_t)."""
    return tokens.logprob.mean()
