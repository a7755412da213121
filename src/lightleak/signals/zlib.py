"""Zlib: the loss, set against how compressible the text is by itself."""

from lightleak.evidence.readings import Floats, TokenStatistics
from lightleak.signals.registry import signal


@signal(needs=TokenStatistics, source="Carlini et al. 2021, arXiv:2012.07805")
def zlib(tokens: TokenStatistics) -> Floats:
    """Mean log-likelihood over the text's length in bytes after zlib."""
    return tokens.logprob.mean() / tokens.zlib_bytes
