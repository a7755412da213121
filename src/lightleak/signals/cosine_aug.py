"""Augmentation-enhanced similarity: a trained pair loses more when its image is altered."""

from lightleak.evidence.readings import AugmentedCosines, Floats
from lightleak.signals.registry import signal


@signal(
    needs=AugmentedCosines,
    source="Ko et al. 2023, arXiv:2310.00108",
    unscorable="an embedding is not finite",
)
def cosine_aug(pairs: AugmentedCosines) -> Floats:
    """cos(x) + Σ_k [cos(x) − cos(aug_k x)] over fixed augmentations of the image."""
    score: Floats = pairs.plain + (pairs.plain[:, None] - pairs.augmented).sum(axis=1)
    return score
