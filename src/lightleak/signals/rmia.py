"""RMIA: a record's likelihood ratio, ranked among those of records that are known to be outside."""

import numpy as np

from lightleak.evidence.readings import Floats, OtherLosses
from lightleak.signals.registry import signal


@signal(
    needs=OtherLosses,
    source="Zarifzadeh, Liu and Shokri 2024, arXiv:2312.03262",
    unscorable="another model could not read it",
)
def rmia(models: OtherLosses, *, gamma: float = 2.0, a: float = 0.3) -> Floats:
    """Share of the controls z with [p(x)/p̄(x)] / [p(z)/p̄(z)] ≥ gamma, p = exp(mean_t log p_t).

    Of records with equal shares the one with the larger ratio comes first: γ = 2 is the published
    choice, but few sequences are twice as likely as expected. p̄ is the mean of p with and without
    the record in training; where not every record has both kinds of references,
    ((1 + a)·p̄_out + 1 − a)/2 for all of them, as published.
    """
    unseen = models.mean_probability(seen=False)
    if models.paired:
        average = (models.mean_probability(seen=True) + unseen) / 2
    else:
        average = ((1 + a) * unseen + 1 - a) / 2
    ratio = np.exp(models.loss) / average
    others = ratio[models.control & np.isfinite(ratio)]
    if not len(others):
        return np.full(len(ratio), np.nan)
    share = np.searchsorted(np.sort(others), ratio / gamma, side="right") / len(others)
    # Far less than the share of one control.
    return np.where(np.isfinite(ratio), share + 1e-9 * ratio / (1 + ratio), np.nan)
