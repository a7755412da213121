"""Before anything is spent: what an audit will take, and what it could find.

The audit's own passes deal out their jobs. Of each kind a few records are done, by the clock and
in a folder that is thrown away; the rest is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch

from lightleak import statistics as st
from lightleak.audits import judge
from lightleak.audits.calibration import Scoring, score_shard
from lightleak.audits.gather import gather
from lightleak.audits.gather_controls import gather_control_models, gather_shuffled
from lightleak.audits.gather_references import gather_compared, references_of
from lightleak.audits.gather_shares import Product, Slab, multiply, take_gradients
from lightleak.audits.measure import Shard, measure_shard
from lightleak.audits.models import released
from lightleak.audits.passes import begin, open_pass
from lightleak.audits.references import Block, sum_block
from lightleak.audits.set_tests import crosses_folds
from lightleak.audits.settings import AuditSettings
from lightleak.audits.sides import Sides, read_sides
from lightleak.audits.stored import Compared
from lightleak.evidence import collect, memory
from lightleak.evidence.gradients.rows import UnevenRows
from lightleak.records import Record
from lightleak.runs import Progress, Run, Silent
from lightleak.runs.executors import Executor, Job, Perform, Result
from lightleak.runs.progress import Advance
from lightleak.signals import Fit
from lightleak.validity.verdict import Design, Finding, SignalFinding, Tier, decide

# Records that are done by the clock: what fills the time, within these bounds.
_SECONDS, _FEWEST, _MOST = 10.0, 8, 64
# Records done before the clock is read, which open and choose what all others use.
_FIRST = 2
# Records, and numbers of each, by which products of gradients are timed.
_PRODUCT = (256, 65_536)
_AREAS = (0.55, 0.60, 0.70)
_DESIGNS: tuple[Design, ...] = ("randomised", "held-out", "observational")


@dataclass(frozen=True)
class Step:
    """One step of one pass over the records.

    Attributes:
        of: the model and the texts: "target", "the base, texts shuffled".
        what: which step.
        records, shards: how many, in how many jobs.
        tried: records that were done by the clock.
        opening_seconds: until the first record is in hand: loading and checking the model.
        seconds_a_record, seconds_a_shard: of one process.
        evidence_bytes: what it leaves on the disk.
        scratch_bytes: what it takes there meanwhile.
    """

    of: str
    what: str
    records: int
    shards: int
    tried: int
    opening_seconds: float
    seconds_a_record: float
    seconds_a_shard: float
    evidence_bytes: int
    scratch_bytes: int

    def seconds(self, workers: int) -> float:
        """In all, with so many processes; some wait while the last shards are done."""
        work = self.records * self.seconds_a_record + self.shards * self.seconds_a_shard
        return self.opening_seconds + work * -(-self.shards // workers) / self.shards


@dataclass(frozen=True)
class Memory:
    """Bytes that one process holds where the model computes, beside the program itself.

    Attributes:
        weights: of the largest model.
        batch: of the largest step over a batch, the references that it is compared with included.
    """

    weights: int
    batch: int


@dataclass(frozen=True)
class Power:
    """What these numbers of records can find.

    Attributes:
        signal, alpha: the pre-registered primary signal, and the level of its test.
        suspects, controls: usable records.
        suspect_groups, control_groups: how many independent ones would tell as much.
        min_detectable_auc: the least AUC that is found with 90 % probability, as in the verdict;
            None where none is.
        needed: AUC → independent records a side with which it is found as surely.
        asked: the AUC that must be found as surely before anything is read into a null result.
    """

    signal: str
    alpha: float
    suspects: int
    controls: int
    suspect_groups: int
    control_groups: int
    min_detectable_auc: float | None
    needed: dict[str, int]
    asked: float


@dataclass(frozen=True)
class Prospect:
    """What the verdict can be under a design.

    Attributes:
        design: as it would be declared.
        tier: what the records bear out.
        if_found, if_not: the verdict where the test that counts rejects, and where it does not.
        reasons: why this tier, or why there can be no answer.
    """

    design: Design
    tier: Tier
    if_found: Finding
    if_not: Finding
    reasons: tuple[str, ...]

    @property
    def hopeless(self) -> bool:
        """Whether no answer is possible, whatever the model shows."""
        return {self.if_found, self.if_not} == {"inconclusive"}


@dataclass(frozen=True)
class Forecast:
    """What an audit will take, and what it could find.

    Attributes:
        target, dtype, device: the model and how it computes.
        workers: processes at once.
        steps: in the order of the audit. Scoring and testing afterwards are left out.
        reading_seconds: for reading and comparing the records, which was done in full.
        memory: of the process that needs most.
        evidence_bytes: what all steps leave on the disk.
        scratch_bytes: the most that one of them takes there meanwhile.
        power: what these numbers of records can find.
        prospects: by design; the declared one first.
    """

    target: str
    dtype: str
    device: str
    workers: int
    steps: tuple[Step, ...]
    reading_seconds: float
    memory: Memory
    evidence_bytes: int
    scratch_bytes: int
    power: Power
    prospects: tuple[Prospect, ...]

    @property
    def seconds(self) -> float:
        """Of all steps; an estimate."""
        return self.reading_seconds + sum(step.seconds(self.workers) for step in self.steps)


def plan(
    *,
    target: str | Path,
    suspect: str | Path,
    control: str | Path,
    options: Mapping[str, Mapping[str, Any]] | Iterable[str] = (),
    progress: Progress | None = None,
    **settings: Any,
) -> Forecast:
    """What would an audit with these settings take, and what could it find?

    Nothing is left behind.

    Args:
        target: a model folder or hub id.
        suspect: records that may have been trained on.
        control: records of the same kind that were not.
        options: of signals, {"mink": {"k": 0.1}} or ["mink.k=0.1"].
        progress: shows how far it is.
        settings: any other attribute of `AuditSettings`.

    Raises:
        UserError: input that cannot be used, with what to do about it.
    """
    chosen = AuditSettings.read(
        target=target, suspect=suspect, control=control, options=options, **settings
    )
    progress = progress or Silent()
    others, references = chosen.control_models(), references_of(chosen, progress)
    begun = perf_counter()
    sides = read_sides(chosen, progress)
    with (
        TemporaryDirectory(prefix="lightleak-plan-") as folder,
        chosen.executor_of() as executor,
        released(),
    ):
        reading = perf_counter() - begun
        run, rehearsal = Run.create(folder), _Rehearsal(executor)
        of = begin(run.evidence, chosen, sides, Silent(), rehearsal)
        chosen, own = of.settings, of.description
        with progress.stage("Taking a few records through the model", 1 + len(others)) as advance:
            begun, rehearsal.spent = perf_counter(), 0.0
            sides = gather(run, of, sides, Silent(), rehearsal)
            reading += perf_counter() - begun - rehearsal.spent
            if chosen.negative_controls:
                gather_shuffled(run, of, sides, Silent(), rehearsal, "")
            advance(1)
            for name, where in others.items():
                gather_control_models(run, of, {name: where}, sides, Silent(), rehearsal)
                advance(1)
            gather_compared(run, of, others, references, sides, Silent(), rehearsal)
        kept = sum(file.stat().st_size for file in run.evidence.rglob("*") if file.is_file())
        return Forecast(
            chosen.target,
            own.dtype.removeprefix("torch."),
            own.device,
            executor.workers,
            tuple(rehearsal.steps),
            reading,
            max(rehearsal.memory, key=lambda each: each.weights + each.batch),
            kept - rehearsal.tried + sum(step.evidence_bytes for step in rehearsal.steps),
            max(step.scratch_bytes for step in rehearsal.steps),
            *_outlook(run, chosen, sides),
        )


# -- what it could find -----------------------------------------------------------------------


def _outlook(run: Run, settings: AuditSettings, sides: Sides) -> tuple[Power, tuple[Prospect, ...]]:
    """By the audit's own rule, for the two results that its test can have."""
    rows = np.flatnonzero(sides.audited)
    data = Compared(
        np.zeros(len(rows)),
        sides.side[rows] == "suspect",
        sides.folds[rows],
        np.array([sides.records[i].group or sides.records[i].id for i in rows]),
        rows,
    )
    validity, coverage = judge.validity_of(run, settings, data, None), judge.coverage_of(run, data)
    prospects = []
    for design in sorted(_DESIGNS, key=lambda each: each != settings.design):
        found, missed = (
            decide(
                design=design,
                primary=_primary(p_value),
                primary_p_adjusted=p_value,
                validity=validity,
                coverage=coverage,
                cutoffs=settings.cutoffs,
            )
            for p_value in (0.0, 1.0)
        )
        # What follows the first reason is about the p-value, unless there can be no answer.
        reasons = found.reasons if found.tier == "none" else found.reasons[:1]
        prospects.append(Prospect(design, found.tier, found.verdict, missed.verdict, reasons))
    asked = settings.cutoffs.detectable_auc
    power = Power(
        settings.primary,
        settings.cutoffs.alpha,
        coverage.suspect.scored,
        coverage.control.scored,
        validity.power.suspect_groups,
        validity.power.control_groups,
        validity.power.min_detectable_auc,
        {f"{auc:.2f}": _needed(settings, auc) for auc in sorted({*_AREAS, asked})},
        asked,
    )
    return power, tuple(prospects)


def _needed(settings: AuditSettings, auc: float) -> int:
    """Independent records a side, by the rule of `min_detectable_auc`."""
    alpha = settings.cutoffs.alpha
    if crosses_folds(settings, settings.primary):
        return settings.folds * st.minimum_set_size(auc, alpha=alpha / 2)
    return st.minimum_set_size(auc, alpha=alpha)


def _primary(p_value: float) -> SignalFinding:
    """What the primary signal may come to."""
    return SignalFinding(
        auc=0.5,
        auc_ci95=(0.0, 1.0),
        tpr_at_fpr={},
        tpr_at_fpr_reason={},
        p_value=p_value,
        p_value_holm=None,
        orientation="",
        n_unscorable=0,
        source="",
        options={},
    )


# -- what it will take ------------------------------------------------------------------------


class _Rehearsal:
    """Does a few records of each list of jobs by the clock, and what else is asked in full."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.workers, self.share = executor.workers, executor.share
        self.steps: list[Step] = []
        self.memory: list[Memory] = []
        self.tried, self.spent, self._opening = 0, 0.0, 0.0

    def map(
        self,
        perform: Perform[Job, Result],
        jobs: Sequence[Job],
        advance: Advance = lambda _: None,
    ) -> list[Result]:
        begun = perf_counter()
        results: list[Result] = []
        if perform in _STEPS:
            self._try(cast(Any, perform), cast(Any, jobs))
        elif perform is multiply:
            self._multiply(cast(Product, jobs[0]))
        else:
            results = self._executor.map(perform, jobs, advance)
            self._opening += perf_counter() - begun
        self.spent += perf_counter() - begun
        return results

    def _try(self, perform: Callable[..., None], jobs: Sequence[Work]) -> None:
        job, *others = _few(jobs)
        self._executor.map(perform, others)
        (timing,) = self._executor.map(clock, [Trial(perform, job)])
        if isinstance(job, Shard):
            self.memory += self._executor.map(gauge, [job])
        records = sum(len(each.records) for each in jobs)
        writes = sum(-(-len(each.records) // each.plan.shard) for each in jobs)
        size = round(len(jobs) * timing.bytes_a_shard + records * timing.bytes_a_record)
        passing = isinstance(job, Block | Slab)  # Deleted once they are added up, or multiplied.
        self.tried += 0 if passing else timing.written
        self.steps.append(
            Step(
                job.of.of or "target",
                _STEPS[perform],
                records,
                len(jobs),
                timing.records,
                self._opening + timing.opening_seconds,
                timing.seconds_a_record,
                timing.seconds_a_write * writes / len(jobs),
                0 if passing else size,
                size if passing else 0,
            )
        )
        self._opening = 0.0

    def _multiply(self, job: Product) -> None:
        """K of all records, which grows as their number squared; here it is made of a few."""
        before = _size(job.of.folder)
        self._executor.map(multiply, [job])
        self.tried += _size(job.of.folder) - before
        (seconds,) = self._executor.map(clock_product, [job])
        records = self.steps[-1].records  # Of the gradients that it is made of.
        self.steps.append(
            Step(
                job.of.of,
                "each record against each",
                records,
                1,
                _PRODUCT[0],
                self._opening,
                records * sum(map(math.prod, job.reading.shapes.values())) * seconds,
                0.0,
                4 * len(job.reading.groups) * records**2,
                0,
            )
        )
        self._opening = 0.0


_STEPS: dict[Callable[..., Any], str] = {
    sum_block: "reference gradients",
    measure_shard: "measuring",
    score_shard: "scoring kept slices",
    take_gradients: "gradients held against each other",
}
Work = Block | Shard | Scoring | Slab


@dataclass(frozen=True)
class Trial:
    """A job of a few records, to be done by the clock."""

    perform: Callable[..., None]
    job: Work


@dataclass(frozen=True)
class Timing:
    """What a trial took; sums of gradients are written a shard at a time, whatever it holds."""

    records: int
    opening_seconds: float
    seconds_a_record: float
    seconds_a_write: float
    bytes_a_shard: float
    bytes_a_record: float
    written: int


def clock(trial: Trial, advance: Advance) -> Timing:
    """Do a job twice: with the first records, and with as many as fill the time."""
    del advance
    job, folder = trial.job, trial.job.of.folder
    before = _size(folder)

    def do(count: int) -> tuple[float, list[float], int]:
        if isinstance(job, Block):
            job.file.unlink(missing_ok=True)  # It would go on from there.
        begun, ticks = perf_counter(), list[float]()
        part = replace(job, records=job.records[:count])
        trial.perform(part, lambda _: ticks.append(perf_counter() - begun))
        return perf_counter() - begun, ticks, _size(folder) - before

    first = min(_FIRST, len(job.records))
    warming, ticks, few = do(first)
    each = (ticks[-1] - ticks[0]) / (len(ticks) - 1) if len(ticks) > 1 else warming
    fill = int(_SECONDS / max(each, 1e-9))
    count = min(len(job.records), _MOST, max(_FEWEST, fill))
    took, ticks, many = do(count)
    writing = took - ticks[-1] if isinstance(job, Block) and ticks else 0.0
    a_record = 0.0 if count == first else (many - few) / (count - first)
    return Timing(
        count,
        max(0.0, warming - first * took / count),
        (took - writing) / count,
        writing,
        many - count * a_record,
        a_record,
        many,
    )


def clock_product(job: Product, advance: Advance) -> float:
    """Seconds that one number of one record's gradient takes against another record's."""
    del advance
    gradients = torch.ones(_PRODUCT, device=job.of.description.device)
    begun = perf_counter()
    (gradients @ gradients.T).cpu()
    return (perf_counter() - begun) / (_PRODUCT[0] * gradients.numel())


def gauge(shard: Shard, advance: Advance) -> Memory:
    """The bytes of the model, and of the largest of the shard's batches."""
    del advance
    opened = open_pass(shard.of, shard.plan, compared=shard.of.slices)
    target, engine = opened.target, opened.engine
    encoded = collect.encode(target, shard.records[: collect.WINDOW]).records
    batches = collect.plan(encoded, shard.plan.size, rows=engine is not None)
    held = (*target.model.parameters(), *target.model.buffers())
    weights = sum(each.nbytes for each in held)
    if not batches:
        return Memory(weights, 0)
    largest = max(batches, key=lambda batch: len(batch) * batch[-1].n_tokens)
    try:
        batch = memory.peak(target, engine, largest)
    except UnevenRows:
        batch = memory.peak(target, engine, largest[-1:])
    return Memory(weights, batch)


def _few(jobs: Sequence[Work]) -> list[Work]:
    """The job to be timed, its records drawn evenly from all; then what else must be there."""
    if isinstance(jobs[0], Block):
        blocks = cast(Sequence[Block], jobs)
        folds = [list(fold) for _, fold in groupby(blocks, lambda each: each.fold)]
        drawn = [[record for block in fold for record in block.records] for fold in folds]
        most = [min(_MOST, blocks[0].plan.shard), *[_FEWEST] * len(folds)]
        return [
            replace(fold[-1], records=_evenly(records, count))
            for fold, records, count in zip(folds, drawn, most, strict=False)
        ]
    if isinstance(jobs[0], Scoring | Slab):
        everyone = [record for job in jobs for record in job.records]
        return [replace(jobs[0], records=_evenly(everyone, _MOST))]
    return [_joined(cast(Sequence[Shard], jobs))]


def _joined(shards: Sequence[Shard]) -> Shard:
    """One shard of a few records of all."""
    places = _evenly([(s, row) for s in shards for row in range(len(s.records))], _MOST)
    first = shards[0]
    fits = None
    if first.fits is not None:
        fits = tuple(
            Fit(
                *(
                    np.array([getattr(cast(Any, s.fits)[k], side)[row] for s, row in places])
                    for side in ("members", "nonmembers", "scored")
                )
            )
            for k in range(len(first.fits))
        )
    records: tuple[Record, ...] = tuple(s.records[row] for s, row in places)
    inside = {key: each for s in shards for key, each in s.inside.items()}
    return replace(first, records=records, inside=inside, fits=fits)


def _evenly(items: Sequence[Any], count: int) -> tuple[Any, ...]:
    return tuple(items[:: max(1, -(-len(items) // count))])


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
