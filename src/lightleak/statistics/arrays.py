"""What every function of this room does to its inputs first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]
Labels = Sequence[str] | Sequence[int] | npt.NDArray[np.generic]

# Matrices of replicates are worked through in blocks of at most this many entries (32 MB each).
BLOCK_ENTRIES = 4_000_000


def score_array(values: npt.ArrayLike, name: str) -> Floats:
    """The scores as a non-empty float64 vector.

    Raises:
        ValueError: not one-dimensional, empty, or holding NaN (drop unscorable records first).
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"{name} must be a non-empty vector, not of shape {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"{name} holds NaN: drop unscorable records first")
    return scores


def label_codes(labels: Labels | None, length: int, name: str) -> Integers:
    """The labels as codes 0, 1, …; every record its own code when there are no labels.

    Raises:
        ValueError: not one label for each of `length` records.
    """
    if labels is None:
        return np.arange(length)
    array = np.asarray(labels)
    if array.shape != (length,):
        raise ValueError(f"{name} has shape {array.shape}; it needs one label for each score")
    return np.unique(array, return_inverse=True)[1].astype(np.int64)
