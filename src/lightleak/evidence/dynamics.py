"""How far a change of the records turns a mini-batch's gradient (arXiv 2503.01208)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightleak.errors import UserError
from lightleak.evidence.collect import BatchSize, Measured, Progress, encode, plan, run
from lightleak.evidence.gradients import GradientEngine
from lightleak.records import Failure, Record
from lightleak.targets import Target
from lightleak.targets.families import Parts

ORIGINAL, OTHER, ALL = "original", "other batch", "all"
SIZES = (1, 2, 4, 8, 16)

Sums = dict[str, Tensor]

_COLUMNS = pa.schema(
    {
        "batch": pa.int32(),
        "batch_size": pa.int32(),
        "records": pa.int32(),
        "comparison": pa.string(),
        "layer": pa.string(),
        "dot": pa.float64(),
        "norm2": pa.float64(),
        "variant_norm2": pa.float64(),
        "cosine": pa.float64(),
    }
)


@dataclass(frozen=True)
class Draw:
    """The records of one batch of the largest size; a smaller batch is the first of them.

    Attributes:
        number: which draw it is, from 0.
        batch: positions of its records.
        other: as many positions of other records, which it is set against.
    """

    number: int
    batch: tuple[int, ...]
    other: tuple[int, ...]


def draw_batches(n_records: int, size: int, batches: int, seed: int) -> Iterator[Draw]:
    """Draw batches at random.

    No record is in two batches while the records last; then all are dealt anew in another order,
    so that each is used about equally often. The other batch is the next of the same deal.

    Raises:
        UserError: there are fewer records than two batches take.
    """
    each = n_records // size
    if each < 2:
        raise UserError(
            f"{n_records} records make no two batches of {size}",
            what_to_do="Give more records or smaller batches.",
        )
    rng = np.random.default_rng(seed)
    for first in range(0, batches, each):
        deal = rng.permutation(n_records)[: each * size].reshape(each, size).tolist()
        for i in range(min(each, batches - first)):
            yield Draw(first + i, tuple(deal[i]), tuple(deal[(i + 1) % each]))


def batch_gradients(
    target: Target,
    engine: GradientEngine,
    variants: Mapping[str, Sequence[Record]],
    *,
    sizes: Sequence[int] = SIZES,
    batches: int = 100,
    seed: int,
    size: BatchSize | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Compare the gradients of many batches; `compare` says how, and serves to store parts.

    Raises:
        UserError: the variants do not match, or are too few (`draw_batches`).
    """
    draws = draw_batches(len(variants[ORIGINAL]), max(sizes), batches, seed)
    parts = [
        compare(target, engine, variants, draw, sizes=sizes, size=size, progress=progress)
        for draw in draws
    ]
    return Measured(
        pa.concat_tables([part.table for part in parts]),
        tuple(dict.fromkeys(failure for part in parts for failure in part.failures)),
    )


def compare(
    target: Target,
    engine: GradientEngine,
    variants: Mapping[str, Sequence[Record]],
    draw: Draw,
    *,
    sizes: Sequence[int] = SIZES,
    size: BatchSize | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Cosines between the gradient of a batch of originals and that of the same batch changed.

    A batch's gradient is the sum over its records of the gradient of each one's own loss, in
    eval mode. It grows record by record, so that each record's gradient is formed once for all
    sizes. Two floors are compared too: "original", the same batch taken again (what is lost to
    rounding), and "other batch" (how much batches differ anyway). Holds one gradient of the
    selection in memory for each variant and three more.

    A record that fails in one variant is taken out of all of them, together with the one at its
    place in the other batch; the batches that held it are smaller by one, and an empty one has
    no row.

    Args:
        target: the model.
        engine: its gradients, at the selected matrices.
        variants: name → records; those of "original" and, in the same order, what became of each.
        draw: the batch.
        sizes: of the batches that are compared, in records.
        size: how many go through the model at once.
        progress: told how many records' gradients are done.

    Returns:
        One row a size, comparison and layer (`layer_of`, and "all" for the whole selection):
        records left in the batch, inner product, squared norms of original and variant, and
        their cosine, null where either gradient is zero; and the records that failed.

    Raises:
        UserError: a variant's records are not the originals'.
    """
    originals = variants[ORIGINAL]
    sides: dict[str, list[Record]] = {}
    for name, records in variants.items():
        if len(records) != len(originals) or any(
            records[i].id != originals[i].id for i in draw.batch
        ):
            raise UserError("its records are not the originals, one for one", f"variant {name!r}")
        sides[name] = [records[i] for i in draw.batch]
    sides[OTHER] = [originals[i] for i in draw.other]
    place_of = {record.id: i for side in sides.values() for i, record in enumerate(side)}

    def add(records: Sequence[Record], sums: Sums) -> list[Failure]:
        encoded = encode(target, records)
        batches = plan(encoded.records, size or BatchSize())
        failed = run(target, batches, lambda each: engine.add_gradients(each, sums), progress)
        return [*encoded.failures, *failed]

    layers = {name: layer_of(target.parts, name) for name in engine.selection.shapes}
    failures: list[Failure] = []
    while True:
        lost = {place_of[failure.id] for failure in failures}
        kept = [i for i in range(max(sizes)) if i not in lost]
        rows, failed = _rows(sides, kept, sizes, layers, add)
        if not failed:
            break
        # What is in a sum cannot be taken out again: begin anew without them.
        failures += failed
    table = pa.Table.from_pylist([{"batch": draw.number, **row} for row in rows], schema=_COLUMNS)
    return Measured(table, tuple(failures))


@dataclass(frozen=True)
class Cosines:
    """The cosines of a table.

    Attributes:
        values: (batches, sizes, comparisons, layers) float64; NaN where the table has none.
        sizes, comparisons, layers: what stands along the axes.
    """

    values: NDArray[np.float64]
    sizes: tuple[int, ...]
    comparisons: tuple[str, ...]
    layers: tuple[str, ...]

    @staticmethod
    def of(table: pa.Table) -> Cosines:
        """The cosines of the tables of all draws, put together."""
        batches, batch = np.unique(table["batch"].to_numpy(), return_inverse=True)
        sizes, size = np.unique(table["batch_size"].to_numpy(), return_inverse=True)
        comparisons, comparison = _coded(table["comparison"].to_pylist())
        layers, layer = _coded(table["layer"].to_pylist())
        values = np.full((len(batches), len(sizes), len(comparisons), len(layers)), np.nan)
        values[batch, size, comparison, layer] = table["cosine"].to_numpy()
        return Cosines(values, tuple(sizes.tolist()), comparisons, layers)


def layer_of(parts: Parts, name: str) -> str:
    """The layer that a parameter lies in; an adapter's, the layer that it adapts.

    "language.3" is the third text block, as in `evidence.hidden` (where 0 are the embeddings),
    "vision.0" the first vision block, "projector", and "rest" whatever lies in none of them.
    """
    for tower, blocks, first in (
        ("language", parts.text_blocks, 1),
        ("vision", parts.vision_blocks, 0),
    ):
        for index, block in enumerate(blocks, first):
            if name.startswith(f"{block}."):
                return f"{tower}.{index}"
    inside = any(name.startswith(f"{prefix}.") for prefix in parts.projector)
    return "projector" if inside else "rest"


def _rows(
    sides: Mapping[str, Sequence[Record]],
    kept: Sequence[int],
    sizes: Sequence[int],
    layers: Mapping[str, str],
    add: Callable[[Sequence[Record], Sums], list[Failure]],
) -> tuple[list[dict[str, object]], list[Failure]]:
    """The rows of a draw, or the first failures that `add` meets."""
    original: Sums = {}
    sums: dict[str, Sums] = {name: {} for name in sides}
    rows: list[dict[str, object]] = []
    done = 0
    for batch_size in sorted(set(sizes)):
        batch = [i for i in kept if i < batch_size]
        for name, own in ((ORIGINAL, original), *sums.items()):
            failed = add([sides[name][i] for i in batch[done:]], own)
            if failed:
                return [], [replace(each, error=f"as {name}: {each.error}") for each in failed]
        done = len(batch)
        if not batch:
            continue
        norms2 = _inner(original, original, layers)
        for name, own in sums.items():
            dots, own_norms2 = _inner(original, own, layers), _inner(own, own, layers)
            rows += [
                {
                    "batch_size": batch_size,
                    "records": len(batch),
                    "comparison": name,
                    "layer": layer,
                    "dot": dots[layer],
                    "norm2": norms2[layer],
                    "variant_norm2": own_norms2[layer],
                    "cosine": _cosine(dots[layer], norms2[layer], own_norms2[layer]),
                }
                for layer in dots
            ]
    return rows, []


def _inner(first: Sums, second: Sums, layers: Mapping[str, str]) -> dict[str, float]:
    """Inner products by layer and over all; a matrix that no gradient reaches counts as zero."""
    shared = [name for name in layers if name in first and name in second]
    values = torch.stack([(first[name] * second[name]).sum() for name in shared]).tolist()
    totals = dict.fromkeys((*layers.values(), ALL), 0.0)
    for name, value in zip(shared, values, strict=True):
        totals[layers[name]] += value
        totals[ALL] += value
    return totals


def _cosine(dot: float, norm2: float, other_norm2: float) -> float | None:
    return dot / math.sqrt(norm2 * other_norm2) if norm2 * other_norm2 > 0 else None


def _coded(labels: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """The distinct labels in the order they come, and the place of each among them."""
    places = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return tuple(places), [places[label] for label in labels]
