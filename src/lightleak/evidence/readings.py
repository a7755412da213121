"""Evidence in memory, as the signals take it. NumPy only: no model is needed from here on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """One array of numbers a record, of differing lengths, kept end to end.

    Attributes:
        values: (total,) all records' numbers.
        offsets: (n + 1,) record i owns `values[offsets[i]:offsets[i + 1]]`.
    """

    values: Floats
    offsets: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) how many numbers each record has."""
        return np.diff(self.offsets)

    def mean(self) -> Floats:
        """(n,) mean of each record; NaN where it has none."""
        return self._sum_of_first(self.values, self.lengths) / _or_nan(self.lengths)

    def mean_of_lowest(self, share: float) -> Floats:
        """(n,) mean of each record's lowest max(1, ⌊share · length⌋) numbers; NaN where none."""
        owner = np.repeat(np.arange(len(self.lengths)), self.lengths)
        ascending = self.values[np.lexsort((self.values, owner))]
        counts = np.minimum(np.maximum(1, np.floor(share * self.lengths)), self.lengths)
        return self._sum_of_first(ascending, counts.astype(np.int64)) / _or_nan(counts)

    def map(self, function: Callable[..., Floats], *others: Ragged) -> Ragged:
        """Apply `function` number by number to this and `others`, which have equal lengths."""
        return Ragged(function(self.values, *(other.values for other in others)), self.offsets)

    def _sum_of_first(self, values: Floats, counts: NDArray[np.int64]) -> Floats:
        # A cumulative sum over all records would let long runs round each other: reduce by record.
        within = np.arange(len(values)) - np.repeat(self.offsets[:-1], self.lengths)
        kept = np.where(within < np.repeat(counts, self.lengths), values, 0.0)
        sums = np.zeros(len(self.lengths), dtype=np.float64)
        filled = self.lengths > 0
        if filled.any():
            sums[filled] = np.add.reduceat(kept.astype(np.float64), self.offsets[:-1][filled])
        return sums


@dataclass(frozen=True)
class TokenStatistics:
    """What the target said of each answer token, in nats.

    Attributes:
        logprob: log p_t(y_t), the answer's own tokens.
        mean: μ_t = Σ_v p_t(v) log p_t(v) over the vocabulary.
        variance: σ_t² = Σ_v p_t(v) log² p_t(v) − μ_t².
        zlib_bytes: (n,) length of the record's text after zlib.
    """

    logprob: Ragged
    mean: Ragged
    variance: Ragged
    zlib_bytes: NDArray[np.int64]


@dataclass(frozen=True)
class PairEmbeddings:
    """Embeddings of each record's image and text, of unit length; both (n, d)."""

    image: Floats
    text: Floats

    @property
    def cosine(self) -> Floats:
        """(n,) cosine of each image with its own text."""
        cosine: Floats = np.einsum("nd,nd->n", self.image, self.text, dtype=np.float64)
        return cosine


@dataclass(frozen=True)
class AugmentedCosines:
    """Cosine of image and text, (n,), and of k augmentations of the image and text, (n, k)."""

    plain: Floats
    augmented: Floats


@dataclass(frozen=True)
class DropoutCosines:
    """(n, passes) cosine of image and text under attention dropout; no column without dropout."""

    cosines: Floats


@dataclass(frozen=True)
class ContrastLoss:
    """(n,) contrastive loss of each record against the one bank of control pairs, in nats."""

    losses: Floats


@dataclass(frozen=True)
class GradientNorms:
    """Euclidean norms of each record's loss gradient.

    Attributes:
        matrices: parameter names, m of them.
        norms: (n, m).
    """

    matrices: tuple[str, ...]
    norms: Floats


@dataclass(frozen=True)
class SliceAxis:
    """The rows or the columns of one matrix, and where they lie among all slices."""

    matrix: str
    axis: str
    start: int
    stop: int


@dataclass(frozen=True)
class SliceBlock:
    """Gradient slices of some records.

    Attributes:
        rows: (b,) which records of the evidence these are.
        norms2: (b, s) squared norm of every row and column of every matrix.
        dots: (b, k, s) inner products with the k reference gradients.
        in_reference: (b, k) whether the record's own gradient is part of that reference.
    """

    rows: NDArray[np.int64]
    norms2: Floats
    dots: Floats
    in_reference: NDArray[np.bool_]


@dataclass(frozen=True)
class GradientSlices:
    """Row and column readings of every record's gradient against the reference gradients.

    Attributes:
        n_records: records in the evidence.
        axes: what the s slices are.
        reference_norms2: (k, s) squared norms of the reference gradients' slices.
        reference_sizes: (k,) how many records each reference is the mean of.
        blocks: yields the records in pieces, so that any number fits in memory.
        lora: whether the matrices are an adapter's.
    """

    n_records: int
    axes: tuple[SliceAxis, ...]
    reference_norms2: Floats
    reference_sizes: NDArray[np.int64]
    blocks: Callable[[], Iterator[SliceBlock]]
    lora: bool


def slice_axes(shapes: dict[str, tuple[int, int]]) -> tuple[SliceAxis, ...]:
    """Lay the rows, then the columns, of each matrix (out × in) end to end."""
    axes: list[SliceAxis] = []
    start = 0
    for matrix, shape in shapes.items():
        for axis, size in zip(("row", "column"), shape, strict=True):
            axes.append(SliceAxis(matrix, axis, start, start + size))
            start += size
    return tuple(axes)


def _or_nan(counts: NDArray[np.int64] | Floats) -> Floats:
    return np.where(counts > 0, counts, np.nan).astype(np.float64)


# What one pass over each kind of target can yield.
OF_KIND: Mapping[str, tuple[type, ...]] = {
    "generative": (TokenStatistics, GradientNorms, GradientSlices),
    "dual-encoder": (
        PairEmbeddings,
        AugmentedCosines,
        DropoutCosines,
        ContrastLoss,
        GradientNorms,
        GradientSlices,
    ),
}
# What a dual encoder yields only against a bank of negatives.
NEEDS_BANK = frozenset((ContrastLoss, GradientNorms, GradientSlices))
