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
        means = np.full(len(self.lengths), np.nan)
        filled = self.lengths > 0
        if filled.any():
            values = self.values[self.offsets[0] : self.offsets[-1]].astype(np.float64)
            sums = np.add.reduceat(values, self.offsets[:-1][filled] - self.offsets[0])
            means[filled] = sums / self.lengths[filled]
        return means

    def mean_of_lowest(self, share: float) -> Floats:
        """(n,) mean of each record's lowest max(1, ⌊share · length⌋) numbers; NaN where none."""
        means = np.full(len(self.lengths), np.nan)
        # Records of one length are a matrix, and the rows of a matrix sort fast.
        for length in np.unique(self.lengths[self.lengths > 0]):
            alike = np.flatnonzero(self.lengths == length)
            rows = self.values[self.offsets[alike, None] + np.arange(length)]
            lowest = np.sort(rows, axis=1)[:, : max(1, int(share * length))]
            means[alike] = lowest.mean(axis=1, dtype=np.float64)
        return means

    def map(self, function: Callable[..., Floats], *others: Ragged) -> Ragged:
        """Apply `function` number by number to this and `others`, which have equal lengths."""
        return Ragged(function(self.values, *(other.values for other in others)), self.offsets)


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
    """Rows or columns of one matrix, or a vector as one; and where they lie among all slices."""

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

    def some(
        self, records: NDArray[np.bool_], columns: NDArray[np.int64] | None = None
    ) -> SliceBlock:
        """Some of the records, and of their slices."""
        norms2, dots = self.norms2[records], self.dots[records]
        if columns is not None:
            norms2, dots = norms2[:, columns], dots[..., columns]
        return SliceBlock(self.rows[records], norms2, dots, self.in_reference[records])


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


def slice_axes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[SliceAxis, ...]:
    """Lay rows, then columns, of each matrix (out, in) end to end; a vector is one slice."""
    axes: list[SliceAxis] = []
    start = 0
    for matrix, shape in shapes.items():
        sizes = (
            {"vector": 1} if len(shape) == 1 else dict(zip(("row", "column"), shape, strict=True))
        )
        for axis, size in sizes.items():
            axes.append(SliceAxis(matrix, axis, start, start + size))
            start += size
    return tuple(axes)


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
