"""One pass of one model over the records of a run, into a folder of evidence: the driver's side.

Every step is a list of jobs (`runs.executors`); what a job needs and does is in `passes`,
`references` and `calibration`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lightleak.audits.calibration import (
    Sums,
    claim_rule,
    score_kept,
    sums_file,
    take,
    write_sums,
)
from lightleak.audits.manifest import version
from lightleak.audits.passes import Check, Pass, Plan, check, open_pass
from lightleak.audits.references import build_references
from lightleak.audits.sides import Sides, failures_table
from lightleak.evidence import collect
from lightleak.evidence.readings import GradientSlices
from lightleak.records import Failure, Record
from lightleak.runs import EvidenceStore, Progress, read_table, write_json, write_table
from lightleak.runs.executors import Executor
from lightleak.runs.folder import sha256, whole
from lightleak.runs.progress import Advance
from lightleak.signals import Fit, cross

# So many records are looked through for a few that the model takes.
_SAMPLE = 64


def claim(of: Pass, sides: Sides) -> None:
    """Take the folder for this pass.

    Raises:
        UserError: it holds evidence of something else.
    """
    EvidenceStore.claim(of.folder, _decides(of, sides))


def measure(of: Pass, sides: Sides, progress: Progress, executor: Executor) -> None:
    """Take every record through the model, and store what the signals need.

    Args:
        of: the pass; its folder is there.
        sides: the records, with their folds.
        progress: shows how far it is.
        executor: does the jobs.
    """
    claim(of, sides)
    what = of.of and f", {of.of}"
    plan = Plan.stored(of.folder)
    if plan is None:
        first = Check(of, sides.records[:_SAMPLE], sides.bank, len(sides.records), executor.share)
        with progress.stage(f"Checking the model{what}", 1) as advance:
            (plan,) = executor.map(check, [first], advance)
    if plan.one_by_one:
        names = ", ".join(plan.one_by_one[:2]) + " …" * (len(plan.one_by_one) > 2)
        progress.note(
            f"Records go one at a time, which is slow: {names} can be read in no other way. "
            "gradaudit.matrices chooses others."
        )
    inside: list[set[str]] = []
    if of.slices:
        inside = build_references(of, plan, sides, progress, executor)
    if of.matrices is not None:
        _describe_gradients(of, plan, [len(each) for each in inside])
    fits = None
    if inside and not plan.keep:
        claim_rule(of)
        fits = cross(of.settings.protocol, of.settings.folds, sides.side, sides.folds)
    shards = list(_shards(of, plan, sides.records, inside, fits))
    written = {*of.folder.glob("part-*.parquet"), *of.folder.glob("cosines-*.parquet")}
    for stray in written - {file for each in shards for file in each.files}:
        stray.unlink()
    with progress.stage(f"Measuring{what}", len(sides.records)) as advance:
        waiting = [each for each in shards if not each.done()]
        advance(len(sides.records) - sum(len(each.records) for each in waiting))
        executor.map(measure_shard, waiting, advance)
    if fits is not None:
        score_kept(of, plan, sides.records, fits, progress, executor)


@dataclass(frozen=True)
class Shard:
    """Some records that are measured and written together.

    Attributes:
        of, plan: the pass.
        index: of its part.
        records: the shard.
        inside: record id → whether its gradient is part of each reference.
        fits: what each fold does with these records, where slices are not stored.
    """

    of: Pass
    plan: Plan
    index: int
    records: tuple[Record, ...]
    inside: dict[str, list[bool]]
    fits: tuple[Fit, ...] | None

    @property
    def failures(self) -> Path:
        """Where the shard's failures go."""
        return self.of.folder / f"failed-{self.index:05d}.parquet"

    @property
    def part(self) -> Path:
        """Where its evidence goes."""
        return EvidenceStore(self.of.folder).file("part", self.index)

    @property
    def files(self) -> list[Path]:
        """All that it leaves."""
        sums = [] if self.fits is None else [sums_file(self.of, self.index)]
        return [self.part, self.failures, *sums]

    def done(self) -> bool:
        """Whether everything of it is there and whole, and about these records."""
        damaged = [file for file in self.files if not whole(file)]  # Each makes room for a new one.
        if damaged:
            return False
        found = [
            key for file in self.files[:2] for key in read_table(file, ["id"])["id"].to_pylist()
        ]
        return sorted(found) == sorted(record.id for record in self.records)


def measure_shard(shard: Shard, advance: Advance) -> None:
    """Take a shard through the model, and write its part."""
    of, plan = shard.of, shard.plan
    opened = open_pass(of, plan, compared=of.slices)
    references = opened.references
    tables: list[pa.Table] = []
    failures: list[Failure] = []
    sums: list[Sums] = []
    # Slices that are dropped are held only for a piece of the shard.
    step = plan.shard if shard.fits is None else plan.piece
    for start in range(0, len(shard.records), step):
        measured = collect.measure(
            opened.target,
            opened.engine,
            opened.reader,
            shard.records[start : start + step],
            references=None if references is None else references.gradients,
            in_reference=shard.inside if of.slices else None,
            keep_slices=of.slices,
            size=plan.size,
            progress=advance,
        )
        table = measured.table
        if shard.fits is not None and references is not None:
            place = {record.id: i for i, record in enumerate(shard.records)}
            rows = [place[key] for key in table["id"].to_pylist()]
            table, cosines = take(
                of, plan, references, table, [fit.rows(rows) for fit in shard.fits]
            )
            sums.append(cosines)
        tables.append(table)
        failures += measured.failures
    if sums:
        write_sums(of, shard.index, sums)
    # Failures first: a part that is there tells that its failures are, too.
    write_table(shard.failures, failures_table(failures))
    write_table(shard.part, pa.concat_tables(tables))


def _shards(
    of: Pass,
    plan: Plan,
    records: Sequence[Record],
    inside: Sequence[set[str]],
    fits: Sequence[Fit] | None,
) -> Iterator[Shard]:
    for index, start in enumerate(range(0, len(records), plan.shard)):
        rows = range(start, min(start + plan.shard, len(records)))
        chosen = tuple(records[i] for i in rows)
        yield Shard(
            of,
            plan,
            index,
            chosen,
            {record.id: [record.id in each for each in inside] for record in chosen},
            None if fits is None else tuple(fit.rows(rows) for fit in fits),
        )


def _describe_gradients(of: Pass, plan: Plan, reference_sizes: list[int]) -> None:
    """What the gradient columns of the evidence mean."""
    content: dict[str, Any] = {
        "strategy": of.matrices,
        "matrices": {name: list(shape) for name, shape in plan.shapes.items()},
        "read_one_record_at_a_time": list(plan.one_by_one),
        "without_gradient": list(plan.unreached),
    }
    if reference_sizes:
        content["reference_sizes"] = reference_sizes
    write_json(of.folder / "gradients.json", content)


def _decides(of: Pass, sides: Sides) -> dict[str, Any]:
    """Everything that the evidence depends on, save the plan, which is kept beside it."""
    settings, model = of.settings, of.description
    crossed = settings.protocol == "crossfit" and of.matrices is not None
    needs = settings.needs()
    bank = {"bank or seed": [settings.bank_size, settings.seed]} if of.banked else {}
    return {
        "evidence version": 3,
        **{f"version of {name}": version(name) for name in _CODE},
        **{f"target {key}": value for key, value in sorted(model.hashes.items())},
        **{f"{key} records": value for key, value in sorted(sides.hashes.items())},
        "dtype": model.dtype,
        "device kind": model.device.partition(":")[0],
        "attention": model.attention,
        "batch size": settings.batch_size,
        "protocol": settings.protocol,
        "signals' needs": sorted(each.__name__ for each in needs),
        "gradaudit.matrices": of.matrices,
        "folds or seed": [settings.folds, settings.seed] if crossed else None,
        "dropped duplicates": settings.drop_duplicates,
        "embeddings": settings.embeddings and sha256(Path(settings.embeddings)),
        "evidence limit": settings.evidence_limit if GradientSlices in needs else None,
        **bank,
    }


_CODE = ("lightleak", "torch", "transformers", "peft")
