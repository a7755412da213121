"""Evidence in memory, as the signals take it. NumPy only: no model is needed from here on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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

    def mean_of_highest(self, share: float) -> Floats:
        """(n,) mean of each record's highest max(1, ⌊share · length⌋) numbers; NaN where none."""
        return -self.map(np.negative).mean_of_lowest(share)

    def followed_by(self, other: Ragged) -> Ragged:
        """Each record's numbers, and then its numbers in `other`."""
        both = (self, other)
        values = [each.values[each.offsets[0] : each.offsets[-1]] for each in both]
        owners = [np.repeat(np.arange(len(each.lengths)), each.lengths) for each in both]
        order = np.argsort(np.concatenate(owners), kind="stable")
        offsets = np.concatenate([[0], np.cumsum(self.lengths + other.lengths)])
        return Ragged(np.concatenate(values)[order], offsets)

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

    def standardised(self) -> Ragged:
        """(ℓ_t − μ_t)/σ_t; 0 where the distribution has no spread (ℓ_t = μ_t there)."""

        def by_number(logprob: Floats, mean: Floats, variance: Floats) -> Floats:
            spread = np.sqrt(np.maximum(variance, 0.0))
            return np.divide(logprob - mean, spread, out=np.zeros_like(spread), where=spread > 0)

        return self.logprob.map(by_number, self.mean, self.variance)


@dataclass(frozen=True)
class Distributions:
    """The shape of the next-token distributions of one slice of the tokens, in nats.

    They are those which predict the tokens of the slice; of an image, whose tokens nothing
    predicts, those at its tokens.

    Attributes:
        gap: log-probability of the likeliest token, less that of the second.
        renyi: Rényi entropies H_α, by `ORDERS`.
        modified: modified Rényi entropies M_α of the token that came, by `FINITE_ORDERS`; of no
            length in an image.
    """

    gap: Ragged
    renyi: Mapping[str, Ragged]
    modified: Mapping[str, Ragged]

    def followed_by(self, other: Distributions) -> Distributions:
        """Each record's distributions here, and then those in `other`."""
        return Distributions(
            self.gap.followed_by(other.gap),
            {order: each.followed_by(other.renyi[order]) for order, each in self.renyi.items()},
            {o: each.followed_by(other.modified[o]) for o, each in self.modified.items()},
        )


# The orders α of the entropies that are read; at α = ∞ every modified entropy is 0.
FINITE_ORDERS = ("0.5", "1", "2")
ORDERS = (*FINITE_ORDERS, "inf")


@dataclass(frozen=True)
class AnswerDistributions:
    """Distributions by slice: of the record's own text, the `description`."""

    slices: Mapping[str, Distributions]


class PromptDistributions(AnswerDistributions):
    """Beside the `description` the `image`, the `instruction` and `instruction+description`.

    The instruction is what the prompt holds behind the image, the template's own tokens included.
    """


class OwnDescription(PromptDistributions):
    """The same slices, where the description is what the model itself says of the image."""


def distributions_of(options: Mapping[str, object]) -> type[AnswerDistributions]:
    """Which of them a signal with the options `slice` and `answer` is made from."""
    if options.get("answer") == "own":
        return OwnDescription
    described = options.get("slice", "description") == "description"
    return AnswerDistributions if described else PromptDistributions


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


@dataclass(frozen=True)
class ModelReadings:
    """What several models say of the same n records, d readings each; NaN where one says nothing.

    Attributes:
        names: of the readings; the first is `loss`, a mean log-likelihood in nats.
        own: (n, d) of the target.
        base: (n, d) of the model that it was trained from, or one that cannot have seen the
            records; None where there is none.
        references: (k, n, d) of models whose training records are known.
        seen: (k, n) whether each reference was trained on the record.
        control: (n,) whether it is a control.
    """

    names: tuple[str, ...]
    own: Floats
    base: Floats | None
    references: Floats
    seen: NDArray[np.bool_]
    control: NDArray[np.bool_]

    @property
    def loss(self) -> Floats:
        """(n,) mean log-likelihood at the target."""
        return self.own[:, 0]

    @property
    def reference_losses(self) -> Floats:
        """(k, n) mean log-likelihood at the references."""
        return self.references[:, :, 0]

    @property
    def unseen_loss(self) -> Floats:
        """(n,) mean log-likelihood where the record was not trained on: at the base, or else the
        mean over references without it."""
        if self.base is not None:
            return self.base[:, 0]
        return mean_where(self.reference_losses, ~self.seen)

    @property
    def paired(self) -> bool:
        """Whether every record has references with it and without it; else none is compared with
        those that saw it: two formulas would set apart whoever is treated by the other."""
        read = np.isfinite(self.reference_losses)
        with_it, without = (np.any(side & read, axis=0) for side in (self.seen, ~self.seen))
        return bool(np.all((with_it & without) | ~np.isfinite(self.loss)))

    def mean_probability(self, *, seen: bool) -> Floats:
        """(n,) mean of exp(mean log-likelihood) over references that saw the record, or that did
        not; without references, that of the base."""
        if not len(self.references) and self.base is not None and not seen:
            return np.exp(self.base[:, 0])
        return mean_where(np.exp(self.reference_losses), self.seen if seen else ~self.seen)


class OtherLosses(ModelReadings):
    """The losses alone, where there is at least one other model."""


class ReferenceLosses(ModelReadings):
    """The losses alone, where there are references."""


def mean_where(values: Floats, chosen: NDArray[np.bool_]) -> Floats:
    """Mean over the first axis of the chosen finite values, (k, ...); NaN where none."""
    chosen = chosen & np.isfinite(values)
    count = chosen.sum(axis=0)
    total = np.where(chosen, values, 0.0).sum(axis=0)
    mean: Floats = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean


@dataclass(frozen=True)
class AugmentedDivergences:
    """(n, k) Kullback-Leibler divergence, in nats a token, of the answer's distributions given the
    image from those given its k augmentations; NaN where one could not be read."""

    divergences: Floats


@dataclass(frozen=True)
class NeighbourLosses:
    """Losses of each record and of texts a few words away from its own, in nats a token.

    Attributes:
        own: (n,).
        neighbours: one number a neighbour; none where a text has a single word.
    """

    own: Floats
    neighbours: Ragged


@dataclass(frozen=True)
class CorruptedEmbeddings:
    """(n, k) cosine of an image's visual embedding with those of its k corruptions."""

    cosines: Floats


@dataclass(frozen=True)
class SampledAnswers:
    """What the target answers to a record's image and prompt, drawn again and again.

    Attributes:
        truth: the n records' own texts.
        temperatures: the t temperatures, from low to high.
        answers: of each record, for each temperature the answers drawn at it.
    """

    truth: Sequence[str]
    temperatures: tuple[float, ...]
    answers: Sequence[Sequence[Sequence[str]]]


# What one pass over each kind of target can yield.
OF_KIND: Mapping[str, tuple[type, ...]] = {
    "generative": (
        TokenStatistics,
        AnswerDistributions,
        PromptDistributions,
        OwnDescription,
        GradientNorms,
        GradientSlices,
        AugmentedDivergences,
        NeighbourLosses,
        CorruptedEmbeddings,
        SampledAnswers,
        OtherLosses,
        ReferenceLosses,
        ModelReadings,
    ),
    "endpoint": (SampledAnswers,),
    "dual-encoder": (
        PairEmbeddings,
        AugmentedCosines,
        DropoutCosines,
        ContrastLoss,
        GradientNorms,
        GradientSlices,
        OtherLosses,
        ReferenceLosses,
        ModelReadings,
    ),
}
# What is compared across models, and what each of them is asked for.
ACROSS: Mapping[type, tuple[type, ...]] = {
    OtherLosses: (TokenStatistics, ContrastLoss),
    ReferenceLosses: (TokenStatistics, ContrastLoss),
    ModelReadings: (TokenStatistics, ContrastLoss, GradientNorms),
}
# What takes further forwards (or questions, of an endpoint), and how many a record: made only where
# a signal that needs it is named.
EXTRA: Mapping[type, int] = {
    OwnDescription: 2,
    AugmentedDivergences: 5,
    NeighbourLosses: 24,
    CorruptedEmbeddings: 6,
    SampledAnswers: 6,
}
# What a dual encoder yields only against a bank of negatives.
NEEDS_BANK = frozenset((ContrastLoss, GradientNorms, GradientSlices))
