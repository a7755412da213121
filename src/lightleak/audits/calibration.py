"""GradAudit's masks where slices are too many to keep.

Storing every slice lets any mask be tried later without the model. Where that would take too
much room, each part's cosines are added up on the way and dropped, the masks drawn from the sums,
and every record scored at the kept slices only, in a second pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightleak.audits.models import made
from lightleak.audits.passes import Opened, Pass, Plan, References, load_pass
from lightleak.errors import UserError
from lightleak.evidence import collect
from lightleak.evidence.gradients.kernels import MaskedReference
from lightleak.evidence.readings import slice_axes
from lightleak.evidence.table import SLICE_COLUMNS, gradient_slices
from lightleak.records import Record
from lightleak.runs import Progress, read_json, read_table, write_json, write_table
from lightleak.runs.executors import Executor
from lightleak.runs.folder import whole
from lightleak.runs.progress import Advance
from lightleak.signals import Fit
from lightleak.signals.gradaudit import CosineSums, Rule, choose, cosine_sums, sensitive

# That every record has been scored at the kept slices, and in how many shards.
SCORED = "scored.json"


def rule_of(of: Pass) -> Rule:
    """How the mask is drawn."""
    return choose(of.lora, of.n_references > 1, **of.settings.options_of("gradaudit"))


Sums = list[tuple[CosineSums, CosineSums]]


def take(
    of: Pass, plan: Plan, references: References, table: pa.Table, fits: Sequence[Fit]
) -> tuple[pa.Table, Sums]:
    """Add some records' cosines up, and return them without their slices.

    Args:
        of, plan: the pass.
        references: what the slices are compared with.
        table: evidence of the records.
        fits: what each fold does with them, row by row.
    """
    names = list(plan.shapes)
    slices = gradient_slices(
        lambda: iter([table]),
        table.num_rows,
        slice_axes(plan.shapes),
        references.norms2(names),
        np.array(references.sizes),
        lora=of.lora,
    )
    sums = cosine_sums(slices, fits, rule_of(of))
    numbers = table.schema.field(SLICE_COLUMNS[0]).type
    empty = pa.array([[]] * table.num_rows, numbers)
    for column in SLICE_COLUMNS:
        table = table.set_column(table.schema.get_field_index(column), column, empty)
    return table, sums


def sums_file(of: Pass, index: int) -> Path:
    """Where a shard's sums of cosines lie."""
    return of.folder / f"cosines-{index:05d}.parquet"


def write_sums(of: Pass, index: int, pieces: Sequence[Sums]) -> None:
    """Store the sums of a shard, which are those of its pieces together."""
    sides = [
        reduce(add, side) for fold in zip(*pieces, strict=True) for side in zip(*fold, strict=True)
    ]
    stored = {"total": [each.total for each in sides], "count": [each.count for each in sides]}
    write_table(sums_file(of, index), pa.table(stored))


def claim_rule(of: Pass) -> None:
    """Slices that are dropped were added up for one rule; another is refused.

    Raises:
        UserError: the mask is to be drawn otherwise than when this pass began.
    """
    file, rule = of.folder / "rule.json", asdict(rule_of(of))
    if not file.is_file():
        write_json(file, rule)
    elif read_json(file) != rule:
        raise UserError(
            "its slices were reduced for another mask of gradaudit",
            str(of.folder),
            "Give the same options of gradaudit to go on, or --out another folder.",
        )


@dataclass(frozen=True)
class Scoring:
    """Some records of a fold, scored at the slices that the fold keeps.

    Attributes:
        of, plan: the pass.
        fold: which.
        index: of the shard.
        records: the shard.
    """

    of: Pass
    plan: Plan
    fold: int
    index: int
    records: tuple[Record, ...]

    @property
    def file(self) -> Path:
        """Where the scores go."""
        return self.of.folder / f"scored-gradaudit-{self.fold:02d}-{self.index:05d}.parquet"


def score_kept(
    of: Pass,
    plan: Plan,
    records: Sequence[Record],
    fits: Sequence[Fit],
    progress: Progress,
    executor: Executor,
) -> None:
    """Score every record at the slices that its fold keeps."""
    write_table(_mask_file(of), pa.table({"kept": _masks(of, plan)}))
    jobs = [job for k, fit in enumerate(fits) for job in _cut(of, plan, k, records, fit.scored)]
    with progress.stage("Scoring the kept slices", len(records)) as advance:
        waiting = [job for job in jobs if not whole(job.file)]
        advance(len(records) - sum(len(job.records) for job in waiting))
        executor.map(score_shard, waiting, advance)
    write_json(of.folder / SCORED, {"shards": len(jobs)})


def score_shard(job: Scoring, advance: Advance) -> None:
    """Score a shard at the kept slices, and write it."""
    opened, kept = made((job.of, job.fold), lambda: _open(job))
    assert opened.engine is not None
    scores, _ = collect.score(
        opened.target, opened.engine, job.records, kept, size=job.plan.size, progress=advance
    )
    write_table(job.file, pa.table({"id": list(scores), "score": list(scores.values())}))


def _mask_file(of: Pass) -> Path:
    return of.folder / "mask.parquet"


def _cut(
    of: Pass, plan: Plan, k: int, records: Sequence[Record], scored: NDArray[np.bool_]
) -> Iterator[Scoring]:
    chosen = [records[int(i)] for i in np.flatnonzero(scored)]
    for index, start in enumerate(range(0, len(chosen), plan.shard)):
        yield Scoring(of, plan, k, index, tuple(chosen[start : start + plan.shard]))


def _masks(of: Pass, plan: Plan) -> list[NDArray[np.bool_]]:
    """Each fold's mask, (s,), from the stored sums of all shards."""
    sides: list[CosineSums] = []
    for file in sorted(of.folder.glob("cosines-*.parquet")):
        stored = read_table(file)
        totals = stored["total"].combine_chunks().flatten().to_numpy().reshape(len(stored), -1)
        here = [CosineSums(*each) for each in zip(totals, stored["count"].to_pylist(), strict=True)]
        sides = list(map(add, sides, here)) if sides else here
    gaps = [members.mean - others.mean for members, others in zip(*[iter(sides)] * 2, strict=True)]
    return [sensitive(slice_axes(plan.shapes), each, rule_of(of)) for each in gaps]


def _open(job: Scoring) -> tuple[Opened, dict[str, MaskedReference]]:
    """The pass with its model, and the slices of the fold's reference that are kept, by matrix."""
    of, plan, k = job.of, job.plan, job.fold
    opened = load_pass(of, plan, compared=False)
    device = opened.target.device
    kept = np.array(read_table(_mask_file(of))["kept"][k].as_py())
    gradients = References.read(of.reference_file, device).gradients
    slices: dict[str, list[Tensor]] = {}
    for axis in slice_axes(plan.shapes):
        indices = torch.from_numpy(np.flatnonzero(kept[axis.start : axis.stop]))
        slices.setdefault(axis.matrix, []).append(indices.to(device))
    return opened, {
        name: MaskedReference.keep(gradients[name][k], *axes)
        for name, axes in slices.items()
        if any(len(each) for each in axes)
    }
