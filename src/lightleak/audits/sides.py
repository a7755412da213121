"""The records of an audit, side by side: read, and kept for the cheap half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lightleak import records
from lightleak.audits.settings import AuditSettings
from lightleak.errors import UserError
from lightleak.records import Failure, Record, RecordSet
from lightleak.runs import Progress, Run, write_table


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
