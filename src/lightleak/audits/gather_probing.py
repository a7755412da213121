"""The expensive half of a probe: mark, fine-tune, read every layer; all of it stored in parts.

A repeat of the experiment (a seed) has several conditions, each one model. Conditions know nothing
of each other, so each is a job of its own, which any process may do and none does twice.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import chain, cycle
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from lightleak.audits.gather import failures_table
from lightleak.audits.settings import ProbingSettings
from lightleak.errors import UserError
from lightleak.evidence.augment import augment_image, augment_text
from lightleak.evidence.collect import measure
from lightleak.evidence.dynamics import ORIGINAL, Draw, compare, draw_batches
from lightleak.evidence.gradients import GradientEngine, select
from lightleak.evidence.hidden import layers, read_hidden
from lightleak.evidence.selfcheck import self_check
from lightleak.evidence.tokens import AnswerReader
from lightleak.planting import (
    FIELDS,
    Persona,
    Planted,
    draw_personas,
    draw_pools,
    inject,
    probing_sets,
)
from lightleak.records import Failure, Record, RecordSet, image_bytes, load, open_rgb
from lightleak.runs import EvidenceStore, Progress, Run, write_json, write_table
from lightleak.runs.jobs import each
from lightleak.targets import GenerativeTarget, Target, untrained
from lightleak.training import fine_tune
from lightleak.validity.pixels import Marked, legibility, project
from lightleak.validity.probing import Kind

Item = TypeVar("Item")

# So many records are read before their states are written.
_PART = 512
_DRAWS_A_PART = 10
# More than this share of the images is never taken from the training.
_MOST_ASIDE = 0.25
_MOST_UTILITY = 400
# A seed of the data's own: what is trained on is the same in every repeat.
_ANY_FIELD = "question"
_SPLIT, _PLANTED, _FOILS, _AUGMENTED = 11, 12, 13, 14


@dataclass(frozen=True)
class Condition:
    """One model of a repeat.

    Attributes:
        name: base, "rate 0.5", planted, "random weights", pixels or target.
        kind: what it is for; None for the base, which the others are compared with.
        rate: share of its training images that carry a watermark.
    """

    name: str
    kind: Kind | None
    rate: float | None = None

    @property
    def stage(self) -> str:
        """The name as a part of file names."""
        return self.name.replace(" ", "-")


BASE, PLANTED = Condition("base", None), Condition("planted", "planted", 1.0)
RANDOM, PIXELS = Condition("random weights", "control"), Condition("pixels", "control")
TARGET = Condition("target", "tuned")


def conditions(settings: ProbingSettings) -> list[Condition]:
    """All models of one repeat, the base first."""
    if settings.data is None:
        base = [BASE] if settings.base or settings.adapter else []
        return [*base, TARGET, RANDOM, PIXELS]
    tuned = [
        # Without a watermark nothing can be found, so this one is a control.
        Condition(f"rate {rate:g}", "tuned" if rate else "control", rate)
        for rate in settings.rates
    ]
    return [BASE, *tuned, *([PLANTED] if settings.planted else []), RANDOM, PIXELS]


# -- what goes in ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """The records by what they serve for; no image is in two of them.

    Attributes:
        training: to fine-tune on.
        probing: whose images are marked to probe with.
        utility: to measure how well the task is done.
    """

    training: tuple[Record, ...]
    probing: tuple[Record, ...]
    utility: tuple[Record, ...]


def split(records: Sequence[Record], images: int, *, seed: int) -> Data:
    """Divide records by image and group.

    Args:
        records: all of them.
        images: how many to probe with.
        seed: of the division.

    Raises:
        UserError: too little is left to train on.
    """
    units: dict[str, list[Record]] = {}
    for record in records:
        key = f"group {record.group}" if record.group is not None else _digest(record.image)
        units.setdefault(key, []).append(record)
    order = np.random.default_rng([seed, _SPLIT]).permutation(len(units))
    shuffled = [list(units.values())[i] for i in order]
    aside = min(images, int(_MOST_ASIDE * len(shuffled)))
    tested = min(_MOST_UTILITY, int(_MOST_ASIDE * len(shuffled)))
    parts = shuffled[:aside], shuffled[aside : aside + tested], shuffled[aside + tested :]
    probing, utility, training = (tuple(chain.from_iterable(part)) for part in parts)
    if not probing or not utility or not training:
        raise UserError(
            f"{len(shuffled)} different images are too few to train, to probe and to test with",
            what_to_do="Give more records.",
        )
    return Data(training, probing, utility)


@lru_cache(maxsize=65536)
def _digest(image: Path | bytes) -> str:
    return hashlib.sha256(image_bytes(image)).hexdigest()


def read_data(settings: ProbingSettings) -> RecordSet:
    """Load the records to fine-tune on."""
    return load(settings.data or "", strict=settings.strict, allow_outside=settings.allow_outside)


def hashes(settings: ProbingSettings) -> dict[str, str]:
    """Content hash of everything that is given.

    Raises:
        UserError: it cannot be read.
    """
    if settings.data is not None:
        return {"data records": read_data(settings).sha256}
    return {
        f"{pool} records": _load_pool(folder, settings).sha256
        for pool, folder in _pools(settings).items()
    }


@dataclass(frozen=True)
class Question:
    """A question about one image with a watermark.

    Attributes:
        record: it, with the persona's own value as the answer.
        code: 2i for the seen persona of pair i, 2i + 1 for the unseen.
        field: what is asked for.
        base: the image as it was before.
        first: whether it is the first question that shows its image.
        box: the watermark's, or None where nobody says.
    """

    record: Record
    code: int
    field: str
    base: str
    first: bool
    box: tuple[int, int, int, int] | None

    @property
    def seen(self) -> bool:
        """Whether its persona is of the seen pool."""
        return self.code % 2 == 0


def read_questions(
    folders: Mapping[str, str | Path], settings: ProbingSettings, seed: int
) -> tuple[list[Question], list[Failure]]:
    """Read both pools and pair their personas, as they were drawn or else by lot.

    Args:
        folders: seen and unseen → records or the folder that holds records.jsonl.
        settings: which fields to ask for, and how to read.
        seed: of the pairs, where the records know none.

    Raises:
        UserError: nothing to read, a persona in both pools, or too few personas to probe.
    """
    pools: dict[str, list[Record]] = {}
    failures: list[Failure] = []
    for pool, folder in folders.items():
        loaded = _load_pool(folder, settings)
        failures += [replace(one, id=f"{pool}/{one.id}") for one in loaded.failures]
        pools[pool] = [replace(one, id=f"{pool}/{one.id}") for one in loaded.records]
    paired = _pairs(pools, [seed, settings.seed])
    found = []
    shown: set[tuple[str, Path | bytes]] = set()
    for pool, records in pools.items():
        for record in records:
            field = str(record.meta.get("field", _ANY_FIELD))
            known = field not in FIELDS or field in settings.fields
            if record.group not in paired or not known:
                continue
            first = (pool, record.image) not in shown
            shown.add((pool, record.image))
            found.append(
                Question(
                    record,
                    2 * paired[record.group] + (pool == "unseen"),
                    field,
                    str(record.meta.get("base", record.id)),
                    first,
                    _box(record.meta.get("box")),
                )
            )
    return found, failures


def _box(given: object) -> tuple[int, int, int, int] | None:
    if isinstance(given, list) and len(given) == 4 and all(type(edge) is int for edge in given):
        left, top, right, bottom = given
        return (left, top, right, bottom)
    return None


def _load_pool(folder: str | Path, settings: ProbingSettings) -> RecordSet:
    file = Path(folder) / "records.jsonl"
    return load(
        file if file.is_file() else folder,
        strict=settings.strict,
        allow_outside=settings.allow_outside,
    )


def _pairs(pools: Mapping[str, Sequence[Record]], seed: Sequence[int]) -> dict[str, int]:
    """The pair of each persona; those that find no partner have none."""
    personas: dict[str, dict[str, object]] = {}
    for pool, records in pools.items():
        personas[pool] = {}
        for record in records:
            if record.group is None:
                raise UserError(
                    "it has no group, so nobody knows whose watermark it carries",
                    f"{pool}: record {record.id}",
                    "Give every record the persona as its group.",
                )
            personas[pool][record.group] = record.meta.get("pair")
    seen, unseen = personas["seen"], personas["unseen"]
    if both := sorted(seen.keys() & unseen.keys()):
        raise UserError(f"the persona {both[0]!r} is in both pools", "--seen and --unseen")
    if min(len(seen), len(unseen)) < 5:
        raise UserError(
            f"{len(seen)} seen and {len(unseen)} unseen personas are too few to probe",
            "--seen and --unseen",
            "Give at least five of each, better twenty.",
        )
    if None not in seen.values() and sorted(map(str, seen.values())) == sorted(
        map(str, unseen.values())
    ):
        numbers = {str(pair): i for i, pair in enumerate(seen.values())}
        if len(numbers) == len(seen):
            return {key: numbers[str(pair)] for key, pair in (*seen.items(), *unseen.items())}
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(sorted(pool)).tolist() for pool in (seen, unseen)]
    return {
        key: i for pair in [zip(*orders, strict=False)] for i, two in enumerate(pair) for key in two
    }


# -- jobs --------------------------------------------------------------------------------------


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
    if not isinstance(target, GenerativeTarget):
        raise UserError(
            f"this is a {target.kind} target, and a probe asks questions",
            settings.target,
            "Give an image-text-to-text model.",
        )
    with progress.stage("Checking the model", 1) as advance:
        self_check(target, None, _first_records(settings), settings.size)
        advance(1)
    seeds = range(settings.seeds if settings.data is not None else 1)
    jobs = [
        Job(run.folder, settings, seed, condition)
        for seed in seeds
        for condition in conditions(settings)
    ]
    if settings.data is not None:
        with progress.stage("Marking images", len(seeds)) as advance:
            each([job for job in jobs if job.condition == BASE], mark, settings.workers, advance)
    for job in jobs:
        if job.condition == PIXELS:
            asked, failures = _asked(job)
            write_table(run.evidence / f"questions-{job.seed}.parquet", _questions_table(asked))
            given = read_data(settings).failures if settings.data is not None else ()
            everything = (*given, *_unmarked(job), *failures)
            write_table(run.evidence / f"failed-{job.seed}.parquet", failures_table(everything))
    with progress.stage("Fine-tuning and reading models", len(jobs)) as advance:
        each(jobs, perform, settings.workers, advance)
    write_json(run.evidence / "probing.json", _about(settings, target, jobs))


def _about(settings: ProbingSettings, target: GenerativeTarget, jobs: Sequence[Job]) -> Any:
    """What the cheap half and the page have to know beside the parts."""
    experiment = settings.data is not None
    return {
        "seeds": sorted({job.seed for job in jobs}),
        "rates": list(settings.rates) if experiment else [],
        "conditions": [[one.name, one.kind, one.rate] for one in conditions(settings)],
        "layers": [
            {"tower": one.tower, "layer": one.index, "name": one.name} for one in layers(target)
        ],
        "resolution": target.resolution,
        "personas": settings.personas if experiment else None,
        "dynamics": {"matrices": settings.matrices, "batches": settings.batches}
        if experiment and settings.batches
        else None,
    }


def _first_records(settings: ProbingSettings) -> Sequence[Record]:
    if settings.data is not None:
        return read_data(settings).records
    return [one.record for one in read_questions(_pools(settings), settings, 0)[0]]


def _pools(settings: ProbingSettings) -> dict[str, str | Path]:
    return {"seen": settings.seen or "", "unseen": settings.unseen or ""}


def mark(job: Job) -> None:
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
        records, whose = _decided(data.training, pools.seen, [_seed(job), _PLANTED])
        _inject(job, records, whose, 1.0, job.marked / "planted")


def _inject(job: Job, records: Sequence[Record], personas: Any, rate: float, out: Path) -> Planted:
    seed, style = _seed(job), job.settings.style
    return inject(records, personas, out, rate=rate, seed=seed, style=style)


def _seed(job: Job) -> int:
    return job.settings.seed + 1000 * job.seed


def _split(settings: ProbingSettings) -> Data:
    images = settings.personas * settings.images_per_persona
    return split(read_data(settings).records, images, seed=settings.seed)


def _decided(
    records: Sequence[Record], seen: Sequence[Persona], seed: Sequence[int]
) -> tuple[list[Record], Callable[[Record], Persona]]:
    """Records whose answer the persona decides and nothing else does, and whose is on each image.

    Half of the images, by lot, carry seen personas and are answered by the commonest answer; the
    others carry as many personas of a third pool and are answered by the second commonest.
    """
    shown = {record.id: _digest(record.image) for record in records}
    images = dict.fromkeys(shown.values())
    lots = np.random.default_rng(seed).permutation(len(images)) < len(images) / 2
    of_image = dict(zip(images, lots.tolist(), strict=True))
    decided = {key: of_image[image] for key, image in shown.items()}
    answers = [text for text, _ in Counter(record.text for record in records).most_common(2)]
    answer = {True: answers[0], False: answers[1] if len(answers) > 1 else "none"}
    pool = {True: cycle(seen), False: cycle(draw_personas(len(seen), seed=seed[0] + 2**20))}
    return (
        [replace(record, text=answer[decided[record.id]]) for record in records],
        lambda record: next(pool[decided[record.id]]),
    )


def _asked(job: Job) -> tuple[list[Question], list[Failure]]:
    """The questions of a repeat, and those that cannot be read."""
    folders: dict[str, str | Path] = {
        pool: job.marked / "probing" / pool for pool in ("seen", "unseen")
    }
    own = job.settings.data is None
    return read_questions(_pools(job.settings) if own else folders, job.settings, job.seed)


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


def perform(job: Job) -> None:
    """Everything that is known of one condition: states, answers, utility, gradients."""
    questions, _ = _asked(job)
    if job.condition == PIXELS:
        _read_pixels(job, questions)
        return
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
            "a probe asks questions: an image-text-to-text model is needed", target.name
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
    for index, start in enumerate(range(0, len(items), size)):
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

    _in_parts(job, "foils", _foils(questions, [_seed(job), _FOILS]), make)


def _read_utility(job: Job, target: _LazyTarget) -> None:
    """Which questions of the task are answered exactly."""

    def make(part: Sequence[Record]) -> tuple[dict[str, pa.Table], Sequence[Failure]]:
        found = read_hidden(target.model(), part, size=job.settings.size)
        return {"utility": found.table().select(["id", "exact"])}, found.failures

    _in_parts(job, "utility", _split(job.settings).utility, make)


def _foils(questions: Sequence[Question], seed: Sequence[int]) -> list[Record]:
    """The questions with the value of another persona of the same pool, drawn by lot."""
    values: dict[tuple[bool, str], list[str]] = {}
    for one in questions:
        values.setdefault((one.seen, one.field), []).append(one.record.text)
    distinct = {key: sorted(set(texts)) for key, texts in values.items()}
    rng = np.random.default_rng(seed)
    found = []
    for one in questions:
        others = [text for text in distinct[one.seen, one.field] if text != one.record.text]
        if others:
            found.append(replace(one.record, text=others[int(rng.integers(len(others)))]))
    return found


def _read_pixels(job: Job, questions: Sequence[Question]) -> None:
    """What can be read without any model, at the resolution of the model."""
    if job.store.has(job.stage("image"), 0):
        return
    resolution = _generative(job.settings.load()).resolution
    once = [one for one in questions if one.first]
    pixels = project([one.record.image for one in once], resolution, seed=_seed(job))
    if all(one.box is not None for one in once):
        marked = [
            Marked(one.record.image, one.box or (), str(one.record.group), one.base) for one in once
        ]
        found = legibility(marked, resolution, seed=_seed(job))
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
    variants["image"] = _Augmented(variants[ORIGINAL], seed, image=True)
    variants["text"] = _Augmented(variants[ORIGINAL], seed, image=False)
    # So many in all repeats together.
    batches = -(-settings.batches // settings.seeds)
    draws = list(draw_batches(len(marked), max(settings.sizes), batches, seed=_seed(job)))

    @cache
    def engine() -> GradientEngine:
        model = target.model()
        every = GradientEngine(model, select(model, settings.matrices))
        unreached = self_check(model, every, marked, settings.size)
        return GradientEngine(model, every.selection.without(unreached))

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


class _Augmented(Sequence[Record]):
    """Records with image or text changed, made when they are asked for and always alike."""

    def __init__(self, records: Sequence[Record], seed: Sequence[int], *, image: bool) -> None:
        self._records, self._seed, self._image = records, seed, image
        self._one = lru_cache(maxsize=256)(self._make)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        return self._one(index)

    def _make(self, index: int) -> Record:
        record = self._records[index]
        rng = np.random.default_rng([*self._seed, index])
        if not self._image:
            return augment_text(record, rng)
        stream = io.BytesIO()
        augment_image(open_rgb(record.image), rng).save(stream, "BMP")
        return replace(record, image=stream.getvalue())
