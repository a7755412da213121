"""Dataset inference: do all signals together tell the suspects from the controls?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightleak.statistics.arrays import Booleans, Floats, Integers, Labels, label_codes
from lightleak.statistics.permutation import combine_splits, welch

# Values beyond these shares of the training half are outliers, and are set to them.
CLIPPED_AT = (0.025, 0.975)
# Of the ridge regression; the largest leaves little but the differences of means.
PENALTIES = np.logspace(-1, 4, 11)
# Two groups a side and half are the fewest that have a variance; controls are halved twice.
FEWEST_GROUPS = 8


@dataclass(frozen=True)
class DatasetInference:
    """p-values, each combined over the splits; the last two are null by construction.

    Attributes:
        p_value: suspects against controls.
        control_p_value: controls against controls, split at random in two.
        shuffled_p_value: all records, with their sides shuffled.
    """

    p_value: float
    control_p_value: float
    shuffled_p_value: float


def dataset_inference(
    features: npt.ArrayLike,
    is_suspect: npt.ArrayLike,
    *,
    groups: Labels | None = None,
    seed: int,
    splits: int = 20,
) -> DatasetInference:
    """Whether a combination of signals, learnt on one half, separates the sides in the other.

    A group counts by the means of its signals. Each split halves the groups at random. On the
    training half, both sides pooled, the signals are imputed (median), clipped, standardised and
    combined by ridge regression on the side. On the other half Welch's t asks whether suspects
    score higher. The splits' p-values become one by min(1, 2 × median).

    The weights are free in sign: suspects that score *lower* are found as well, and so is every
    other difference between the sets. The p-value speaks of training only where suspects and
    controls are exchangeable but for it. A group found on both sides counts as two.

    Args:
        features: signals, NaN where one is unscorable; shape (n, k).
        is_suspect: shape (n,).
        groups: what is sampled together; never divided between the halves.
        seed: of the splits and shuffles.
        splits: how many random halvings.

    Source: Maini et al. (2024), arXiv:2406.06443; here clipping and scaling, too, are fitted on the
    training half, and on both sides alike.

    Raises:
        ValueError: shapes that do not match, infinite values, or fewer than eight groups on a
            side.
    """
    columns = np.asarray(features, dtype=np.float64)
    side = np.asarray(is_suspect, dtype=bool)
    if columns.ndim != 2 or not columns.size or side.shape != columns.shape[:1]:
        raise ValueError("features need one row for each entry of is_suspect, and a column")
    if np.isinf(columns).any():
        raise ValueError("features hold infinite values")
    codes = label_codes(groups, side.size, "groups")
    _, first, unit = np.unique(2 * codes + side, return_index=True, return_inverse=True)
    means, side, codes = _group_means(columns, unit), side[first], codes[first]
    if min(side.sum(), (~side).sum()) < FEWEST_GROUPS:
        raise ValueError(f"dataset inference needs {FEWEST_GROUPS} groups on each side")
    rng = np.random.default_rng(seed)
    controls = np.arange((~side).sum())
    halves = rng.permutation(controls) % 2 == 1
    return DatasetInference(
        p_value=_over_splits(means, side, codes, rng, splits),
        control_p_value=_over_splits(means[~side], halves, controls, rng, splits),
        shuffled_p_value=_over_splits(means, _shuffled(side, codes, rng), codes, rng, splits),
    )


def _group_means(columns: Floats, unit: Integers) -> Floats:
    """The mean of what is scorable, of each unit and signal; NaN where nothing is."""
    scorable = ~np.isnan(columns)
    sums, counts = (
        np.column_stack([np.bincount(unit, weights=column) for column in values.T])
        for values in (np.where(scorable, columns, 0.0), scorable)
    )
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _over_splits(
    means: Floats, side: Booleans, codes: Integers, rng: np.random.Generator, splits: int
) -> float:
    p_values = []
    for _ in range(splits):
        test = _half(side, codes, rng)
        scores = _combined(means, side, ~test)[test]
        p_values.append(welch(scores[side[test]], scores[~side[test]]))
    return combine_splits(p_values)


def _half(side: Booleans, codes: Integers, rng: np.random.Generator) -> Booleans:
    """Rows of a random half of the groups: of controls, of those on both sides, of suspects."""
    share = np.bincount(codes, weights=side) / np.bincount(codes)
    drawn = np.empty(share.size, dtype=bool)
    drawn[np.argsort(2 * share + rng.random(share.size))] = np.arange(share.size) % 2 == 1
    return drawn[codes]


def _shuffled(side: Booleans, codes: Integers, rng: np.random.Generator) -> Booleans:
    """Groups trade sides with each other; a group on both sides, within itself."""
    both = np.bincount(codes)[codes] == 2
    swapped = (rng.random(codes.size) < 0.5)[codes]
    shuffled = np.where(both, side ^ swapped, side)
    shuffled[~both] = rng.permutation(side[~both])
    return shuffled


def _combined(features: Floats, side: Booleans, train: Booleans) -> Floats:
    """One score a record, everything fitted on the rows of `train`."""
    usable = features[:, ~np.isnan(features[train]).all(axis=0)]
    if not usable.size:
        return np.zeros(side.size)
    low, median, high = np.nanquantile(usable[train], [CLIPPED_AT[0], 0.5, CLIPPED_AT[1]], axis=0)
    clipped = np.clip(np.where(np.isnan(usable), median, usable), low, high)
    deviation = clipped[train].std(axis=0)
    scaled = (clipped - clipped[train].mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    weights = _ridge(scaled[train], side[train] - side[train].mean())
    return np.asarray(scaled @ weights, dtype=np.float64)


def _ridge(columns: Floats, centred: Floats) -> Floats:
    """Weights of the ridge regression with the least generalised cross-validation error.

    Source: Golub, Heath and Wahba (1979), Technometrics 21:215.
    """
    eigenvalues, vectors = np.linalg.eigh(columns.T @ columns)
    eigenvalues = np.maximum(eigenvalues, 0.0)
    along = vectors.T @ (columns.T @ centred)
    shrunk = 1 / (eigenvalues + PENALTIES[:, None])
    misfit = centred @ centred - (along**2 * shrunk * (2 - eigenvalues * shrunk)).sum(axis=1)
    freedom = centred.size - 1 - (eigenvalues * shrunk).sum(axis=1)
    best = np.argmin(misfit / freedom**2)
    return np.asarray(vectors @ (along * shrunk[best]), dtype=np.float64)
