"""The residual test: do scores tell suspects from controls beyond what the records show?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn.base import BaseEstimator, clone
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lightleak.statistics.arrays import Booleans, Floats, Integers, Labels, label_codes, score_array


@dataclass(frozen=True)
class ResidualTest:
    """The adjusted test.

    Attributes:
        p_value: one-sided, the largest over the families.
        statistic_by_family: standard normal under the null, high when suspects score higher.
        p_by_family: the one-sided p-value of each.
    """

    p_value: float
    statistic_by_family: Mapping[str, float]
    p_by_family: Mapping[str, float]


@dataclass(frozen=True)
class _Family:
    """How a family of models predicts the side, and the score, from the features."""

    side: BaseEstimator
    score: BaseEstimator


def residual_test(
    scores: npt.ArrayLike,
    is_suspect: npt.ArrayLike,
    features: npt.ArrayLike,
    *,
    groups: Labels | None = None,
    seed: int,
    folds: int = 5,
) -> ResidualTest:
    """The generalised covariance measure: is a score associated with the side, given X?

    With ê(X) ≈ P(suspect | X) and m̂(X) ≈ E[score | X] fitted on other folds,
    R = (y − ê(X))(s − m̂(X)), summed over each group, and T = √G · mean(R)/sd(R). Two families
    of models must agree: the larger p-value counts, because either alone leaves dependence on X
    that the other catches.

    The level holds as far as one family learns how X drives the score. Strong curves and
    interactions among many features, at a few hundred records, are learnt by neither; what is
    left of them counts as evidence, and the test rejects too often.

    Args:
        scores: one for each record, higher = more member-like; shape (n,).
        is_suspect: shape (n,).
        features: what can be known about a record without the target; shape (n, d), d may be 0.
        groups: what is sampled together; kept in one fold, and one unit of the statistic.
        seed: of the folds and of the trees.
        folds: lowered to the number of groups on the smaller side.

    Source: Shah and Peters (2020), Ann. Stat. 48:1514, section 3.

    Raises:
        ValueError: NaN, shapes that do not match, or fewer than two groups on a side.
    """
    values = score_array(scores, "scores")
    side = np.asarray(is_suspect, dtype=bool)
    columns = np.asarray(features, dtype=np.float64)
    if side.shape != values.shape or columns.ndim != 2 or len(columns) != values.size:
        raise ValueError("is_suspect and features need one row for each score")
    if np.isnan(columns).any():
        raise ValueError("features hold NaN")
    codes = label_codes(groups, values.size, "groups")
    # Without features the models predict the mean; a constant column lets them.
    columns = np.column_stack([columns, np.zeros(values.size)]) if not columns.shape[1] else columns
    parts = _folds(side, codes, folds, seed)
    statistics = {
        name: _statistic(family, values, side, columns, codes, parts)
        for name, family in _families(seed).items()
    }
    p_values = {name: float(stats.norm.sf(value)) for name, value in statistics.items()}
    return ResidualTest(
        p_value=max(p_values.values()),
        statistic_by_family=statistics,
        p_by_family=p_values,
    )


def _families(seed: int) -> dict[str, _Family]:
    trees = {
        "learning_rate": 0.1,
        "max_iter": 100,
        "max_leaf_nodes": 8,
        "early_stopping": False,
        "random_state": seed,
    }
    return {
        "linear": _Family(
            side=make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
            score=make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(-1, 4, 11))),
        ),
        "trees": _Family(
            side=HistGradientBoostingClassifier(**trees),
            score=HistGradientBoostingRegressor(**trees),
        ),
    }


def _folds(side: Booleans, codes: Integers, folds: int, seed: int) -> list[Integers]:
    """Test rows of each fold; groups stay whole and both sides appear in proportion."""
    smaller = min(np.unique(codes[side]).size, np.unique(codes[~side]).size)
    if smaller < 2:
        raise ValueError("the residual test needs at least two groups on each side")
    # Without groups the plain splitter gives the same balance, without a pass over each group.
    grouped = np.unique(codes).size < codes.size
    kind = StratifiedGroupKFold if grouped else StratifiedKFold
    splitter = kind(min(folds, smaller), shuffle=True, random_state=seed)
    return [test for _, test in splitter.split(codes, side, codes if grouped else None)]


def _statistic(
    family: _Family,
    scores: Floats,
    side: Booleans,
    features: Floats,
    codes: Integers,
    parts: list[Integers],
) -> float:
    residuals = np.empty(scores.size)
    for test in parts:
        train = np.setdiff1d(np.arange(scores.size), test)
        predicted_side = clone(family.side).fit(features[train], side[train])
        predicted_score = clone(family.score).fit(features[train], scores[train])
        expected = predicted_side.predict_proba(features[test])[:, 1]
        residuals[test] = (side[test] - expected) * (
            scores[test] - predicted_score.predict(features[test])
        )
    sums = np.bincount(codes, weights=residuals)
    deviation = sums.std(ddof=1)
    # Constant scores leave no residual, hence no evidence.
    return float(np.sqrt(sums.size) * sums.mean() / deviation) if deviation > 0 else -np.inf
