"""How far the gradients of mini-batches are turned, and how that changes as batches grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightleak.statistics.arrays import BLOCK_ENTRIES, Floats


@dataclass(frozen=True)
class Estimates:
    """Many numbers with their intervals, in arrays of one shape; NaN where nothing is known."""

    value: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class BatchDynamics:
    """What batches say of some comparisons; `…` stands for further axes (layers), if any.

    Attributes:
        cosines: (sizes, comparisons, …) mean over the batches.
        differences: (sizes, pairs, …) mean of first less second, within each batch.
        trends: (pairs, …) how much the difference grows each time that the batch doubles. Where
            a difference is negative, a trend above 0 says that it shrinks as batches grow.
    """

    cosines: Estimates
    differences: Estimates
    trends: Estimates


def batch_dynamics(
    cosines: npt.ArrayLike,
    sizes: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    *,
    seed: int,
    replicates: int = 10_000,
    confidence: float = 0.95,
) -> BatchDynamics:
    """Means, paired differences and their trend over log₂(size), each with its interval.

    Whole batches are resampled, with all their sizes and comparisons, and the same ones for every
    number: an interval of a difference or of a trend is paired.

    Args:
        cosines: (batches, sizes, comparisons, …); NaN where a batch has none.
        sizes: of the batches, in records.
        pairs: which comparisons are subtracted: (first, second) along their axis.
        seed: of the bootstrap.
        replicates: of the bootstrap.
        confidence: of the intervals.

    Raises:
        ValueError: shapes that do not match, or a single size.
    """
    values = np.asarray(cosines, dtype=np.float64)
    if values.ndim < 3 or values.shape[1] != len(sizes):
        raise ValueError(
            f"cosines have shape {values.shape}: it must be (batches, sizes, comparisons, …)"
        )
    first, second = np.asarray(pairs, dtype=np.int64).reshape(-1, 2).T
    differences = values[:, :, first] - values[:, :, second]
    slopes = np.tensordot(_slope_weights(sizes), differences, axes=(0, 1))

    def means(each: Floats) -> Estimates:
        return mean_over_batches(each, seed=seed, replicates=replicates, confidence=confidence)

    return BatchDynamics(means(values), means(differences), means(slopes))


def mean_over_batches(
    values: npt.ArrayLike, *, seed: int, replicates: int = 10_000, confidence: float = 0.95
) -> Estimates:
    """Means over the first axis with percentile bootstrap intervals.

    Args:
        values: (batches, …); NaN is left out of its own mean.
        seed: the same seed resamples the same batches, whatever the further axes.
        replicates: how often the batches are resampled.
        confidence: of each interval.

    Source: Efron and Tibshirani (1993), chapter 13.

    Raises:
        ValueError: no batch.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or len(array) == 0:
        raise ValueError("there is no batch")
    n, shape = len(array), array.shape[1:]
    flat = array.reshape(n, -1)
    known = ~np.isnan(flat)
    filled = np.where(known, flat, 0.0)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1 / n), replicates).astype(np.float64)
    ends = np.full((2, flat.shape[1]), np.nan)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    width = max(1, BLOCK_ENTRIES // replicates)
    with np.errstate(invalid="ignore"):
        for start in range(0, flat.shape[1], width):
            part = slice(start, start + width)
            # Where so little is known that a replicate holds nothing of it, no interval is.
            means = (counts @ filled[:, part]) / (counts @ known[:, part])
            ends[:, part] = np.quantile(means, tails, axis=0)
        value = filled.sum(axis=0) / known.sum(axis=0)
    return Estimates(value.reshape(shape), ends[0].reshape(shape), ends[1].reshape(shape))


def _slope_weights(sizes: Sequence[int]) -> Floats:
    """What the least-squares slope over log₂(size) gives each size; shape (sizes,)."""
    x = np.log2(np.asarray(sizes, dtype=np.float64))
    centred = x - x.mean()
    if not centred.any():
        raise ValueError("a trend needs two sizes of batches")
    weights: Floats = centred / (centred @ centred)
    return weights
