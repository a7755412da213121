"""One pass of one model over the records of a run, into a folder of evidence.

The target makes one; so does each control model, and either with texts shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch

from lightleak.audits.calibration import Calibration, References
from lightleak.audits.settings import AuditSettings
from lightleak.audits.sides import Sides, failures_table
from lightleak.errors import UserError
from lightleak.evidence import collect
from lightleak.evidence.gradients import GradientEngine, Selection, select
from lightleak.evidence.pairs import PairReader
from lightleak.evidence.readings import (
    NEEDS_BANK,
    AugmentedCosines,
    DropoutCosines,
    GradientNorms,
    GradientSlices,
)
from lightleak.evidence.selfcheck import self_check
from lightleak.evidence.tokens import AnswerReader
from lightleak.records import Record
from lightleak.runs import EvidenceStore, Progress, read_json, replacing, write_json, write_table
from lightleak.signals import cross
from lightleak.targets import DualEncoderTarget, Target

_SHARD_RECORDS = 128
_SHARD_BYTES = 256e6


def claim(
    folder: Path, settings: AuditSettings, target: Target, sides: Sides
) -> tuple[EvidenceStore, Selection | None]:
    """The folder's evidence store, refused if it holds evidence of something else."""
    selection = None
    if settings.needs() & {GradientNorms, GradientSlices}:
        selection = select(target, settings.options_of("gradaudit").get("matrices", "auto"))
    decides = _decides(settings, target, sides, selection)
    return EvidenceStore.claim(folder, decides), selection


def measure(
    folder: Path,
    settings: AuditSettings,
    target: Target,
    sides: Sides,
    progress: Progress,
    *,
    of: str = "",
) -> None:
    """Take every record through the model, and store what the signals need.

    Args:
        folder: where the evidence goes; made if it is not there.
        settings: which signals, and how they are fitted.
        target: the model.
        sides: the records, with their folds.
        progress: shows how far it is.
        of: what is measured, in words, where it is not the target.
    """
    store, selection = claim(folder, settings, target, sides)
    size = settings.size
    if isinstance(target, DualEncoderTarget) and sides.bank:
        target.bank = collect.embed_bank(target, sides.bank, size)
    engine = None if selection is None else GradientEngine(target, selection)
    with progress.stage(f"Checking the model{of and ', '}{of}", 1) as advance:
        unreached = self_check(target, engine, sides.records, size)
        advance(1)
    references = None
    if selection is not None:
        engine = GradientEngine(target, selection.without(unreached))
        if not engine.selection.shapes:
            raise UserError("no gradient reaches any selected matrix", "gradaudit.matrices")
        if GradientSlices in settings.needs():
            references = build_references(folder, settings, target, engine, sides, size, progress)
        _describe_gradients(folder, engine.selection, unreached, references)
    _measure_all(store, settings, target, engine, references, sides, size, progress, of)


def needs_bank(settings: AuditSettings, target: Target) -> bool:
    """Whether a signal compares each pair with a bank of negatives."""
    return isinstance(target, DualEncoderTarget) and bool(settings.needs() & NEEDS_BANK)


def _reader(settings: AuditSettings, target: Target) -> collect.Reader:
    """What is kept of the target's outputs, beyond its gradients."""
    if isinstance(target, DualEncoderTarget):
        needs = settings.needs()
        return PairReader(target, AugmentedCosines in needs, DropoutCosines in needs)
    return AnswerReader()


def build_references(
    folder: Path,
    settings: AuditSettings,
    target: Target,
    engine: GradientEngine,
    sides: Sides,
    size: collect.BatchSize,
    progress: Progress,
) -> References:
    """Reference gradients: for fold k the mean over the suspects of the other folds."""
    file = folder / "reference.safetensors"
    described = folder / "reference.json"
    if not described.is_file():
        parts = (
            [sides.side == "member"]
            if settings.protocol == "split"
            else [(sides.side == "suspect") & (sides.folds == k) for k in range(settings.folds)]
        )
        sums: list[dict[str, torch.Tensor]] = []
        added: list[tuple[str, ...]] = []
        with progress.stage("Reference gradient", int(sum(p.sum() for p in parts))) as advance:
            for part in parts:
                chosen = [r for r, inside in zip(sides.records, part, strict=True) if inside]
                total, ids = collect.sum_gradients(
                    target, engine, chosen, size=size, progress=advance
                )
                if not ids:
                    raise UserError("no gradient could be computed for any record of a reference")
                sums.append(total)
                added.append(ids)
        # Crossed fits: reference k is made of every part but the k-th.
        made_of = (
            [[0]]
            if settings.protocol == "split"
            else [[j for j in range(len(parts)) if j != k] for k in range(len(parts))]
        )
        members = [sorted(key for j in made for key in added[j]) for made in made_of]
        gradients = {
            name: torch.stack(
                [
                    torch.stack([sums[j][name] for j in made]).sum(0) / len(members[k])
                    for k, made in enumerate(made_of)
                ]
            ).cpu()
            for name in engine.selection.shapes
        }
        with replacing(file) as stream:
            stream.write(safetensors.torch.save(gradients))
        write_json(described, {"members": members})
    return References(
        safetensors.torch.load_file(file, device=str(target.device)),
        read_json(described)["members"],
    )


def _describe_gradients(
    folder: Path, selection: Selection, unreached: set[str], references: References | None
) -> None:
    """What the gradient columns of the evidence mean."""
    content: dict[str, Any] = {
        "strategy": selection.strategy,
        "matrices": {name: list(shape) for name, shape in selection.shapes.items()},
        "read_one_record_at_a_time": list(selection.dense),
        "without_gradient": sorted(unreached),
    }
    if references is not None:
        content["reference_sizes"] = references.sizes
        norms = pa.table({"norms2": list(references.norms2(list(selection.shapes)))})
        write_table(folder / "reference-norms.parquet", norms)
    write_json(folder / "gradients.json", content)


def _measure_all(
    store: EvidenceStore,
    settings: AuditSettings,
    target: Target,
    engine: GradientEngine | None,
    references: References | None,
    sides: Sides,
    size: collect.BatchSize,
    progress: Progress,
    of: str,
) -> None:
    width = _slice_bytes(engine, references, target)
    keep = width * len(sides.records) <= settings.evidence_limit * 1e9
    calibration = None
    if references is not None and engine is not None and not keep:
        crossed = cross(settings.protocol, settings.folds, sides.side, sides.folds)
        calibration = Calibration(
            store.folder, settings, engine, references, sides.records, crossed
        )
    reader = _reader(settings, target)
    shards = _shards(len(sides.records), width)
    with progress.stage(f"Measuring{of and ', '}{of}", len(sides.records)) as advance:
        for index, (start, stop) in enumerate(shards):
            chosen = sides.records[start:stop]
            if store.has("part", index):
                advance(stop - start)
                continue

            def make(chosen: Sequence[Record] = chosen, index: int = index) -> pa.Table:
                measured = collect.measure(
                    target,
                    engine,
                    reader,
                    chosen,
                    references=None if references is None else references.gradients,
                    in_reference=None
                    if references is None
                    else references.inside(record.id for record in chosen),
                    keep_slices=references is not None,
                    size=size,
                    progress=advance,
                )
                # Failures first: a part that is there tells that its failures are, too.
                write_table(
                    store.folder / f"failed-{index:05d}.parquet", failures_table(measured.failures)
                )
                if calibration is None:
                    return measured.table
                return calibration.take(index, measured.table)

            store.part("part", index, make)
    if calibration is not None:
        calibration.score(target, size, progress)


def _slice_bytes(
    engine: GradientEngine | None, references: References | None, target: Target
) -> int:
    """Bytes that one record's slices take."""
    if engine is None or references is None:
        return 0
    slices = sum(sum(shape) for shape in engine.selection.shapes.values())
    return slices * (8 if target.dtype == torch.float64 else 4) * (1 + len(references.sizes))


def _shards(n: int, bytes_a_record: int) -> list[tuple[int, int]]:
    """Bounds of parts that stay small on disk and in memory; fixed by the run alone."""
    step = int(np.clip(_SHARD_BYTES // max(1, bytes_a_record), 4, _SHARD_RECORDS))
    return [(start, min(start + step, n)) for start in range(0, n, step)]


def _decides(
    settings: AuditSettings, target: Target, sides: Sides, selection: Selection | None
) -> dict[str, Any]:
    """Everything that the evidence depends on."""
    crossed = settings.protocol == "crossfit" and selection is not None
    needs = settings.needs()
    bank = {"bank": [settings.bank_size, settings.seed]} if needs_bank(settings, target) else {}
    return {
        "evidence version": 1,
        **{f"target {key}": value for key, value in sorted(target.hashes.items())},
        **{f"{key} records": value for key, value in sorted(sides.hashes.items())},
        "dtype": str(target.dtype),
        "device kind": target.device.type,
        "batch size": settings.batch_size,
        "protocol": settings.protocol,
        "signals' needs": sorted(each.__name__ for each in needs),
        "gradaudit.matrices": None if selection is None else selection.strategy,
        "folds": [settings.folds, settings.seed] if crossed else None,
        "dropped duplicates": settings.drop_duplicates,
        "embeddings": settings.embeddings,
        "evidence limit": settings.evidence_limit if GradientSlices in needs else None,
        **bank,
    }
