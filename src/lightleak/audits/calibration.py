"""GradAudit's calibration: reference gradients, and masks where slices are too many to keep.

Storing every slice lets any mask be tried later without the model. Where that would take too
much room, each part's cosines are added up on the way and dropped, the masks drawn from the sums,
and every record scored at the kept slices only, in a second pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightleak.audits.settings import AuditSettings
from lightleak.evidence import collect
from lightleak.evidence.gradients import GradientEngine
from lightleak.evidence.gradients.kernels import MaskedReference
from lightleak.evidence.readings import Floats, SliceAxis, slice_axes
from lightleak.evidence.table import SLICE_COLUMNS, gradient_slices
from lightleak.records import Record
from lightleak.runs import Progress, write_table
from lightleak.signals import Fit
from lightleak.signals.gradaudit import CosineSums, Rule, choose, cosine_sums, sensitive
from lightleak.targets import Target


@dataclass(frozen=True)
class References:
    """Reference gradients, one for each fold of `crossfit`, one in all for `split`.

    Attributes:
        gradients: name → (k, out, in), the mean over the records in each.
        members: k lists of record ids.
    """

    gradients: dict[str, Tensor]
    members: Sequence[Sequence[str]]

    @property
    def sizes(self) -> list[int]:
        """(k,) how many records each is the mean of."""
        return [len(each) for each in self.members]

    def inside(self, ids: Iterable[str]) -> dict[str, list[bool]]:
        """Record id → whether it is part of each reference."""
        sets = [set(each) for each in self.members]
        return {key: [key in each for each in sets] for key in ids}

    def norms2(self, names: Sequence[str]) -> Floats:
        """(k, s) squared norms of all rows and columns, laid out as `slice_axes` does."""
        parts = [self.gradients[name].square().sum(axis) for name in names for axis in (2, 1)]
        norms2: Floats = torch.cat(parts, dim=1).cpu().numpy()
        return norms2


@dataclass(frozen=True)
class Calibration:
    """Draws the masks from sums of cosines, part by part, then scores at the kept slices.

    Attributes:
        folder: the evidence folder.
        settings: the audit's.
        engine: reads the gradients.
        references: what they are compared with.
        records, fits: every record, and what each fold does with it.
    """

    folder: Path
    settings: AuditSettings
    engine: GradientEngine
    references: References
    records: Sequence[Record]
    fits: Sequence[Fit]

    @property
    def axes(self) -> tuple[SliceAxis, ...]:
        """What the slices are."""
        return slice_axes(self.engine.selection.shapes)

    @property
    def rule(self) -> Rule:
        """How the mask is drawn."""
        lora = self.engine.selection.strategy.startswith("lora")
        return choose(lora, len(self.fits) > 1, **self.settings.options_of("gradaudit"))

    def take(self, index: int, table: pa.Table) -> pa.Table:
        """Add a part's cosines up, store the sums, and return the part without its slices."""
        row = {record.id: i for i, record in enumerate(self.records)}
        rows = np.array([row[key] for key in table["id"].to_pylist()], dtype=np.int64)
        names = list(self.engine.selection.shapes)
        slices = gradient_slices(
            lambda: iter([table]),
            len(rows),
            self.axes,
            self.references.norms2(names),
            np.array(self.references.sizes),
            lora=self.engine.selection.strategy.startswith("lora"),
        )
        sums = [
            cosine_sums(slices, side[rows], k, self.rule.leave_one_out)
            for k, fit in enumerate(self.fits)
            for side in (fit.members, fit.nonmembers)
        ]
        stored = {"total": [each.total for each in sums], "count": [each.count for each in sums]}
        write_table(self.folder / f"cosines-{index:05d}.parquet", pa.table(stored))
        numbers = table.schema.field(SLICE_COLUMNS[0]).type
        empty = pa.array([[]] * len(rows), numbers)
        for column in SLICE_COLUMNS:
            table = table.set_column(table.schema.get_field_index(column), column, empty)
        return table

    def score(self, target: Target, size: collect.BatchSize, progress: Progress) -> None:
        """Score every record at the slices that its fold keeps; resumes fold by fold."""
        kept = self.masks()
        with progress.stage("Scoring the kept slices", len(self.records)) as advance:
            for k, fit in enumerate(self.fits):
                chosen = [r for r, wanted in zip(self.records, fit.scored, strict=True) if wanted]
                file = self.folder / f"scored-gradaudit-{k:05d}.parquet"
                if file.is_file():
                    advance(len(chosen))
                    continue
                scores, _ = collect.score(
                    target, self.engine, chosen, self.cut(k, kept[k]), size=size, progress=advance
                )
                write_table(file, pa.table({"id": list(scores), "score": list(scores.values())}))

    def masks(self) -> list[NDArray[np.bool_]]:
        """Each fold's mask, (s,), from the stored sums of all parts."""
        parts = [pq.read_table(file) for file in sorted(self.folder.glob("cosines-*.parquet"))]

        def mean(row: int) -> Floats:
            sums = [
                CosineSums(np.array(part["total"][row].as_py()), part["count"][row].as_py())
                for part in parts
            ]
            return reduce(add, sums).mean

        return [
            sensitive(self.axes, mean(2 * k) - mean(2 * k + 1), self.rule)
            for k in range(len(self.fits))
        ]

    def cut(self, k: int, kept: NDArray[np.bool_]) -> dict[str, MaskedReference]:
        """The kept slices of reference k, by matrix."""
        slices: dict[str, list[Tensor]] = {}
        for axis in self.axes:
            indices = torch.from_numpy(np.flatnonzero(kept[axis.start : axis.stop]))
            slices.setdefault(axis.matrix, []).append(indices.to(self.engine.target.device))
        return {
            name: MaskedReference.keep(self.references.gradients[name][k], rows, columns)
            for name, (rows, columns) in slices.items()
            if len(rows) or len(columns)
        }
