"""Signature: many readings of one record, taken together as training leaves them.

Two ways to learn what training leaves. With references, models that the auditor trained on known
halves of the same records, each in turn is the pretended target. Without, the suspects and controls
of other folds are told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from lightleak.evidence.readings import Floats, ModelReadings, mean_where
from lightleak.signals.registry import Fit, signal

_FEWEST = 10
# scikit-learn's C, chosen on other seeds than those reported; flat over a factor of ten either way.
_FROM_FOLDS, _FROM_REFERENCES = 0.1, 0.01


@signal(
    needs=ModelReadings,
    source="lightleak, docs/research/signature.md",
    fitted=True,
    unscorable="a reading is missing, or there is too little to learn from",
)
def signature(models: ModelReadings, fits: Sequence[Fit]) -> Floats:
    """Log-odds of membership by a penalised logistic model of all readings together.

    With references it learns from them which of their readings go with membership, and no label
    of the audited records enters; without, from suspects and controls of other folds.
    """
    if len(models.references):
        return _taught(models)
    features = models.own
    if models.base is not None:
        features = np.hstack([features, models.base, models.own - models.base])
    features = features[:, _read(features)]
    usable = np.isfinite(features).all(axis=1) & np.isfinite(models.loss)
    scores = np.full(len(features), np.nan)
    for fit in fits:
        known, scored = (fit.members | fit.nonmembers) & usable, fit.scored & usable
        if min((fit.members & usable).sum(), (fit.nonmembers & usable).sum()) >= _FEWEST:
            learnt = _learn(features[known], fit.members[known], _FROM_FOLDS)
            scores[scored] = learnt.decision_function(features[scored])
    return scores


def _taught(models: ModelReadings) -> Floats:
    """Log-odds learnt on each reference against the others, applied to the target against all."""
    scores = np.full(len(models.own), np.nan)
    # An adapter's matrices are read where there is one: not at a base, say.
    shared = np.logical_and.reduce([_read(each) for each in (models.own, *models.references)])
    if not shared.any():
        return scores
    models = replace(
        models,
        own=_standardised(models.own[:, shared]),
        references=np.stack([_standardised(each[:, shared]) for each in models.references]),
    )
    count = len(models.references)
    examples, labels = [], []
    for one in range(count):
        others = np.arange(count) != one
        examples.append(_compared(models.references[one], models, others))
        labels.append(models.seen[one])
    features, seen = np.concatenate(examples), np.concatenate(labels)
    own = _compared(models.own, models, np.ones(count, bool))
    known, usable = np.isfinite(features).all(axis=1), np.isfinite(own).all(axis=1)
    if min(seen[known].sum(), (~seen[known]).sum()) >= _FEWEST and usable.any():
        learnt = _learn(features[known], seen[known], _FROM_REFERENCES)
        scores[usable] = learnt.decision_function(own[usable])
    return scores


def _read(values: Floats) -> NDArray[np.bool_]:
    """(d,) which readings there are at all."""
    return np.asarray(np.isfinite(values).any(axis=0))


def _standardised(values: Floats) -> Floats:
    """Each reading over its own model's records: models trained otherwise differ in scale."""
    spread = np.nanstd(values, axis=0)
    return np.asarray((values - np.nanmean(values, axis=0)) / np.where(spread > 0, spread, 1.0))


def _compared(readings: Floats, models: ModelReadings, others: NDArray[np.bool_]) -> Floats:
    """(n, 3d): readings f; f − mean without the record; mean with it − mean without it."""
    chosen, seen = others[:, None, None], models.seen[:, :, None]
    without = mean_where(models.references, chosen & ~seen)
    inside = mean_where(models.references, chosen & seen)
    return np.hstack([readings, readings - without, inside - without])


def _learn(features: Floats, members: NDArray[np.bool_], strength: float) -> Pipeline:
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
    learnt: Pipeline = make_pipeline(StandardScaler(), model).fit(features, members)
    return learnt
