"""Weak supervision: learn from pairs that stand out what members look like."""

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression

from lightleak.evidence.readings import Floats, PairEmbeddings
from lightleak.signals.registry import Fit, signal

_FEWEST = 5


@signal(
    needs=PairEmbeddings,
    source="Ko et al. 2023, arXiv:2310.00108",
    fitted=True,
    unscorable="too few pairs stand out to learn from",
)
def weak(pairs: PairEmbeddings, fits: Sequence[Fit], *, spread: float = 1.5) -> Floats:
    """Log-odds of a classifier of [image; text] embeddings: pseudo-members against non-members.

    Pseudo-members are suspects of other folds whose cosine is at least μ + spread·σ of the known
    non-members; none of the records that a fit scores is part of it.
    """
    features = np.concatenate([pairs.image, pairs.text], axis=1).astype(np.float64)
    usable = np.isfinite(features).all(axis=1)
    cosine = pairs.cosine
    scores = np.full(len(cosine), np.nan)
    for fit in fits:
        nonmembers = fit.nonmembers & usable
        known = cosine[nonmembers]
        if len(known) < _FEWEST:
            continue
        standing_out = fit.members & (cosine >= known.mean() + spread * known.std())
        if standing_out.sum() < _FEWEST:
            continue
        chosen = standing_out | nonmembers
        classifier = LogisticRegression(class_weight="balanced", max_iter=1000)
        classifier.fit(features[chosen], standing_out[chosen])
        scored = fit.scored & usable
        scores[scored] = classifier.decision_function(features[scored])
    return scores
