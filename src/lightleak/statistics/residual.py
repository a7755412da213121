"""The residual test: do scores tell suspects from controls beyond what the records show?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special, stats
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lightleak.statistics.arrays import Booleans, Floats, Integers, Labels, label_codes, score_array

# Approximate p-values are not to be believed further out.
SMALLEST_P = 1e-6
# From here on two folds do.
MANY_RECORDS = 5_000


@dataclass(frozen=True)
class ResidualTest:
    """The adjusted test.

    Attributes:
        p_value: one-sided, the largest over the families.
        p_value_below: the same for suspects that score lower.
        statistic_by_family: standard normal under the null, high when suspects score higher.
        p_by_family: the one-sided p-value of each.
        robustness: share of what is left of both the side and the score that an unseen difference
            would have to explain for the statistic to be nought, by the weakest family; 0 where
            that is not above nought anyhow.
        effective_share: what the controls are worth, as a share of their number, once weighted by
            P(suspect | X)/P(control | X) to resemble the suspects; by the linear family.
    """

    p_value: float
    p_value_below: float
    statistic_by_family: Mapping[str, float]
    p_by_family: Mapping[str, float]
    robustness: float
    effective_share: float


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

    The level holds as far as one family learns how X drives side and score. Interactions and
    curves that drive both are learnt too little by either, at a few hundred records and at
    thousands; what is left of them counts as evidence, and the test rejects too often.
    p-values are Student's with as many degrees as groups carry the variance: few suspects, or
    few extreme scores, weigh less than their number.

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
    # Large sets learn enough from half, and trees are slow.
    parts = _folds(side, codes, folds if values.size < MANY_RECORDS else 2, seed)
    fits = {
        name: _cross_fit(family, values, side, columns, parts)
        for name, family in _families(seed).items()
    }
    sums: dict[str, Floats] = {
        name: np.bincount(codes, weights=(side - fit.side) * (values - fit.score)).astype(float)
        for name, fit in fits.items()
    }
    statistics = {name: _statistic(each) for name, each in sums.items()}
    freedom = {name: _weight(each) - 1 for name, each in sums.items()}
    p_values = {name: float(stats.t.sf(value, freedom[name])) for name, value in statistics.items()}
    return ResidualTest(
        p_value=max(p_values.values()),
        p_value_below=max(
            float(stats.t.cdf(value, freedom[name])) for name, value in statistics.items()
        ),
        statistic_by_family=statistics,
        p_by_family=p_values,
        robustness=_robustness(min(statistics.values()), np.unique(codes).size),
        effective_share=_effective_share(fits["linear"].side, side),
    )


def _families(seed: int) -> dict[str, _Family]:
    trees = {
        "learning_rate": 0.2,
        "max_iter": 40,
        "max_leaf_nodes": 6,
        "max_bins": 32,
        "early_stopping": False,
        "random_state": seed,
    }
    return {
        "linear": _Family(
            side=make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
            score=_line(),
        ),
        "trees": _Family(
            side=HistGradientBoostingClassifier(**trees),
            score=_BeyondLine(HistGradientBoostingRegressor(**trees)),
        ),
    }


def _line() -> BaseEstimator:
    """Least squares. What shrinkage leaves of a line, the shrinkage of the side leaves as well, and
    the product would count as evidence; so there is next to none, only enough to be solvable."""
    return make_pipeline(StandardScaler(), Ridge(alpha=1.0))


class _BeyondLine(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """A line, and a model of what it leaves: trees alone draw a line as a coarse staircase."""

    def __init__(self, rest: BaseEstimator) -> None:
        self.rest = rest

    def fit(self, features: Floats, scores: Floats) -> _BeyondLine:
        self.line_ = _line().fit(features, scores)
        self.rest_ = clone(self.rest).fit(features, scores - self.line_.predict(features))
        return self

    def predict(self, features: Floats) -> Floats:
        return np.asarray(self.line_.predict(features) + self.rest_.predict(features))


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


@dataclass(frozen=True)
class _Fit:
    """What a family predicts of each record from the others: P(suspect | X) and E[score | X]."""

    side: Floats
    score: Floats


def _cross_fit(
    family: _Family, scores: Floats, side: Booleans, features: Floats, parts: list[Integers]
) -> _Fit:
    fit = _Fit(np.empty(scores.size), np.empty(scores.size))
    for test in parts:
        train = np.setdiff1d(np.arange(scores.size), test)
        of_side = clone(family.side).fit(features[train], side[train])
        of_score = clone(family.score).fit(features[train], scores[train])
        fit.side[test] = of_side.predict_proba(features[test])[:, 1]
        fit.score[test] = of_score.predict(features[test])
    return fit


def _weight(sums: Floats) -> float:
    """How many groups carry the variance, (Σr²)²/Σr⁴: few, where few suspects or scores do."""
    squares = sums**2
    return max(2.0, float(squares.sum() ** 2 / max((squares**2).sum(), 1e-300)))


def _statistic(sums: Floats) -> float:
    deviation = sums.std(ddof=1)
    # Constant scores leave no residual, hence no evidence.
    return float(np.sqrt(sums.size) * sums.mean() / deviation) if deviation > 0 else -np.inf


def _robustness(statistic: float, units: int) -> float:
    """Robustness value of the partial correlation that a statistic over so many units stands for.

    Source: Cinelli and Hazlett (2020), J. R. Stat. Soc. B 82:39, section 4.2.
    """
    if statistic <= 0:
        return 0.0
    f2 = statistic**2 / units
    return float((np.sqrt(f2**2 + 4 * f2) - f2) / 2)


def _effective_share(predicted: Floats, side: Booleans) -> float:
    """Kish's effective size of the controls, (Σw)²/(n Σw²), with their odds of being suspects w.

    The predictions are calibrated first, by Platt's line through their logits: a model of many
    features is too sure of itself, and would make controls seem rarer than they are.
    """
    logits = special.logit(np.clip(predicted, 1e-9, 1 - 1e-9))[:, None]
    calibrated = LogisticRegression(C=1e6).fit(logits, side)
    odds = calibrated.decision_function(logits[~side])
    weights = np.exp(odds - odds.max())
    kish = weights.sum() ** 2 / (weights**2).sum() / weights.size
    # Where all suspects lie beyond the controls, these are alike and yet resemble none of them.
    overlapping = (calibrated.decision_function(logits[side]) <= odds.max()).mean()
    return float(min(kish, overlapping))
