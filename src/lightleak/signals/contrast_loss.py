"""Contrastive loss: what the model was trained to bring down, against negatives that never vary."""

from lightleak.evidence.readings import ContrastLoss, Floats
from lightleak.signals.registry import signal


@signal(
    needs=ContrastLoss,
    source="Radford et al. 2021, arXiv:2103.00020",
    unscorable="its loss is not finite",
)
def contrast_loss(contrast: ContrastLoss) -> Floats:
    """Negative InfoNCE (sigmoid loss for SigLIP) against one fixed bank of control pairs."""
    return -contrast.losses
