"""The expensive half of a probe: mark, fine-tune, read every layer; all of it stored in parts.

A repeat of the experiment (a seed) has several conditions, each one model. Conditions know nothing
of each other, so each is a job of its own, which any process may do and none does twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from lightleak.audits.probing_inputs import (
    BASE,
    PIXELS,
    RANDOM,
    TARGET,
    Augmented,
    Condition,
    Data,
    Question,
    conditions,
    decided,
    foils,
    given_pools,
    read_data,
    read_questions,
    seed_of_repeat,
    split,
)
from lightleak.audits.settings import ProbingSettings
from lightleak.audits.sides import failures_table
from lightleak.errors import UserError
from lightleak.evidence.collect import measure
from lightleak.evidence.dynamics import ORIGINAL, Draw, compare, draw_batches
from lightleak.evidence.gradients import GradientEngine, select
from lightleak.evidence.hidden import layers, read_hidden
from lightleak.evidence.selfcheck import self_check
from lightleak.evidence.tokens import AnswerReader
from lightleak.planting import Planted, draw_pools, inject, probing_sets
from lightleak.records import Failure, Record, load
from lightleak.runs import EvidenceStore, Progress, Run, write_json, write_table
from lightleak.runs.executors import Executor
from lightleak.runs.progress import Advance
from lightleak.targets import GenerativeTarget, Target, untrained
from lightleak.training import fine_tune
from lightleak.validity.pixels import Marked, legibility, project

Item = TypeVar("Item")

# So many records are read before their states are written.
_PART = 512
_DRAWS_A_PART = 10
# What a repeat draws beside its personas has a seed of its own.
_PLANTED, _FOILS, _AUGMENTED = 12, 13, 14


@dataclass(frozen=True)
class Job:
    """One condition of one repeat, as it travels to the process that does it."""

    folder: Path
    settings: ProbingSettings
    seed: int
    condition: Condition

    @property
    def run(self) -> Run:
        """The run it belongs to."""
        return Run(self.folder)

    @property
    def marked(self) -> Path:
        """What was written for this repeat."""
        return self.run.watermarked / f"seed-{self.seed}"

    @property
    def store(self) -> EvidenceStore:
        """Where its parts go."""
        return EvidenceStore(self.run.evidence)

    def stage(self, what: str) -> str:
        """The name of a stage of this job."""
        return f"{what}-{self.seed}-{self.condition.stage}"


def gather(run: Run, settings: ProbingSettings, target: Target, progress: Progress) -> None:
    """Do every job of every repeat; what is done already is left as it is.

    Raises:
        UserError: input that cannot be used.
    """
    target = _generative(target)
    if settings.data is not None:
        if target.has_adapter:
            raise UserError(
                "an adapter is put on by the fine-tuning itself",
                settings.target,
                "Merge this one into its base first.",
            )
        if settings.batches:
            # Says before anything is spent whether there are enough records.
            list(draw_batches(len(_split(settings).training), max(settings.sizes), 1, seed=0))
    with progress.stage("Checking the model", 1) as advance:
        self_check(target, None, _first_records(settings), settings.size)
        advance(1)
    seeds = range(settings.seeds if settings.data is not None else 1)
    jobs = [
        Job(run.folder, settings, seed, condition)
        for seed in seeds
        for condition in conditions(settings)
    ]
    with settings.executor_of() as executor:
        _perform_all(run, settings, jobs, progress, executor)
    write_json(run.evidence / "probing.json", _about(settings, target, jobs))


def _perform_all(
    run: Run,
    settings: ProbingSettings,
    jobs: Sequence[Job],
    progress: Progress,
    executor: Executor,
) -> None:
    """Mark the images of every repeat, write down what is asked, and do every job."""
    if settings.data is not None:
        marking = [job for job in jobs if job.condition == BASE]
        with progress.stage("Marking images", len(marking)) as advance:
            executor.map(mark, marking, advance)
    for job in jobs:
        questions = run.evidence / f"questions-{job.seed}.parquet"
        if not questions.is_file():
            asked, failures = _asked(job)
            given = read_data(settings).failures if settings.data is not None else ()
            write_table(
                run.evidence / f"failed-{job.seed}.parquet",
                failures_table((*given, *_unmarked(job), *failures)),
            )
            write_table(questions, _questions_table(asked))
    with progress.stage("Fine-tuning and reading models", len(jobs)) as advance:
        executor.map(perform, jobs, advance)


def _about(settings: ProbingSettings, target: GenerativeTarget, jobs: Sequence[Job]) -> Any:
    """What the cheap half and the page have to know beside the parts."""
    experiment = settings.data is not None
    return {
        "seeds": sorted({job.seed for job in jobs}),
        "conditions": [[one.name, one.kind, one.rate] for one in conditions(settings)],
        "layers": [
            {"tower": one.tower, "layer": one.index, "name": one.name} for one in layers(target)
        ],
        "images_wanted": settings.personas * settings.images_per_persona if experiment else None,
        "records_trained_on": len(_split(settings).training) if experiment else None,
        "records_of_the_task": len(_split(settings).utility) if experiment else None,
    }


def _first_records(settings: ProbingSettings) -> Sequence[Record]:
    if settings.data is not None:
        return read_data(settings).records
    return [one.record for one in read_questions(given_pools(settings), settings, 0)[0]]


def mark(job: Job, advance: Advance) -> None:
    """Write the marked copies of a repeat: what is trained on at each rate, what is probed."""
    settings, data = job.settings, _split(job.settings)
    pools = draw_pools(settings.personas, seed=_seed(job))
    probing_sets(
        data.probing,
        pools,
        job.marked / "probing",
        seed=_seed(job),
        style=settings.style,
        images_per_persona=settings.images_per_persona,
    )
    # At rate 1 too: the gradients are compared with it.
    for rate in {*settings.rates, 1.0}:
        _inject(job, data.training, pools.seen, rate, job.marked / f"rate-{rate:g}")
    if settings.planted:
        records, whose = decided(data.training, pools.seen, [_seed(job), _PLANTED])
        _inject(job, records, whose, 1.0, job.marked / "planted")
    advance(1)


def _inject(job: Job, records: Sequence[Record], personas: Any, rate: float, out: Path) -> Planted:
    seed, style = _seed(job), job.settings.style
    return inject(records, personas, out, rate=rate, seed=seed, style=style)


def _seed(job: Job) -> int:
    return seed_of_repeat(job.settings.seed, job.seed)


def _split(settings: ProbingSettings) -> Data:
    records, each_persona = read_data(settings).records, settings.images_per_persona
    return split(records, settings.personas, each_persona, seed=settings.seed)


def _asked(job: Job) -> tuple[list[Question], list[Failure]]:
    """The questions of a repeat, and those that cannot be read."""
    folders: dict[str, str | Path] = {
        pool: job.marked / "probing" / pool for pool in ("seen", "unseen")
    }
    own = job.settings.data is None
    return read_questions(given_pools(job.settings) if own else folders, job.settings, job.seed)


def _unmarked(job: Job) -> list[Failure]:
    """Records that could not be marked, as marking wrote them down."""
    files = sorted(job.marked.glob("*/failures.jsonl")) + sorted(
        job.marked.glob("probing/*/failures.jsonl")
    )
    return [
        Failure(**json.loads(line)) for file in files for line in file.read_bytes().splitlines()
    ]


def _questions_table(asked: Sequence[Question]) -> pa.Table:
    """What the cheap half has to know of the questions."""
    return pa.table(
        {
            "id": [one.record.id for one in asked],
            "code": [one.code for one in asked],
            "field": [one.field for one in asked],
            "persona": [str(one.record.group) for one in asked],
            "first": [one.first for one in asked],
        }
    )


def perform(job: Job, advance: Advance) -> None:
    """Everything that is known of one condition: states, answers, utility, gradients."""
    questions, _ = _asked(job)
    if job.condition == PIXELS:
        _read_pixels(job, questions)
    else:
        _read_model(job, questions)
    advance(1)


def _read_model(job: Job, questions: Sequence[Question]) -> None:
    target = _LazyTarget(job)
    _read_states(job, target, questions)
    if job.condition != RANDOM:
        _read_foils(job, target, questions)
        if job.settings.data is not None:
            _read_utility(job, target)
    if job.condition == BASE and job.settings.batches and job.settings.data is not None:
        _read_dynamics(job, target)


class _LazyTarget:
    """The condition's model, made when it is first needed: a finished job needs none."""

    def __init__(self, job: Job) -> None:
        self._job = job

    @cache  # noqa: B019 - lives as long as its job
    def model(self) -> GenerativeTarget:
        job, settings = self._job, self._job.settings
        condition = job.condition
        if condition == TARGET:
            return _generative(settings.load())
        if condition == BASE:
            return _generative(settings.load(settings.base or settings.target))
        if condition == RANDOM:
            return _generative(untrained(settings.load(), _seed(job)))
        folder = job.run.evidence / "models" / f"seed-{job.seed}" / condition.stage
        records = load(job.marked / condition.stage / "records.jsonl").records
        fine_tune(
            _generative(settings.load()), records, settings.fine_tuning, folder, seed=_seed(job)
        )
        full = settings.method == "full"
        return _generative(
            settings.model_copy(
                update={"target": str(folder)} if full else {"adapter": str(folder)}
            ).load()
        )


def _generative(target: Target) -> GenerativeTarget:
    if not isinstance(target, GenerativeTarget):
        raise UserError(
            f"this is a {target.kind} target, and a probe asks questions",
            target.name,
            "Give an image-text-to-text model.",
        )
    return target


def _in_parts(
    job: Job,
    what: str,
    items: Sequence[Item],
    make: Callable[[Sequence[Item]], tuple[Mapping[str, pa.Table], Sequence[Failure]]],
    size: int = _PART,
) -> None:
    """Make the tables of some items a part at a time; a part that is there is left as it is.

    `make` gives tables by stage, the one called `what` among them. It is written last, after the
    failures, so that a part that is there is whole.
    """
    # One part even of nothing, so that nothing is told from what is missing.
    for index, start in enumerate(range(0, max(1, len(items)), size)):
        if job.store.has(job.stage(what), index):
            continue
        tables, failures = make(items[start : start + size])
        job.store.put(job.stage(f"failed-{what}"), index, failures_table(failures))
        for stage in sorted(tables, key=lambda each: each == what):
            job.store.put(job.stage(stage), index, tables[stage])


def _read_states(job: Job, target: _LazyTarget, questions: Sequence[Question]) -> None:
    """States at every layer; those of the image once, under its first question."""

    def make(part: Sequence[Question]) -> tuple[dict[str, pa.Table], Sequence[Failure]]:
        model = target.model()
        found = read_hidden(model, [one.record for one in part], size=job.settings.size)
        table = found.table()
        once = {one.record.id for one in part if one.first}
        image = [one.column for one in layers(model) if one.tower != "language"]
        own = table.filter(pa.array([key in once for key in found.ids], pa.bool_()))
        return {
            "image": own.select(["id", *image]),
            "states": table.drop_columns(image),
        }, found.failures

    _in_parts(job, "states", questions, make)


def _read_foils(job: Job, target: _LazyTarget, questions: Sequence[Question]) -> None:
    """How likely another persona's value is, to set the own value against."""

    def make(part: Sequence[Record]) -> tuple[dict[str, pa.Table], Sequence[Failure]]:
        found = measure(target.model(), None, AnswerReader(), part, size=job.settings.size)
        means = [float(np.mean(each)) for each in found.table["logprob"].to_pylist()]
        table = pa.table({"id": found.table["id"], "logprob": pa.array(means, pa.float64())})
        return {"foils": table}, found.failures

    _in_parts(job, "foils", foils(questions, [_seed(job), _FOILS]), make)


def _read_utility(job: Job, target: _LazyTarget) -> None:
    """Which questions of the task are answered exactly."""

    def make(part: Sequence[Record]) -> tuple[dict[str, pa.Table], Sequence[Failure]]:
        found = read_hidden(target.model(), part, size=job.settings.size)
        return {"utility": found.table().select(["id", "exact"])}, found.failures

    _in_parts(job, "utility", _split(job.settings).utility, make)


def _read_pixels(job: Job, questions: Sequence[Question]) -> None:
    """What can be read without any model, at the resolution of the model."""
    if job.store.has(job.stage("image"), 0):
        return
    resolution = _generative(job.settings.load()).resolution
    once = [one for one in questions if one.first]
    pixels = project([one.record.image for one in once], resolution, seed=_seed(job))
    found = None
    if all(one.box is not None for one in once):
        marked = [
            Marked(one.record.image, one.box or (), str(one.record.group), one.base) for one in once
        ]
        found = legibility(marked, resolution, seed=_seed(job))
    if found is not None:
        write_json(
            job.run.evidence / f"legibility-{job.seed}.json",
            {
                "named": round(found.accuracy.value * len(marked)),
                "of": len(marked),
                "chance": found.chance,
                "line_height": found.line_height,
            },
        )
    columns = {"id": [one.record.id for one in once], "pixels.0": pa.array(list(pixels))}
    job.store.put(job.stage("image"), 0, pa.table(columns))


def _read_dynamics(job: Job, target: _LazyTarget) -> None:
    """How far watermarks and augmentations turn the gradients of mini-batches."""
    settings = job.settings
    marked = load(job.marked / "rate-1" / "records.jsonl").records
    of = {record.id: record for record in _split(settings).training}
    variants: dict[str, Sequence[Record]] = {
        ORIGINAL: [of[record.id] for record in marked],
        "watermark": marked,
    }
    seed = [_seed(job), _AUGMENTED]
    variants["image"] = Augmented(variants[ORIGINAL], seed, image=True)
    variants["text"] = Augmented(variants[ORIGINAL], seed, image=False)
    # So many in all repeats together.
    batches = -(-settings.batches // settings.seeds)
    draws = list(draw_batches(len(marked), max(settings.sizes), batches, seed=_seed(job)))

    @cache
    def engine() -> GradientEngine:
        model = target.model()
        every = GradientEngine(model, select(model, settings.matrices))
        checked = self_check(model, every, marked, settings.size)
        assert checked.selection is not None
        return GradientEngine(model, checked.selection)

    def make(part: Sequence[Draw]) -> tuple[dict[str, pa.Table], Sequence[Failure]]:
        found = [
            compare(
                *(target.model(), engine(), variants, one),
                sizes=settings.sizes,
                size=settings.size,
            )
            for one in part
        ]
        return {"dynamics": pa.concat_tables([one.table for one in found])}, [
            failure for one in found for failure in one.failures
        ]

    _in_parts(job, "dynamics", draws, make, size=_DRAWS_A_PART)
