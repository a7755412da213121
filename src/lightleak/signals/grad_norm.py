"""Gradient norm: what was trained on has little left to teach."""

import numpy as np

from lightleak.evidence.readings import Floats, GradientNorms
from lightleak.signals.registry import signal


@signal(
    needs=GradientNorms,
    source="Nasr, Shokri and Houmansadr 2019, arXiv:1812.00910",
    unscorable="its gradient was not read",
)
def grad_norm(gradients: GradientNorms) -> Floats:
    """Negative Euclidean norm of the loss gradient over the selected matrices."""
    norm: Floats = np.linalg.norm(gradients.norms, axis=1)
    return -norm
