"""Train references: fine-tune the base several times, each time on a random half of the records.

Two by two they share the records between them, so that of an even number every record is in
exactly half. Who is in which is decided before anything is trained, and written down.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from lightleak import records
from lightleak.audits.models import Description, Model, describe, release, released
from lightleak.audits.reference_models import (
    FILE,
    Base,
    Contents,
    Kept,
    Left,
    Reference,
    Trained,
    read_contents,
    read_references,
)
from lightleak.audits.settings import ReferenceSettings
from lightleak.errors import UserError
from lightleak.evidence import collect
from lightleak.records import Failure, Record, content_key
from lightleak.runs import Progress, Silent, make_folder, read_json, write_json
from lightleak.runs.executors import Executor
from lightleak.runs.folder import alone, sha256
from lightleak.runs.progress import Advance
from lightleak.targets import find
from lightleak.training import TRAINED, FineTuning, Pace, fine_tune_epochs, measure_pace
from lightleak.validity.duplicates import find_duplicates

# Files of a kept epoch that decide what it is.
_WHAT_COUNTS = (".json", ".safetensors")
# Records that one job looks at before any is trained on.
_PART = 512
# Of the seed's streams, that of the trainings; the lots take the others.
_SEEDS = 1
# So many batches are offered to the clock: some of their records may be of no use.
_OFFERED = 8


@dataclass(frozen=True)
class Estimate:
    """What training references takes.

    Attributes:
        references: still to be trained.
        records: that each trains on, on average.
        epochs: up to the last that is kept.
        workers, device, dtype: processes at once, and where and in what they compute.
        opening_seconds: until a base is loaded.
        pace: of a record.
        kept_bytes: of all epochs that are kept.
        scratch_bytes: what goes again, of all processes.
    """

    references: int
    records: int
    epochs: int
    workers: int
    device: str
    dtype: str
    opening_seconds: float
    pace: Pace
    kept_bytes: int
    scratch_bytes: int

    @property
    def seconds(self) -> float:
        """In all; writing comes on top."""
        rounds = -(-self.references // self.workers)
        return rounds * (self.opening_seconds + self.pace.seconds(self.records, self.epochs))


def estimate_references(
    *, base: str | Path, progress: Progress | None = None, **settings: object
) -> Estimate:
    """What would training references with these settings take? Nothing is left behind.

    Args:
        base: as for `train_references`, and likewise the others.
        progress: shows how far it is.
        settings: any other attribute of `ReferenceSettings`.

    Raises:
        UserError: input that cannot be used, with what to do about it.
    """
    chosen = ReferenceSettings.read(target=base, **settings)
    recipe, progress = chosen.fine_tuning, progress or Silent()
    given = _read(chosen, progress)
    with chosen.executor_of() as executor, released():
        return _estimate(chosen, recipe, given.records, chosen.count, executor, progress)


def train_references(
    *,
    base: str | Path,
    out: str | Path,
    progress: Progress | None = None,
    estimated: Callable[[Estimate], None] | None = None,
    **settings: object,
) -> list[Reference]:
    """Fine-tune a base several times, each time on a random half of suspects and controls.

    Stops and resumes: the same call on the same folder goes on where it was, and with a larger
    count adds references to it.

    Args:
        base: a model folder or hub id: what the target was fine-tuned from.
        out: the folder of the references.
        progress: shows how far it is.
        estimated: told, before anything is trained, what it will take; a few steps are timed
            for that.
        settings: any other attribute of `ReferenceSettings`.

    Returns:
        The references, at the last epoch that is kept.

    Raises:
        UserError: input that cannot be used, with what to do about it.
    """
    chosen = ReferenceSettings.read(target=base, **settings)
    recipe, progress = chosen.fine_tuning, progress or Silent()
    given = _read(chosen, progress)
    folder = _claim(Path(out))
    with alone(folder), chosen.executor_of() as executor, released():
        with progress.stage("Loading the base", 1) as advance:
            (description,) = executor.map(describe, [Model(chosen)], advance)
        contents = _taken_up(folder, chosen, recipe, given, description)
        missing = chosen.count if contents is None else len(_unfinished(folder, contents))
        if estimated is not None and missing:
            estimated(_estimate(chosen, recipe, given.records, missing, executor, progress))
        if contents is None:
            left_out = [
                Left(id=one.id, stage=one.stage, error=one.error)
                for one in (*given.failures, *_unfit(chosen, given.records, executor, progress))
            ]
            contents = _begun(chosen, recipe, given, left_out, description)
        if contents.left_out:
            progress.note(
                f"{len(contents.left_out)} record(s) cannot be used and are left out; "
                f"see {folder / FILE}. First: {contents.left_out[0].error}"
            )
        _train(folder, chosen, recipe, given, contents, executor, progress)
    return read_references(folder, progress=progress)


# -- which records ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """The readable records, in an order of their own whatever the files' order.

    Attributes:
        records: with ids made unique by their side.
        keys: what each is known by.
        units: (n,) what is drawn together: a group, and copies of each other.
        suspect: (n,) whether it is a suspect.
        failures: what cannot be read.
    """

    records: tuple[Record, ...]
    keys: tuple[str, ...]
    units: NDArray[np.int64]
    suspect: NDArray[np.bool_]
    failures: tuple[Failure, ...]

    @property
    def sha256(self) -> str:
        """Over contents, units and sides."""
        rows = [list(self.keys), self.units.tolist(), self.suspect.tolist()]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _read(settings: ReferenceSettings, progress: Progress) -> _Given:
    sources = {
        "suspect": settings.suspect,
        "control": settings.control,
        "other": settings.train_on,
    }
    named = {side: source for side, source in sources.items() if source is not None}
    found: list[Record] = []
    failures: list[Failure] = []
    with progress.stage("Reading records", len(named)) as advance:
        for side, source in named.items():
            loaded = records.load(
                source,
                allow_outside=settings.allow_outside,
                strict=settings.strict,
                id_prefix=f"{side}/",
            )
            readable = records.readable(loaded, strict=settings.strict)
            found += readable.records
            failures += readable.failures
            advance(1)
    with progress.stage("Comparing records", 2) as advance:
        keys = {record.id: content_key(record) for record in found}
        advance(1)
        found.sort(key=lambda record: (keys[record.id], record.id))
        # As if of one side: copies on both would otherwise stay apart.
        groups = find_duplicates(found, np.zeros(len(found), bool)).groups
        advance(1)
    numbers: dict[int, int] = {}
    return _Given(
        tuple(found),
        tuple(keys[record.id] for record in found),
        np.array([numbers.setdefault(group, len(numbers)) for group in groups], np.int64),
        np.array([record.id.startswith("suspect/") for record in found], bool),
        tuple(failures),
    )


def draw_halves(
    units: NDArray[np.int64], suspect: NDArray[np.bool_], count: int, seed: int
) -> NDArray[np.bool_]:
    """Divide records by lot, `count` times: (n, count), whether each is in.

    Of units that are alike in size and sides two are matched, and a coin sends one of them in.
    Every second column is the complement of the one before it.

    Args:
        units: (n,) what stays together, numbered from 0.
        suspect: (n,) the side, so that each half has its share of both.
        count: how many; more are the same and some further ones.
        seed: of the lots.

    Raises:
        UserError: there is nothing to divide.
    """
    sizes = np.zeros((units.max(initial=-1) + 1, 2), np.int64)
    np.add.at(sizes, (units, suspect.astype(np.int64)), 1)
    drawn = np.flatnonzero(sizes.sum(1))
    if len(drawn) < 2:
        raise UserError(
            f"there are no two halves of {len(drawn)} usable independent record(s)",
            what_to_do="Give more; copies and records of one group stay together.",
        )
    columns = []
    for pair in range(-(-count // 2)):
        random = np.random.default_rng([seed, pair])
        order = drawn[np.lexsort((random.random(len(drawn)), *sizes[drawn].T))]
        coins = random.random(-(-len(order) // 2)) < 0.5
        inside = np.zeros(len(sizes), bool)
        inside[order] = np.stack([coins, ~coins], 1).ravel()[: len(order)]
        columns += [inside[units], ~inside[units]]
    return np.stack(columns[:count], 1)


# -- the folder -------------------------------------------------------------------------------


def _claim(folder: Path) -> Path:
    """Make the folder, or take up the one that is there.

    Raises:
        UserError: it cannot be written, or holds something else.
    """
    make_folder(folder)
    for each in sorted(folder.iterdir()):
        if not each.name.startswith((".", "reference-")) and each.name != FILE:
            raise UserError(
                f"it holds {each.name!r}, which is no part of references",
                str(folder),
                "Give --out a folder of its own.",
            )
    if not (folder / FILE).is_file() and any(folder.glob("reference-*")):
        raise UserError(
            f"it holds references, and no {FILE} that says what they were trained on",
            str(folder),
            "Remove them, or give --out another folder.",
        )
    return folder


def _taken_up(
    folder: Path,
    settings: ReferenceSettings,
    recipe: FineTuning,
    given: _Given,
    base: Description,
) -> Contents | None:
    """What was begun in the folder, with further references where more are asked for.

    Raises:
        UserError: it was begun with something else.
    """
    if not (folder / FILE).is_file():
        return None
    begun = read_contents(folder)
    before_and_now: dict[str, tuple[object, object]] = {
        "base": (begun.base.hashes, dict(base.hashes)),
        "dtype": (begun.base.dtype, base.dtype),
        **{name: (begun.recipe.get(name), value) for name, value in recipe.settings().items()},
        "kept epochs": (begun.keep, settings.keep),
        "seed": (begun.seed, settings.seed),
        "records": (begun.records, given.sha256),
    }
    changed = [name.replace("_", " ") for name, (was, now) in before_and_now.items() if was != now]
    if len(begun.references) > settings.count:
        changed.append(f"--count ({len(begun.references)}, which may only grow)")
    if changed:
        raise UserError(
            f"its references were begun with another {', '.join(changed)}",
            str(folder),
            "Give the same again to go on, or --out another folder.",
        )
    if len(begun.references) == settings.count:
        return begun
    more = _begun(settings, recipe, given, begun.left_out, base)
    references = (*begun.references, *more.references[len(begun.references) :])
    return more.model_copy(update={"references": references})


def _begun(
    settings: ReferenceSettings,
    recipe: FineTuning,
    given: _Given,
    left_out: Sequence[Left],
    base: Description,
) -> Contents:
    """Nothing trained yet: who is in which reference."""
    gone = {each.id for each in left_out}
    usable = np.array([record.id not in gone for record in given.records], bool)
    inside = draw_halves(given.units[usable], given.suspect[usable], settings.count, settings.seed)
    keys = [given.keys[i] for i in np.flatnonzero(usable)]
    seeds = np.random.SeedSequence([settings.seed, 0, _SEEDS]).generate_state(settings.count)
    # A folder by where it lies, for the references may be used from elsewhere.
    local = Path(base.name).is_dir()
    return Contents(
        base=Base(
            name=str(find(base.name)) if local else base.name,
            kind=base.kind,
            dtype=base.dtype,
            hashes=dict(base.hashes),
        ),
        recipe=recipe.settings(),
        keep=settings.keep,
        seed=settings.seed,
        records=given.sha256,
        references=tuple(
            Trained(name=f"reference-{k:02d}", seed=int(seed)) for k, seed in enumerate(seeds)
        ),
        membership={
            key: "".join("01"[bit] for bit in bits)
            for key, bits in zip(keys, inside.astype(int), strict=True)
        },
        left_out=tuple(left_out),
    )


def _epochs(folder: Path, name: str, keep: Sequence[int]) -> dict[int, Path]:
    return {epoch: folder / name / f"epoch-{epoch:02d}" for epoch in keep}


def _unfinished(folder: Path, contents: Contents) -> list[Trained]:
    return [each for each in contents.references if not _is_whole(folder, each.name, contents.keep)]


def _is_whole(folder: Path, name: str, keep: Sequence[int]) -> bool:
    kept = _epochs(folder, name, keep).values()
    return all(file.is_file() for file in (folder / name / TRAINED, *(k / TRAINED for k in kept)))


def _write(folder: Path, contents: Contents) -> None:
    """Write down which references are finished, with what their jobs left."""
    references = []
    for each in contents.references:
        if _is_whole(folder, each.name, contents.keep):
            own = read_json(folder / each.name / TRAINED)
            epochs = {int(k): Kept.model_validate(kept) for k, kept in own["epochs"].items()}
            each = Trained(name=each.name, seed=each.seed, finished=True, epochs=epochs)
        else:
            each = Trained(name=each.name, seed=each.seed)
        references.append(each)
    contents = contents.model_copy(update={"references": tuple(references)})
    write_json(folder / FILE, contents.model_dump(mode="json"))


# -- jobs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """One reference, as it travels to the process that trains it."""

    folder: Path
    name: str
    settings: ReferenceSettings
    recipe: FineTuning
    seed: int
    records: tuple[Record, ...]


def perform(job: Training, advance: Advance) -> None:
    """Train a reference and write down on what, and what its epochs are."""
    release()  # Of two copies only one is trained.
    kept = _epochs(job.folder, job.name, job.settings.keep)
    fine_tune_epochs(
        job.settings.load(), job.records, job.recipe, kept, seed=job.seed, progress=advance
    )
    epochs = {}
    for epoch, folder in kept.items():
        files = sorted(each for each in folder.iterdir() if each.suffix in _WHAT_COUNTS)
        epochs[str(epoch)] = Kept(
            folder=folder.relative_to(job.folder).as_posix(),
            loss=read_json(folder / TRAINED)["loss"],
            sha256={file.name: sha256(file) for file in files},
        ).model_dump()
    ids = sorted(record.id for record in job.records)
    write_json(job.folder / job.name / TRAINED, {"epochs": epochs, "records": ids})


def _train(
    folder: Path,
    settings: ReferenceSettings,
    recipe: FineTuning,
    given: _Given,
    contents: Contents,
    executor: Executor,
    progress: Progress,
) -> None:
    """Train what is not finished; each is written down as soon as it is."""
    _write(folder, contents)
    jobs = []
    for each in _unfinished(folder, contents):
        place = contents.references.index(each)
        chosen = tuple(
            record
            for record, key in zip(given.records, given.keys, strict=True)
            if contents.membership.get(key, "0" * len(contents.references))[place] == "1"
        )
        (folder / each.name / TRAINED).unlink(missing_ok=True)
        make_folder(folder / each.name)
        jobs.append(Training(folder, each.name, settings, recipe, each.seed, chosen))
    waiting = {job.name for job in jobs}
    passes = sum(len(job.records) for job in jobs) * settings.keep[-1]
    with progress.stage("Training references", passes) as advance:

        def told(done: int) -> None:
            advance(done)
            finished = {name for name in waiting if _is_whole(folder, name, settings.keep)}
            if finished:
                waiting.difference_update(finished)
                _write(folder, contents)

        if jobs:
            executor.map(perform, jobs, told)
    _write(folder, contents)


@dataclass(frozen=True)
class _Part:
    """Some records that the base has to be able to take."""

    settings: ReferenceSettings
    records: tuple[Record, ...]


def unfit(part: _Part, advance: Advance) -> list[Failure]:
    """The records that the base cannot take."""
    target = Model(part.settings).load()
    failures: list[Failure] = []
    for record in part.records:
        failures += collect.encode(target, [record]).failures
        advance(1)
    return failures


def _unfit(
    settings: ReferenceSettings, given: Sequence[Record], executor: Executor, progress: Progress
) -> list[Failure]:
    """Found before hours are spent: a training would stop at such a record."""
    parts = [
        _Part(settings, tuple(given[start : start + _PART]))
        for start in range(0, len(given), _PART)
    ]
    with progress.stage("Checking records", len(given)) as advance:
        found = list(chain.from_iterable(executor.map(unfit, parts, advance)))
    if found and settings.strict:
        raise UserError(found[0].error, f"record {found[0].id}")
    return found


@dataclass(frozen=True)
class _Trial:
    """A few records to be trained on by the clock."""

    settings: ReferenceSettings
    recipe: FineTuning
    records: tuple[Record, ...]


def clock(trial: _Trial, advance: Advance) -> tuple[float, Pace]:
    """How long the base takes to load, and what the recipe takes."""
    release()
    begun = perf_counter()
    target = trial.settings.load()
    opening = perf_counter() - begun
    tried = [(record, collect.encode(target, [record]).failures) for record in trial.records]
    fit = [record for record, failures in tried if not failures]
    if not fit:
        raise UserError(f"no record can be used. First: {tried[0][1][0].error}")
    pace = measure_pace(target, fit, trial.recipe)
    advance(1)
    return opening, pace


def _estimate(
    settings: ReferenceSettings,
    recipe: FineTuning,
    given: Sequence[Record],
    references: int,
    executor: Executor,
    progress: Progress,
) -> Estimate:
    if not given:
        raise UserError("none of the records can be used")
    # Records lie in the order of their hashes: the first ones are drawn by lot.
    few = tuple(given[: _OFFERED * recipe.batch_size])
    with progress.stage("Taking a few steps", 1) as advance:
        (description,) = executor.map(describe, [Model(settings)])
        ((opening, pace),) = executor.map(clock, [_Trial(settings, recipe, few)], advance)
    workers = min(executor.workers, references)
    # While a checkpoint takes another's place both are there.
    checkpoints = 2 * (pace.kept_bytes + pace.state_bytes) if settings.keep[-1] > 1 else 0
    return Estimate(
        references,
        -(-len(given) // 2),
        settings.keep[-1],
        workers,
        description.device,
        description.dtype.removeprefix("torch."),
        opening,
        pace,
        references * len(settings.keep) * pace.kept_bytes,
        workers * (checkpoints + pace.kept_bytes),
    )
