"""Ratio: how much better the target knows a record than a model that never saw it."""

from lightleak.evidence.readings import Floats, OtherLosses
from lightleak.signals.registry import signal


@signal(
    needs=OtherLosses,
    source="Carlini et al. 2021, arXiv:2012.07805",
    unscorable="another model could not read it",
)
def ratio(models: OtherLosses) -> Floats:
    """Mean log-likelihood at the target, less that at the base or at references without it."""
    return models.loss - models.unseen_loss
