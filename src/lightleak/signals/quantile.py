"""Quantile regression: how far the loss lies above what non-members of its kind rarely pass."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from sklearn.linear_model import QuantileRegressor

from lightleak.evidence.readings import Floats, TokenStatistics
from lightleak.signals.registry import Fit, signal

# Fewer would each bend the quantile; more make three numbers no better, at a cost that is squared.
_FEWEST, _MOST = 20, 4000


@signal(
    needs=TokenStatistics,
    source="Bertran et al. 2023, arXiv:2307.03694",
    fitted=True,
    unscorable="too few controls to fit on, or the answer has no token",
)
def quantile(
    tokens: TokenStatistics,
    fits: Sequence[Fit],
    *,
    level: Literal["0.5", "0.75", "0.9", "0.95", "0.99"] = "0.9",
) -> Floats:
    """Mean log-likelihood, less the quantile `level` = 1 − α that non-members like it have.

    The quantile is linear in the logarithms of T, the answer's tokens, and of the text's bytes
    after zlib; it is fitted on the controls of other folds, never on suspects.
    """
    loss = tokens.logprob.mean()
    known = np.stack([np.maximum(tokens.logprob.lengths, 1), tokens.zlib_bytes], axis=1)
    features = np.log(known)
    usable = np.isfinite(loss)
    scores = np.full(len(loss), np.nan)
    for fit in fits:
        outside, scored = np.flatnonzero(fit.nonmembers & usable), fit.scored & usable
        if len(outside) >= _FEWEST and scored.any():
            some = outside[:: -(-len(outside) // _MOST)]
            plane = QuantileRegressor(quantile=float(level), alpha=0)
            plane.fit(features[some], loss[some])
            scores[scored] = loss[scored] - plane.predict(features[scored])
    return scores
