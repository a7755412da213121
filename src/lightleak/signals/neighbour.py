"""Neighbour: a text that was trained on lies in a dip of the loss, and its neighbours do not."""

from lightleak.evidence.readings import Floats, NeighbourLosses
from lightleak.signals.registry import signal


@signal(
    needs=NeighbourLosses,
    source="Mattern et al. 2023, arXiv:2305.18462; Emelyanov et al. 2025, arXiv:2512.02786",
    unscorable="its text has a single word, or a changed text could not be read",
)
def neighbour(losses: NeighbourLosses) -> Floats:
    """Mean loss of texts a few words away, less the loss of the record's own."""
    return losses.neighbours.mean() - losses.own
