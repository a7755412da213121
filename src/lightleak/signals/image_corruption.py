"""Image corruption: an image that the vision side was trained on is known in bad copies, too."""

from lightleak.evidence.readings import CorruptedEmbeddings, Floats
from lightleak.signals.registry import signal


@signal(
    needs=CorruptedEmbeddings,
    source="Wu et al. 2025, arXiv:2506.12340",
    unscorable="a corrupted image could not be read",
)
def image_corruption(evidence: CorruptedEmbeddings) -> Floats:
    """mean_c cos(E(x), E(c(x))): how little corruptions move the image's visual embedding."""
    mean: Floats = evidence.cosines.mean(axis=1)
    return mean
