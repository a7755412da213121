"""Augmented divergence: what was learnt by heart is said whatever is done to the image."""

from lightleak.evidence.readings import AugmentedDivergences, Floats
from lightleak.signals.registry import signal


@signal(
    needs=AugmentedDivergences,
    source="Li et al. 2024, arXiv:2411.02902",
    unscorable="a changed image could not be read",
)
def aug_kl(evidence: AugmentedDivergences) -> Floats:
    """−mean_k KL(p‖p_k): how little the answer's distributions change with the image."""
    mean: Floats = evidence.divergences.mean(axis=1)
    return -mean
