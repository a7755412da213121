"""One pass over some records: encode, batch, step, and keep every reading."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import torch
from torch import Tensor

from lightleak.errors import UserError
from lightleak.evidence.gradients import GradientEngine
from lightleak.evidence.gradients.kernels import MaskedReference
from lightleak.evidence.gradients.rows import UnevenRows
from lightleak.evidence.table import schema
from lightleak.records import Failure, Record, open_rgb
from lightleak.targets import Bank, Batch, DualEncoderTarget, EncodedRecord, Target

Progress = Callable[[int], None]

# Records that are in memory as pixels at once; batches are made within them.
WINDOW = 64


class Reader(Protocol):
    """What is kept of a target's outputs, for one kind of target."""

    def columns(self, numbers: pa.DataType) -> dict[str, pa.DataType]:
        """Names and types of what `rows` yields; `numbers` is a list of floats."""
        ...

    def rows(
        self, records: Sequence[Record], encoded: Sequence[EncodedRecord], outputs: Any
    ) -> list[dict[str, object]]:
        """One row a record of a batch."""
        ...


@dataclass(frozen=True)
class BatchSize:
    """How many records go through the model at once.

    Attributes:
        records: at most so many.
        tokens: and at most so many tokens, padding included.
    """

    records: int = 32
    tokens: int = 4096


@dataclass(frozen=True)
class Measured:
    """Evidence rows in the order of the records, and the records that gave none."""

    table: pa.Table
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class Encoded:
    """Records ready for the model, and those that could not be made ready."""

    records: tuple[EncodedRecord, ...]
    failures: tuple[Failure, ...]


def encode(target: Target, records: Iterable[Record]) -> Encoded:
    """Open each image and tokenise each record; a record that fails is listed."""
    ready: list[EncodedRecord] = []
    failures: list[Failure] = []
    for record in records:
        try:
            ready.append(target.encode(record, open_rgb(record.image)))
        except UserError as error:
            failures.append(Failure(record.id, "encode", str(error)))
        except Exception as error:
            # Processors and templates refuse in any way they like; the record says which.
            failures.append(Failure(record.id, "encode", _one_line(error)))
    return Encoded(tuple(ready), tuple(failures))


def windows(
    target: Target, records: Sequence[Record], *, ahead: bool | None = None
) -> Iterator[Encoded]:
    """Records ready for the model, so many at a time that any number fits in memory.

    Args:
        target: the model.
        records: what to encode.
        ahead: encode the next window in a thread meanwhile; None does so on an accelerator, for
            on a CPU it would take the model's core.
    """
    parts = [records[start : start + WINDOW] for start in range(0, len(records), WINDOW)]
    if not (target.device.type != "cpu" if ahead is None else ahead):
        yield from (encode(target, part) for part in parts)
        return
    with ThreadPoolExecutor(1) as thread:
        waiting = [thread.submit(encode, target, part) for part in parts[:1]]
        for following in parts[1:]:
            ready = waiting.pop().result()
            waiting.append(thread.submit(encode, target, following))
            yield ready
        yield from (last.result() for last in waiting)


def plan(
    records: Sequence[EncodedRecord], size: BatchSize, *, rows: bool = True
) -> list[list[EncodedRecord]]:
    """Group records of equal shape and similar length.

    Args:
        records: of one window.
        size: batch limits.
        rows: whether rows of layers will be dealt out to records. Then the first batch of each
            shape is one record alone, which shows how many rows a piece of its image takes in
            each layer: no tensor tells a tower that packs, drops or shares rows from another.
    """
    by_shape: dict[object, list[EncodedRecord]] = {}
    for record in records:
        by_shape.setdefault(record.shape_key, []).append(record)
    batches: list[list[EncodedRecord]] = []
    for alike in by_shape.values():
        if rows:
            batches.append([alike.pop(0)])
        current: list[EncodedRecord] = []
        for record in sorted(alike, key=lambda each: each.n_tokens):
            full = len(current) == size.records
            if current and (full or record.n_tokens * (len(current) + 1) > size.tokens):
                batches.append(current)
                current = []
            current.append(record)
        if current:
            batches.append(current)
    return batches


def measure(
    target: Target,
    engine: GradientEngine | None,
    reader: Reader,
    records: Sequence[Record],
    *,
    references: Mapping[str, Tensor] | None = None,
    in_reference: Mapping[str, Sequence[bool]] | None = None,
    keep_slices: bool = True,
    size: BatchSize | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Evidence of some records.

    Args:
        target: the model.
        engine: reads gradients; None when no signal needs them.
        reader: what is kept of the outputs.
        records: what to measure.
        references: name → (k, out, in) reference gradients.
        in_reference: record id → whether its gradient is part of each of the k references.
        keep_slices: store the slices, not only the norms.
        size: batch limits.
        progress: told how many records are done.
    """
    by_id = {record.id: record for record in records}
    encoded_by_id: dict[str, EncodedRecord] = {}
    rows: dict[str, dict[str, object]] = {}

    def one(batch: Batch) -> None:
        if engine is None:
            with torch.no_grad():
                outputs, readings = target.outputs(batch), None
        else:
            readings = engine.read(batch, references or {})
            outputs = readings.outputs
        chosen = [encoded_by_id[key] for key in batch.ids]
        for i, (each, row) in enumerate(
            zip(chosen, reader.rows([by_id[k] for k in batch.ids], chosen, outputs), strict=True)
        ):
            row |= {
                "id": each.id,
                "n_tokens": each.n_tokens,
                "matrix_norms": [],
                "slice_norms2": [],
                "slice_dots": [],
                "in_reference": list((in_reference or {}).get(each.id, ())),
            }
            if readings is not None:
                row["matrix_norms"] = readings.matrix_norms[i].cpu().numpy()
                if keep_slices:
                    row["slice_norms2"] = readings.norms2[i].cpu().numpy()
                    row["slice_dots"] = readings.dots[i].flatten().cpu().numpy()
            rows[each.id] = row

    columns = schema(reader.columns, double=target.dtype == torch.float64)
    tables, failures = [columns.empty_table()], list[Failure]()
    for encoded in windows(target, records):
        encoded_by_id = {each.id: each for each in encoded.records}
        batches = plan(encoded.records, size or BatchSize(), rows=engine is not None)
        failures += [*encoded.failures, *run(target, batches, one, progress)]
        ordered = [rows.pop(key) for key in encoded_by_id if key in rows]
        tables.append(pa.Table.from_pylist(ordered, schema=columns))
    return Measured(pa.concat_tables(tables).combine_chunks(), tuple(failures))


def embed_bank(
    target: DualEncoderTarget, records: Sequence[Record], size: BatchSize | None = None
) -> Bank:
    """Embeddings of the control pairs that every record's contrastive loss is set against.

    Raises:
        UserError: fewer than two of them can be embedded.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def one(batch: Batch) -> None:
        outputs = target.outputs(batch)
        found.update((key, (outputs.image[i], outputs.text[i])) for i, key in enumerate(batch.ids))

    failures = _stream(target, records, one, size, rows=False)
    if len(found) < 2:
        raise UserError(
            "the bank of negatives holds fewer than two usable pairs"
            + (f". First: {failures[0].error}" if failures else ""),
            target.name,
            "Give more controls, or a bank of its own.",
        )
    # In the records' order, whatever the batches were.
    ordered = [found[record.id] for record in records if record.id in found]
    return Bank(*(torch.stack(side) for side in zip(*ordered, strict=True)))


def sum_gradients(
    target: Target,
    engine: GradientEngine,
    records: Sequence[Record],
    *,
    sums: dict[str, Tensor] | None = None,
    size: BatchSize | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Sum of the records' gradients by matrix (out, in), and the ids that were added to it.

    Args:
        target: the model.
        engine: reads gradients.
        records: whose.
        sums: what to add them to; a new sum when None.
        size: batch limits.
        progress: told how many records are done.
    """
    total = {} if sums is None else sums
    added: list[str] = []

    def one(batch: Batch) -> None:
        engine.add_gradients(batch, total)
        added.extend(batch.ids)

    _stream(target, records, one, size, progress)
    return total, tuple(added)


def score(
    target: Target,
    engine: GradientEngine,
    records: Sequence[Record],
    kept: Mapping[str, MaskedReference],
    *,
    size: BatchSize | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, float], tuple[Failure, ...]]:
    """Mean cosine of each record's kept slices, where storing all slices would be too much."""
    scores: dict[str, float] = {}

    def one(batch: Batch) -> None:
        scores.update(zip(batch.ids, engine.score(batch, kept).tolist(), strict=True))

    failures = _stream(target, records, one, size, progress)
    return scores, tuple(failures)


def _stream(
    target: Target,
    records: Sequence[Record],
    one: Callable[[Batch], None],
    size: BatchSize | None,
    progress: Progress | None = None,
    *,
    rows: bool = True,
) -> list[Failure]:
    """Encode and `run` all records, window by window."""
    failures: list[Failure] = []
    for encoded in windows(target, records):
        batches = plan(encoded.records, size or BatchSize(), rows=rows)
        failures += [*encoded.failures, *run(target, batches, one, progress)]
    return failures


def run(
    target: Target,
    batches: Sequence[Sequence[EncodedRecord]],
    one: Callable[[Batch], None],
    progress: Progress | None = None,
) -> list[Failure]:
    """Take each batch through `one`; what fails together is tried apart, alone is listed.

    Running out of memory halves the batch; so does any other error, until the record that
    causes it stands alone.
    """
    failures: list[Failure] = []
    waiting = [list(batch) for batch in reversed(batches)]
    while waiting:
        records = waiting.pop()
        kind: type[Exception] | None = None
        try:
            one(target.collate(records))
        except UserError:
            raise
        except Exception as error:  # A model may refuse a record in any way it likes.
            problem, kind = _one_line(error), type(error)
        # Only here, where the error's traceback holds the attempt no longer, can it be freed.
        if kind is torch.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
        if kind is not None and len(records) > 1:
            half = 1 if kind is UnevenRows else (len(records) + 1) // 2
            waiting += [records[i : i + half] for i in range(0, len(records), half)][::-1]
            continue
        if kind is not None:
            failures.append(Failure(records[0].id, "model", problem))
        if progress is not None:
            progress(len(records))
    return failures


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
