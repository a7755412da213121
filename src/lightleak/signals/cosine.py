"""Cosine similarity: contrastive training pulls an image and its own text together."""

from lightleak.evidence.readings import Floats, PairEmbeddings
from lightleak.signals.registry import signal


@signal(
    needs=PairEmbeddings,
    source="Ko et al. 2023, arXiv:2310.00108",
    unscorable="an embedding is not finite",
)
def cosine(pairs: PairEmbeddings) -> Floats:
    """Cosine of the record's image and text embeddings."""
    return pairs.cosine
