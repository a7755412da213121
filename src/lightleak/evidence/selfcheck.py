"""Before anything is spent: does the model see what it should, and nothing else?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import ImageChops
from torch import Tensor

from lightleak.errors import UserError
from lightleak.evidence.collect import BatchSize, plan, run
from lightleak.evidence.gradients import GradientEngine, Selection
from lightleak.evidence.gradients.rows import UnevenRows
from lightleak.records import Record, open_rgb
from lightleak.targets import Batch, EncodedRecord, Target

# Largest difference between a record alone and in a batch, relative to 1 + |value|.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_HALF_TOLERANCE = 5e-2
_SAMPLE, _TRIED = 8, 64


@dataclass(frozen=True)
class Checked:
    """What the check found that the run must know.

    Attributes:
        tokens: mean of the records that were tried.
        selection: what is read of the gradients after all; None where none are.
        unreached: selected matrices that no gradient reaches (the last vision block of a LLaVA
            that takes its features one block earlier, say).
        one_by_one: selected matrices for whose sake records go through one at a time: parameters
            outside the layers that are read by record, or else the first layer met whose rows
            cannot be dealt out to records; none where records go together.
        unseen: selected parameters that are used past their own layers, so that only autograd
            sees their gradient whole.
    """

    tokens: float
    selection: Selection | None
    unreached: set[str]
    one_by_one: tuple[str, ...]
    unseen: set[str]


def self_check(
    target: Target,
    engine: GradientEngine | None,
    records: Sequence[Record],
    size: BatchSize,
) -> Checked:
    """Check a target on a few records.

    Args:
        target: the model.
        engine: its gradient engine, when gradients will be read.
        records: the run's; the first eight that the model takes are used.
        size: the batches that will be used.

    Raises:
        UserError: the model takes no record, the image does not reach it, the adapter changes
            nothing, or a record's reading depends on its batch.
    """
    sample = _that_run(target, records)
    encoded = [each for _, each in sample]
    _check_image(target, *sample[0])
    if target.has_adapter:
        _check_adapter(target, encoded[0])
    uneven = _check_batches(target, engine, encoded, size)
    tokens = sum(each.n_tokens for each in encoded) / len(encoded)
    if engine is None:
        return Checked(tokens, None, set(), (), set())
    alone = [target.collate([record]) for record in encoded]
    unseen = engine.unseen(alone[0])
    unreached = GradientEngine(target, engine.selection.whole(unseen)).unreached(alone)
    unseen -= unreached
    selection = engine.selection.without(unreached).whole(unseen)
    return Checked(tokens, selection, unreached, selection.dense or uneven, unseen)


def _that_run(target: Target, records: Sequence[Record]) -> list[tuple[Record, EncodedRecord]]:
    """The first eight records that the model takes, alone, with a finite result."""
    found: list[tuple[Record, EncodedRecord]] = []
    reasons: list[str] = []
    for record in records[:_TRIED]:
        try:
            encoded = target.encode(record, open_rgb(record.image))
            (said,) = _said(target, target.collate([encoded]))
        except Exception as error:
            # The run itself will list it; here its reason matters only if all fail.
            reasons.append(str(error))
            continue
        if not bool(said.isnan().any()):
            found.append((record, encoded))
        if len(found) == _SAMPLE:
            break
    if not found:
        reason = reasons[0] if reasons else "what it yields are not numbers"
        raise UserError(f"no record can be given to the model. First: {reason}", target.name)
    return found


def _check_image(target: Target, record: Record, encoded: EncodedRecord) -> None:
    other = target.encode(record, ImageChops.invert(open_rgb(record.image)))
    seen, changed = (_said(target, target.collate([each])) for each in (encoded, other))
    if torch.equal(seen[0], changed[0]):
        raise UserError(
            "the image does not reach the model: inverting it changes nothing",
            target.name,
            "Check that the chat template holds the model's image placeholder.",
        )


def _check_adapter(target: Target, encoded: EncodedRecord) -> None:
    batch = target.collate([encoded])
    on = _said(target, batch)[0]
    with target.model.disable_adapter():
        off = _said(target, batch)[0]
    if torch.equal(on, off):
        raise UserError(
            "the adapter changes nothing: with and without it the model says the same",
            target.name,
            "Is it trained, and made for this base?",
        )


def _check_batches(
    target: Target,
    engine: GradientEngine | None,
    encoded: Sequence[EncodedRecord],
    size: BatchSize,
) -> tuple[str, ...]:
    """Compare records alone and together; returns the layers whose rows keep them apart."""
    tolerance = _TOLERANCE.get(target.dtype, _HALF_TOLERANCE)
    alone = {
        record.id: _readings(target, engine, target.collate([record]))[0] for record in encoded
    }
    uneven: dict[str, None] = {}

    def one(batch: Batch) -> None:
        if len(batch) == 1:
            return
        try:
            together = _readings(target, engine, batch)
        except UnevenRows as error:
            uneven.update(dict.fromkeys(error.args))
            raise
        for key, reading in zip(batch.ids, together, strict=True):
            worst = float(((reading - alone[key]).abs() / (1 + alone[key].abs())).max())
            if not worst <= tolerance:
                raise UserError(
                    f"record {key} reads differently alone and in a batch (by {worst:.1e})",
                    target.name,
                    "Run with --batch-size 1.",
                )

    # As the run does: apart where they do not fit, or their rows cannot be dealt out.
    run(target, plan(encoded, size), one)
    return tuple(uneven)


def _readings(target: Target, engine: GradientEngine | None, batch: Batch) -> list[Tensor]:
    """What is compared, one vector a record: what evidence is made of, and log norms."""
    if engine is None:
        return _said(target, batch)
    readings = engine.read(batch, {})
    norms = readings.matrix_norms.clamp_min(1e-12).log()
    return [torch.cat(each) for each in zip(readings.outputs.vectors(), norms, strict=True)]


def _said(target: Target, batch: Batch) -> list[Tensor]:
    with torch.no_grad():
        return target.outputs(batch).vectors()
