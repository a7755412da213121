"""Can the two sets be told apart by someone who never saw the model?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import linalg, sparse, special, stats
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import Ridge

from lightleak.errors import UserError
from lightleak.statistics import Estimate, auc, auc_across_folds, holm
from lightleak.validity.blind_features import DAYS, EPOCH, BlindFeatures, Wording

Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]

# Differences below this level, adjusted for their number, are named.
SIGNIFICANT = 0.05
# The ridge of the linear classifiers: that of a logistic regression with C = 1, whose curvature is
# at most ¼, were its loss a parabola.
RIDGE = 4.0
# The null distribution is that of at most this many records: it takes memory n² and time n³.
LARGEST_NULL = 4000


@dataclass(frozen=True)
class Difference:
    """One thing in which the sets differ.

    Attributes:
        feature: its name.
        sentence: the difference in plain words.
        auc: P(a suspect has more of it than a control), ties ½, among records that have it.
        suspect_median: in the feature's own unit.
        control_median: likewise.
        adjusted_p: two-sided Mann–Whitney over groups, Holm-adjusted over all features.
    """

    feature: str
    sentence: str
    auc: float
    suspect_median: float
    control_median: float
    adjusted_p: float


@dataclass(frozen=True)
class BlindBaseline:
    """How well the sets are told apart without any target.

    Attributes:
        text, image, joint: AUC of a linear classifier that was cross-validated on that part of
            the records (joint: on texts, images and fields); the interval is `auc_across_folds`'.
        trees: likewise of gradient-boosted trees on `features`, which also see sets that differ
            in spread alone.
        p_value: of the joint AUC, by permutation of what may have been assigned.
        differences: what differs beyond chance, strongest first.
        features: what the residual test adjusts for, shape (n, d): columns of texts, images and
            fields, and the main directions of the texts; finite, and no column is constant.
        feature_names: one for each column.
    """

    text: Estimate
    image: Estimate
    joint: Estimate
    trees: Estimate
    p_value: float
    differences: tuple[Difference, ...]
    features: Floats
    feature_names: tuple[str, ...]

    @property
    def auc(self) -> Estimate:
        """That of joint and trees whose interval begins higher: the blind AUC of the verdict."""
        return max(self.joint, self.trees, key=lambda each: each.low)


def blind_baseline(
    features: BlindFeatures,
    is_suspect: npt.ArrayLike,
    groups: Sequence[str | None],
    *,
    seed: int,
    folds: int = 2,
    permutations: int = 999,
) -> BlindBaseline:
    """Try to tell suspects from controls by the records alone.

    Classifiers, cross-validated with groups kept whole: linear ones (least squares with a ridge)
    on the texts, on the images, and on both with the fields; and trees.

    Args:
        features: of suspects and controls, in any order.
        is_suspect: one entry for each record; shape (n,).
        groups: for each record what it was sampled with, or None; length n.
        seed: of the folds, the trees and the permutations.
        folds: lowered when a side has fewer groups. Two by default: the interval of K folds is
            about √(K/2) times as wide, which costs more than the larger training sets gain.
        permutations: how many are drawn; p = (1 + count)/(permutations + 1).

    Raises:
        UserError: a side has too few groups for two folds.
        ValueError: not one entry of `is_suspect` and of `groups` for each record.
    """
    side = np.asarray(is_suspect, dtype=bool)
    if side.shape != (len(features),) or len(groups) != side.size:
        raise ValueError("is_suspect and groups need one entry for each record")
    draw = _draw(side, groups, folds, seed)
    text, image, fields = (
        _standardised(table.design()) for table in (features.text, features.image, features.fields)
    )
    joint = np.column_stack([text, image, fields])
    names, dense = _dense(features)

    def told_apart(scores: Floats) -> Estimate:
        # Records that look the same are ties, whatever the last bits of their scores.
        values = scores.astype(np.float32)
        return auc_across_folds(
            values[side],
            values[~side],
            draw.fold[side],
            draw.fold[~side],
            member_groups=draw.group[side],
            nonmember_groups=draw.group[~side],
        )

    return BlindBaseline(
        text=told_apart(_linear(_with_terms(text, features.terms), draw)),
        image=told_apart(_linear(image, draw)),
        joint=told_apart(_linear(_with_terms(joint, features.terms), draw)),
        trees=told_apart(_trees(np.column_stack([joint, features.directions]), draw, seed)),
        p_value=_p_value(joint, features.terms, draw, permutations, seed),
        differences=_differences(features, draw),
        features=dense,
        feature_names=names,
    )


@dataclass(frozen=True)
class _Draw:
    """Side, group, fold of each record, and whether its group lies on both sides; shape (n,)."""

    side: Booleans
    group: Integers
    fold: Integers
    straddles: Booleans

    def take(self, rows: Integers) -> _Draw:
        return _Draw(self.side[rows], self.group[rows], self.fold[rows], self.straddles[rows])

    def splits(self) -> Iterator[tuple[Booleans, Booleans]]:
        """Training and test records of each fold."""
        for each in np.unique(self.fold):
            yield self.fold != each, self.fold == each


def _draw(side: Booleans, groups: Sequence[str | None], folds: int, seed: int) -> _Draw:
    """The most folds, up to `folds`, of which each holds suspects and controls.

    Groups are dealt out in random order, a kind at a time (suspects, both, controls) and whatever
    their size: any exchange of the sides of whole groups of one fold was as likely to lead to the
    same folds, so labels that move within folds have the distribution that they had.
    """
    names = [f"record {i}" if each is None else f"group {each}" for i, each in enumerate(groups)]
    group = np.unique(names, return_inverse=True)[1].astype(np.int64)
    suspects, controls = (np.bincount(group, weights=each) > 0 for each in (side, ~side))
    count = min(folds, suspects.sum(), controls.sum())
    if count < 2:
        raise UserError(
            "too few groups to compare suspects with controls",
            what_to_do="Give at least two groups (or records without a group) on each side.",
        )
    kind = controls.astype(np.int64) - suspects
    fold = np.empty_like(kind)
    order = np.lexsort((_random(seed, b"folds").random(kind.size), kind))
    fold[order] = np.arange(kind.size) % count
    return _Draw(side, group, fold[group], (kind == 0)[group])


def _random(seed: int, purpose: bytes) -> np.random.Generator:
    """A stream of its own, since the sides may have been drawn with the same seed."""
    return np.random.default_rng([seed, *purpose])


def _standardised(columns: Floats) -> Floats:
    """By all records at once: no label enters, so nothing of a fold's answer leaks."""
    deviation = columns.std(axis=0) * (np.ptp(columns, axis=0) > 0)
    centred = columns - columns.mean(axis=0)
    divided: Floats = np.divide(centred, deviation, out=np.zeros_like(columns), where=deviation > 0)
    return divided


def _with_terms(columns: Floats, terms: Any) -> Any:
    return sparse.hstack([sparse.csr_array(columns), terms], format="csr")


def _dense(features: BlindFeatures) -> tuple[tuple[str, ...], Floats]:
    tables = (features.text, features.image, features.fields)
    names = [wording.name for table in tables for wording in table.wordings]
    names += [f"text direction {i + 1}" for i in range(features.directions.shape[1])]
    columns = np.column_stack([*(table.design() for table in tables), features.directions])
    varies = np.ptp(columns, axis=0) > 0
    return tuple(np.array(names)[varies].tolist()), columns[:, varies]


def _linear(inputs: Any, draw: _Draw) -> Floats:
    """Scores by least squares with a ridge, each from a fit on the other folds."""
    scores = np.zeros(draw.side.size)
    for train, test in draw.splits():
        labels = draw.side[train] - draw.side[train].mean()
        model = Ridge(RIDGE, fit_intercept=False).fit(inputs[train], labels)
        scores[test] = model.predict(inputs[test])
    return scores


def _trees(columns: Floats, draw: _Draw, seed: int) -> Floats:
    scores = np.zeros(draw.side.size)
    for train, test in draw.splits():
        model = HistGradientBoostingClassifier(
            max_iter=60,
            max_leaf_nodes=8,
            min_samples_leaf=5,
            early_stopping=False,
            random_state=seed,
        ).fit(columns[train], draw.side[train])
        scores[test] = model.decision_function(columns[test])
    return scores


def _p_value(columns: Floats, terms: Any, draw: _Draw, permutations: int, seed: int) -> float:
    """Of the AUC of `_linear`, in its dual form: one solution serves all permutations.

    With K = XXᵀ the scores are K_test,train (K_train + λI)⁻¹ y. Folds stay as they are and labels
    move within them, so that each permutation trains and tests on as much as the truth did.
    """
    rows = _thinned(draw, seed)
    columns, terms, draw = columns[rows], terms[rows], draw.take(rows)
    kernel = columns @ columns.T + (terms @ terms.T).toarray()
    labels = _labels(draw, permutations, seed)
    aucs = np.zeros(1 + permutations)
    for train, test in draw.splits():
        ridged = kernel[np.ix_(train, train)] + RIDGE * np.eye(train.sum())
        centred = labels[train] - labels[train].mean(axis=0)
        duals = linalg.solve(ridged, centred, assume_a="pos", overwrite_a=True)
        aucs += _aucs(kernel[np.ix_(test, train)] @ duals, labels[test])
    # The truth is among them; AUCs that are equal may differ in their last bits.
    return float(np.mean(aucs >= aucs[0] - 1e-9))


def _thinned(draw: _Draw, seed: int) -> Integers:
    """All records; of more than LARGEST_NULL, some of each group, or of as many as there may be.

    What is kept depends on the sides as the folds do, by numbers that no exchange of labels
    changes, and leaves the null as exact.
    """
    if draw.side.size <= LARGEST_NULL:
        return np.arange(draw.side.size)
    rng = _random(seed, b"thinning")
    rows = rng.permutation(draw.side.size)
    # The same number of each group and side; a group on both sides is two halves.
    _, half, sizes = np.unique(
        2 * draw.group[rows] + draw.side[rows], return_inverse=True, return_counts=True
    )
    by_half = np.argsort(half, kind="stable")
    rank = np.arange(rows.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rows = rows[by_half][rank < max(1, LARGEST_NULL // sizes.size)]
    if rows.size <= LARGEST_NULL:
        return rows
    # Too many groups: as many of each kind and fold, at random, of one record or one a side.
    rows = rows[np.argsort(rng.random(draw.group.max() + 1)[draw.group[rows]], kind="stable")]
    kind = np.where(draw.straddles, 2, draw.side)[rows]
    cells = [
        (rows[(draw.fold[rows] == fold) & (kind == each)], 1 + (each == 2))
        for fold in np.unique(draw.fold)
        for each in np.unique(kind)
    ]
    most = LARGEST_NULL // sum(halves for _, halves in cells)
    return np.concatenate([cell[: most * halves] for cell, halves in cells])


def _labels(draw: _Draw, permutations: int, seed: int) -> Floats:
    """The sides, and permutations of them, as 0 and 1; shape (n, 1 + permutations).

    A group that lies wholly on one side is one unit, which trades labels with the others of its
    fold; the records of a group on both sides trade labels among themselves (as in
    `permutation_test`).
    """
    alone = draw.group.max() + 1 + np.arange(draw.side.size)
    units = np.where(draw.straddles, alone, draw.group)
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    stratum = np.where(draw.straddles, draw.group, -1 - draw.fold)[first]
    labels = np.repeat(draw.side[first, None].astype(np.float64), 1 + permutations, axis=1)
    rng = _random(seed, b"labels")
    for each in np.unique(stratum):
        rows = stratum == each
        labels[rows, 1:] = rng.permuted(labels[rows, 1:], axis=0)
    return labels[unit]


def _aucs(scores: Floats, labels: Floats) -> Floats:
    """One AUC a column."""
    suspects = labels.sum(axis=0)
    wins = (stats.rankdata(scores, axis=0) * labels).sum(axis=0) - suspects * (suspects + 1) / 2
    return np.asarray(wins / (suspects * (len(labels) - suspects)))


def _differences(features: BlindFeatures, draw: _Draw) -> tuple[Difference, ...]:
    compared: list[tuple[Wording, Floats, Floats]] = []
    p_values: list[float] = []
    for table in (features.text, features.image, features.fields, features.words):
        for wording, column in zip(table.wordings, table.values.T, strict=True):
            known = ~np.isnan(column)
            suspects, controls = known & draw.side, known & ~draw.side
            if not suspects.any() or not controls.any() or np.ptp(column[known]) == 0:
                continue
            means = [_group_means(column[rows], draw.group[rows]) for rows in (suspects, controls)]
            p_values.append(_p_of_ranks(*means))
            compared.append((wording, column[suspects], column[controls]))
    if not compared:
        return ()
    found = [
        _difference(wording, suspect, control, float(p_value))
        for (wording, suspect, control), p_value in zip(compared, holm(p_values), strict=True)
        if p_value <= SIGNIFICANT
    ]
    return tuple(sorted(found, key=lambda each: -abs(each.auc - 0.5)))


def _p_of_ranks(suspect: Floats, control: Floats) -> float:
    """Two-sided Mann–Whitney in its normal form, with ties; SciPy's takes 2 ms for each column."""
    values = np.concatenate([suspect, control])
    n, m = suspect.size, control.size
    _, tied = np.unique(values, return_counts=True)
    spread = n * m / 12 * (n + m + 1 - (tied**3 - tied).sum() / ((n + m) * (n + m - 1)))
    if spread <= 0:  # Groups that are all alike.
        return 1.0
    excess = stats.rankdata(values)[:n].sum() - n * (n + m + 1) / 2
    return min(1.0, 2 * float(special.ndtr(-max(abs(excess) - 0.5, 0) / np.sqrt(spread))))


def _group_means(values: Floats, groups: Integers) -> Floats:
    """One value a group, since records of a group are no independent evidence."""
    _, code, count = np.unique(groups, return_inverse=True, return_counts=True)
    return np.asarray(np.bincount(code, weights=values) / count)


def _difference(
    wording: Wording, suspect: Floats, control: Floats, adjusted_p: float
) -> Difference:
    return Difference(
        feature=wording.name,
        sentence=_sentence(wording, suspect, control),
        auc=auc(suspect, control),
        suspect_median=float(np.median(suspect)),
        control_median=float(np.median(control)),
        adjusted_p=adjusted_p,
    )


def _sentence(wording: Wording, suspect: Floats, control: Floats) -> str:
    if not wording.more:
        return (
            f"{suspect.mean():.0%} of suspect {wording.noun} {wording.verb}, "
            f"against {control.mean():.0%} of control {wording.noun}"
        )
    # Where the medians are the same, as with rare digits, the means tell what differs.
    name = "median" if np.median(suspect) != np.median(control) else "mean"
    left, right = (float(getattr(np, name)(values)) for values in (suspect, control))
    word = wording.more if auc(suspect, control) > 0.5 else wording.less
    if wording.unit == DAYS:
        dates = " against ".join(
            f"{EPOCH + timedelta(days=each):%Y-%m-%d}" for each in (left, right)
        )
        return f"suspect {wording.noun} {wording.verb} {word} ({name} {dates})"
    ratio = max(left, right) / min(left, right) if min(left, right) > 0 else 1.0
    times = f"{ratio:.1f}× " if ratio >= 1.1 else ""
    return (
        f"suspect {wording.noun} {wording.verb} {times}{word} "
        f"({name} {left:.3g} against {right:.3g}{wording.unit and ' ' + wording.unit})"
    )
