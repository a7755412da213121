"""Evidence on disk: one row a record in Parquet, and back into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from lightleak.evidence.readings import (
    FINITE_ORDERS,
    ORDERS,
    AnswerDistributions,
    AugmentedCosines,
    AugmentedDivergences,
    ContrastLoss,
    CorruptedEmbeddings,
    Distributions,
    DropoutCosines,
    GradientNorms,
    GradientSlices,
    NeighbourLosses,
    OwnDescription,
    PairEmbeddings,
    PromptDistributions,
    Ragged,
    SampledAnswers,
    SliceAxis,
    SliceBlock,
    TokenStatistics,
)

SLICE_COLUMNS = ("slice_norms2", "slice_dots")
TABLES = Callable[[], Iterator[pa.Table]]


def schema(
    columns: Callable[[pa.DataType], Mapping[str, pa.DataType]], *, double: bool
) -> pa.Schema:
    """Columns of an evidence part; gradient columns are empty lists when none were read.

    Args:
        columns: what the kind of target adds, given the type of a list of numbers.
        double: whether the numbers are float64.
    """
    numbers = pa.list_(pa.float64() if double else pa.float32())
    return pa.schema(
        {
            "id": pa.string(),
            "n_tokens": pa.int32(),
            **columns(numbers),
            "matrix_norms": numbers,
            "slice_norms2": numbers,
            "slice_dots": numbers,
            "in_reference": pa.list_(pa.bool_()),
        }
    )


def token_statistics(table: pa.Table) -> TokenStatistics:
    """The token statistics of an evidence table."""
    return TokenStatistics(
        _ragged(table, "logprob"),
        _ragged(table, "mean"),
        _ragged(table, "variance"),
        table["zlib_bytes"].to_numpy(),
    )


def answer_distributions(table: pa.Table) -> AnswerDistributions:
    """The distributions behind the answers of an evidence table."""
    return AnswerDistributions({"description": _distributions(table, "description")})


def prompt_distributions(table: pa.Table) -> PromptDistributions:
    """The same with those at images and instructions."""
    return PromptDistributions(_slices(table, ""))


def own_description(table: pa.Table) -> OwnDescription:
    """The same where the target's own descriptions are the answers."""
    return OwnDescription(_slices(table, "own_"))


def _slices(table: pa.Table, prefix: str) -> dict[str, Distributions]:
    names = ("image", "instruction", "description")
    slices = {name: _distributions(table, prefix + name) for name in names}
    both = slices["instruction"].followed_by(slices["description"])
    return {**slices, "instruction+description": both}


def _distributions(table: pa.Table, column: str) -> Distributions:
    flat = table.select([column]).flatten()
    return Distributions(
        _ragged(flat, f"{column}.gap"),
        {order: _ragged(flat, f"{column}.renyi_{order}") for order in ORDERS},
        {order: _ragged(flat, f"{column}.modified_{order}") for order in FINITE_ORDERS},
    )


def pair_embeddings(table: pa.Table) -> PairEmbeddings:
    """The embeddings of an evidence table."""
    return PairEmbeddings(matrix(table, "image_embedding"), matrix(table, "text_embedding"))


def augmented_cosines(table: pa.Table) -> AugmentedCosines:
    """The cosines of an evidence table, plain and under augmentations."""
    return AugmentedCosines(pair_embeddings(table).cosine, matrix(table, "augmented_cosines"))


def dropout_cosines(table: pa.Table) -> DropoutCosines:
    """The cosines of an evidence table under attention dropout."""
    return DropoutCosines(matrix(table, "dropout_cosines"))


def contrast_loss(table: pa.Table) -> ContrastLoss:
    """The contrastive losses of an evidence table."""
    return ContrastLoss(table["contrast_loss"].to_numpy())


def augmented_divergences(table: pa.Table) -> AugmentedDivergences:
    """The divergences of an evidence table under augmentations."""
    return AugmentedDivergences(matrix(table, "augmented_divergences"))


def neighbour_losses(table: pa.Table) -> NeighbourLosses:
    """The losses of an evidence table, and of the neighbours."""
    return NeighbourLosses(-_ragged(table, "logprob").mean(), _ragged(table, "neighbour_losses"))


def corrupted_embeddings(table: pa.Table) -> CorruptedEmbeddings:
    """The cosines of an evidence table under corruptions."""
    return CorruptedEmbeddings(matrix(table, "corruption_cosines"))


def sampled_answers(table: pa.Table) -> SampledAnswers:
    """The answers of an evidence table."""
    temperatures = table["temperatures"][0].as_py() if table.num_rows else ()
    return SampledAnswers(
        table["truth"].to_pylist(), tuple(temperatures), table["answers"].to_pylist()
    )


def gradient_norms(table: pa.Table, matrices: Sequence[str]) -> GradientNorms:
    """The gradient norms of an evidence table."""
    return GradientNorms(tuple(matrices), matrix(table, "matrix_norms"))


def gradient_slices(
    tables: TABLES,
    n_records: int,
    axes: Sequence[SliceAxis],
    reference_norms2: np.ndarray,
    reference_sizes: np.ndarray,
    *,
    lora: bool,
) -> GradientSlices:
    """The gradient slices of an evidence table that is read part by part."""

    def blocks() -> Iterator[SliceBlock]:
        first = 0
        for table in tables():
            norms2 = matrix(table, "slice_norms2")
            n, s = norms2.shape
            yield SliceBlock(
                np.arange(first, first + n),
                norms2,
                matrix(table, "slice_dots").reshape(n, -1, s),
                matrix(table, "in_reference").astype(bool),
            )
            first += n

    return GradientSlices(n_records, tuple(axes), reference_norms2, reference_sizes, blocks, lora)


def _ragged(table: pa.Table, column: str) -> Ragged:
    array = table[column].combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    offsets = array.offsets.to_numpy()
    values = array.values.to_numpy(zero_copy_only=False)
    return Ragged(values[offsets[0] : offsets[-1]], (offsets - offsets[0]).astype(np.int64))


def matrix(table: pa.Table, column: str) -> np.ndarray:
    """A list column whose lists are equally long, as (n, length)."""
    ragged = _ragged(table, column)
    return ragged.values.reshape(table.num_rows, -1)
