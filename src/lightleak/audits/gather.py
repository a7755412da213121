"""The expensive half of an audit: records and a model in, evidence on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lightleak import records
from lightleak.audits.measure import measure
from lightleak.audits.passes import Pass
from lightleak.audits.settings import AuditSettings
from lightleak.audits.sides import Sides, store_records
from lightleak.errors import UserError
from lightleak.records import Failure, Record
from lightleak.runs import Progress, Run, write_json, write_table
from lightleak.runs.executors import Executor
from lightleak.validity.blind import blind_baseline
from lightleak.validity.blind_features import BlindFeatures, blind_features
from lightleak.validity.duplicates import find_duplicates, read_embeddings
from lightleak.validity.verdict import BLIND_PARTS


def gather(run: Run, of: Pass, sides: Sides, progress: Progress, executor: Executor) -> Sides:
    """Compare the sets without the model, then take every record through it.

    Returns:
        The sides as they were examined: with groups, folds and bank.
    """
    sides = examine(run, of.settings, sides, progress, bank=of.banked)
    store_records(run, sides)
    measure(of, sides, progress, executor)
    return sides


def examine(
    run: Run, settings: AuditSettings, sides: Sides, progress: Progress, *, bank: bool = False
) -> Sides:
    """Look at the sets without the model: duplicates, groups, folds and the blind baseline.

    Records that are copies of each other become one group; what was found is stored as evidence.
    Where a `bank` of negatives is needed and none was given, controls are set aside for it.
    """
    with progress.stage("Comparing the sets without the model", 2) as advance:
        pairs, sides = _find_copies(settings, sides)
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
        read = blind_features(chosen, fields=settings.blind_fields, seed=settings.seed)
        store_blind(run, settings.seed, chosen, suspect, read)
        carried = {field for record in chosen for field in record.meta}
        unread = sorted(carried - set(settings.blind_fields))
        write_json(run.evidence / "unread.json", {"fields": unread})
        advance(1)
    return replace(sides, folds=folds)


def _find_copies(settings: AuditSettings, sides: Sides) -> tuple[list[dict[str, str]], Sides]:
    """Pairs of copies across suspects and controls, and the sides with copies grouped."""
    places = np.flatnonzero(sides.audited)
    chosen = [sides.records[i] for i in places]
    embeddings = settings.embeddings and read_embeddings(
        Path(settings.embeddings), [record.id for record in chosen]
    )
    found = find_duplicates(chosen, sides.side[places] == "suspect", embeddings=embeddings)
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


def store_blind(
    run: Run,
    seed: int,
    chosen: Sequence[Record],
    suspect: NDArray[np.bool_],
    read: BlindFeatures,
) -> None:
    """Try to tell the sets apart by what can be read without the model, and store how that went."""
    features = np.zeros((len(chosen), 0))
    try:
        blind = blind_baseline(read, suspect, [record.group for record in chosen], seed=seed)
    except UserError as error:
        content: dict[str, Any] = {"unknown": str(error)}
    else:
        features = blind.features
        content = {
            part: {"auc": each.value, "auc_ci95": [each.low, each.high]}
            for part, each in (
                *((part, getattr(blind, part)) for part in BLIND_PARTS),
                ("stronger", blind.auc),
            )
        }
        content["p_value"] = blind.p_value
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
