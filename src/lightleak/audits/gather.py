"""The expensive half of an audit: records and a model in, evidence on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from numpy.typing import NDArray

from lightleak import records
from lightleak.audits.calibration import Calibration, References
from lightleak.audits.settings import AuditSettings
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
from lightleak.records import Failure, Record, RecordSet
from lightleak.runs import (
    EvidenceStore,
    Progress,
    Run,
    read_json,
    replacing,
    write_json,
    write_table,
)
from lightleak.signals import cross
from lightleak.targets import DualEncoderTarget, Target
from lightleak.validity.blind import blind_baseline
from lightleak.validity.duplicates import find_duplicates

_SHARD_RECORDS = 128
_SHARD_BYTES = 256e6


@dataclass(frozen=True)
class Sides:
    """The usable records of all sides, in one order that everything follows.

    Attributes:
        records: with ids made unique by their side, "suspect/a1".
        side: (n,) suspect, control, or in a split also member and nonmember (the calibration).
        folds: (n,) −1 for calibration records; all −1 until `examine` has found the groups.
        failures: what could not be used, ids likewise.
        hashes: content hash of each side.
        bank: controls, or pairs of their own, that are a dual encoder's negatives and not audited.
    """

    records: tuple[Record, ...]
    side: NDArray[np.str_]
    folds: NDArray[np.int64]
    failures: tuple[Failure, ...]
    hashes: dict[str, str]
    bank: tuple[Record, ...] = ()

    @property
    def audited(self) -> NDArray[np.bool_]:
        """(n,) suspects and controls, not calibration records."""
        return np.isin(self.side, ("suspect", "control"))


def read_sides(settings: AuditSettings, progress: Progress) -> Sides:
    """Load the records of every side and decode every image once."""
    sources = {
        "suspect": settings.suspect,
        "control": settings.control,
        "member": settings.calibration_members,
        "nonmember": settings.calibration_nonmembers,
        "bank": settings.bank,
    }
    chosen = {side: source for side, source in sources.items() if source is not None}
    sets: dict[str, RecordSet] = {}
    with progress.stage("Reading records", len(chosen)) as advance:
        for name, source in chosen.items():
            loaded = records.load(
                source,
                allow_outside=settings.allow_outside,
                strict=settings.strict,
                id_prefix=f"{name}/",
            )
            sets[name] = records.readable(loaded, strict=settings.strict)
            if not sets[name].records:
                first = sets[name].failures[0].error if sets[name].failures else ""
                raise UserError(f"none of its records can be used. First: {first}", str(source))
            advance(1)
    everyone = [(record, name) for name, each in sets.items() for record in each.records]
    kept = [(record, name) for record, name in everyone if name != "bank"]
    return Sides(
        tuple(record for record, _ in kept),
        np.array([name for _, name in kept]),
        np.full(len(kept), -1),
        tuple(failure for each in sets.values() for failure in each.failures),
        {name: each.sha256 for name, each in sets.items()},
        tuple(record for record, name in everyone if name == "bank"),
    )


def examine(
    run: Run, settings: AuditSettings, sides: Sides, progress: Progress, *, bank: bool = False
) -> Sides:
    """Look at the sets without the model: duplicates, groups, folds and the blind baseline.

    Records that are copies of each other become one group; what was found is stored as evidence.
    Where a `bank` of negatives is needed and none was given, controls are set aside for it.
    """
    with progress.stage("Comparing the sets without the model", 2) as advance:
        pairs, sides = _find_copies(sides)
        if settings.drop_duplicates and pairs:
            known = {record.id for record in sides.records}
            double = {pair[side] for pair in pairs for side in ("suspect", "control")} & known
            sides = _without(sides, double, "duplicate", "it stands on both sides and was left out")
            pairs = []
        write_json(run.evidence / "duplicates.json", {"across": pairs})
        if bank and not sides.bank:
            sides = _set_bank_aside(settings, sides)
        advance(1)
        audited = sides.audited
        chosen = [sides.records[i] for i in np.flatnonzero(audited)]
        suspect = sides.side[audited] == "suspect"
        folds = sides.folds.copy()
        groups = [record.group for record in chosen]
        folds[audited] = records.assign_folds(suspect, groups, settings.folds, settings.seed)
        _store_blind(run, settings, chosen, suspect)
        advance(1)
    return replace(sides, folds=folds)


def _find_copies(sides: Sides) -> tuple[list[dict[str, str]], Sides]:
    """Pairs of copies across suspects and controls, and the sides with copies grouped."""
    places = np.flatnonzero(sides.audited)
    chosen = [sides.records[i] for i in places]
    found = find_duplicates(chosen, sides.side[places] == "suspect")
    pairs = []
    for pair in found.across:
        control, suspect = sorted((chosen[pair.first].id, chosen[pair.second].id))
        pairs.append({"suspect": suspect, "control": control, "kind": pair.kind})
    pairs += _calibration_copies(sides)
    everyone = list(sides.records)
    for place, group in zip(places, found.groups, strict=True):
        everyone[place] = replace(everyone[place], group=str(group))
    return pairs, replace(sides, records=tuple(everyone))


def _calibration_copies(sides: Sides) -> list[dict[str, str]]:
    """Audited records that calibrate, too: they would be scored by what was fitted on them."""
    everyone = (*sides.records, *sides.bank)
    is_audited = np.concatenate([sides.audited, np.zeros(len(sides.bank), bool)])
    if is_audited.all():
        return []
    pairs = []
    for pair in find_duplicates(everyone, is_audited).across:
        first, second = (everyone[i].id for i in (pair.first, pair.second))
        audited, other = (first, second) if is_audited[pair.first] else (second, first)
        where = "record of the bank" if other.startswith("bank/") else "calibration record"
        kind = f"{pair.kind} as a {where}"
        pairs.append({"suspect": audited, "control": other, "kind": kind})
    return pairs


def _set_bank_aside(settings: AuditSettings, sides: Sides) -> Sides:
    """Take whole groups of controls, drawn at random, out of the audit to be its negatives.

    A control in the bank would meet itself there, which no suspect does: it cannot be audited.
    """
    controls = np.flatnonzero(sides.side == "control")
    wanted = min(settings.bank_size, len(controls) // 5)
    # Each group by its first id, so that the order of the file does not choose the bank.
    names: dict[str, str] = {}
    for record in sorted((sides.records[i] for i in controls), key=lambda each: each.id):
        names.setdefault(record.group or record.id, record.id)
    groups = np.array([names[sides.records[i].group or sides.records[i].id] for i in controls])
    drawn: list[int] = []
    for group in np.random.default_rng([settings.seed, 3]).permutation(np.unique(groups)):
        if len(drawn) >= wanted:
            break
        drawn += controls[groups == group].tolist()
    kept = np.ones(len(sides.records), bool)
    kept[drawn] = False
    return replace(
        sides,
        records=tuple(sides.records[i] for i in np.flatnonzero(kept)),
        side=sides.side[kept],
        folds=sides.folds[kept],
        bank=tuple(sides.records[i] for i in sorted(drawn)),
    )


def _store_blind(
    run: Run, settings: AuditSettings, chosen: Sequence[Record], suspect: NDArray[np.bool_]
) -> None:
    features = np.zeros((len(chosen), 0))
    try:
        blind = blind_baseline(chosen, suspect, seed=settings.seed)
    except UserError as error:
        content: dict[str, Any] = {"unknown": str(error)}
    else:
        features = blind.features
        content = {
            part: {"auc": each.value, "auc_ci95": [each.low, each.high]}
            for part, each in (("text", blind.text), ("image", blind.image), ("joint", blind.joint))
        }
        content["differences"] = [
            {
                "feature": each.feature,
                "sentence": each.sentence,
                "auc": each.auc,
                "p_value_adjusted": each.adjusted_p,
            }
            for each in blind.differences
        ]
    write_json(run.evidence / "blind.json", content)
    table = pa.table({"id": [r.id for r in chosen], "features": list(features)})
    write_table(run.evidence / "blind.parquet", table)


def _without(sides: Sides, ids: set[str], stage: str, why: str) -> Sides:
    kept = np.array([record.id not in ids for record in sides.records])
    return replace(
        sides,
        records=tuple(r for r, keep in zip(sides.records, kept, strict=True) if keep),
        side=sides.side[kept],
        folds=sides.folds[kept],
        failures=(*sides.failures, *(Failure(key, stage, why) for key in sorted(ids))),
    )


def store_records(run: Run, sides: Sides) -> None:
    """Keep what the report and the statistics need of the records, without their images."""
    table = pa.table(
        {
            "id": [record.id for record in sides.records],
            "set": sides.side.tolist(),
            "fold": sides.folds.tolist(),
            "group": pa.array([record.group for record in sides.records], pa.string()),
            "prompt": [record.prompt for record in sides.records],
            "text": [record.text for record in sides.records],
            "image": pa.array(
                [
                    str(r.image.resolve()) if isinstance(r.image, Path) else None
                    for r in sides.records
                ],
                pa.string(),
            ),
        }
    )
    write_table(run.evidence / "records.parquet", table)
    write_table(
        run.evidence / "bank.parquet",
        pa.table({"id": pa.array([r.id for r in sides.bank], pa.string())}),
    )
    write_table(run.evidence / "unusable.parquet", failures_table(sides.failures))


def failures_table(failures: Sequence[Failure]) -> pa.Table:
    """Failures as they are stored."""
    return pa.table(
        {name: pa.array([getattr(f, name) for f in failures], pa.string()) for name in _FAILURE}
    )


_FAILURE = ("id", "stage", "error")


def claim(
    run: Run, settings: AuditSettings, target: Target, sides: Sides
) -> tuple[EvidenceStore, Selection | None]:
    """The run's evidence store, refused if it holds evidence of something else."""
    selection = None
    if settings.needs() & {GradientNorms, GradientSlices}:
        selection = select(target, settings.options_of("gradaudit").get("matrices", "auto"))
    decides = _decides(settings, target, sides, selection)
    return EvidenceStore.claim(run.evidence, decides), selection


def gather(
    run: Run,
    settings: AuditSettings,
    target: Target,
    sides: Sides,
    progress: Progress,
) -> None:
    """Compare the sets without the model, take every record through it, and store what comes."""
    store, selection = claim(run, settings, target, sides)
    sides = examine(run, settings, sides, progress, bank=_needs_bank(settings, target))
    store_records(run, sides)
    size = settings.size
    if isinstance(target, DualEncoderTarget) and sides.bank:
        target.bank = collect.embed_bank(target, sides.bank, size)
    engine = None if selection is None else GradientEngine(target, selection)
    with progress.stage("Checking the model", 1) as advance:
        unreached = self_check(target, engine, sides.records, size)
        advance(1)
    references = None
    if selection is not None:
        engine = GradientEngine(target, selection.without(unreached))
        if not engine.selection.shapes:
            raise UserError("no gradient reaches any selected matrix", "gradaudit.matrices")
        if GradientSlices in settings.needs():
            references = build_references(run, settings, target, engine, sides, size, progress)
        _describe_gradients(run, engine.selection, unreached, references)
    _measure_all(store, settings, target, engine, references, sides, size, progress)


def _needs_bank(settings: AuditSettings, target: Target) -> bool:
    return isinstance(target, DualEncoderTarget) and bool(settings.needs() & NEEDS_BANK)


def _reader(settings: AuditSettings, target: Target) -> collect.Reader:
    """What is kept of the target's outputs, beyond its gradients."""
    if isinstance(target, DualEncoderTarget):
        needs = settings.needs()
        return PairReader(target, AugmentedCosines in needs, DropoutCosines in needs)
    return AnswerReader()


def build_references(
    run: Run,
    settings: AuditSettings,
    target: Target,
    engine: GradientEngine,
    sides: Sides,
    size: collect.BatchSize,
    progress: Progress,
) -> References:
    """Reference gradients: for fold k the mean over the suspects of the other folds."""
    file = run.evidence / "reference.safetensors"
    described = run.evidence / "reference.json"
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
    run: Run, selection: Selection, unreached: set[str], references: References | None
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
        write_table(run.evidence / "reference-norms.parquet", norms)
    write_json(run.evidence / "gradients.json", content)


def _measure_all(
    store: EvidenceStore,
    settings: AuditSettings,
    target: Target,
    engine: GradientEngine | None,
    references: References | None,
    sides: Sides,
    size: collect.BatchSize,
    progress: Progress,
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
    with progress.stage("Measuring", len(sides.records)) as advance:
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
    bank = {"bank": [settings.bank_size, settings.seed]} if _needs_bank(settings, target) else {}
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
        "evidence limit": settings.evidence_limit if GradientSlices in needs else None,
        **bank,
    }
