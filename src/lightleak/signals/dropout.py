"""Dropout: a pair that was learnt holds together when attention weights are dropped."""

import numpy as np

from lightleak.evidence.readings import DropoutCosines, Floats
from lightleak.signals.registry import signal


@signal(
    needs=DropoutCosines,
    source="Gomez 2026, doi:10.1609/aaai.v40i25.39276",
    unscorable="the model's attention takes no dropout",
)
def dropout(pairs: DropoutCosines) -> Floats:
    """Negative variance of the cosine over passes under attention dropout."""
    if pairs.cosines.shape[1] < 2:
        return np.full(len(pairs.cosines), np.nan)
    variance: Floats = pairs.cosines.var(axis=1, ddof=1)
    return -variance
