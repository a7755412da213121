"""How much of each record is in what fine-tuning changed: gradients, K and b, job by job.

Each record's gradient is held against all others, so they are written down, slab by slab; once K
and b are made of them, they are removed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightleak import signals
from lightleak.audits.measure import claim
from lightleak.audits.models import Model, made, release
from lightleak.audits.passes import Pass, Plan, piece_of, save_tensors
from lightleak.audits.settings import AuditSettings
from lightleak.audits.sides import Sides
from lightleak.errors import UserError
from lightleak.evidence import collect
from lightleak.evidence.collect import BatchSize
from lightleak.evidence.gradients import GradientEngine
from lightleak.evidence.readings import ModelReadings
from lightleak.evidence.shares import (
    POINTS,
    Kernel,
    chosen,
    record_gradients,
    selection_of,
)
from lightleak.records import Record
from lightleak.runs import Progress, Run
from lightleak.runs.executors import Executor
from lightleak.runs.progress import Advance
from lightleak.targets import Change, DualEncoderTarget, Target

FOLDER = "shares"
# K of so many records is solved in a minute, and held in memory several times.
_MOST_RECORDS = 8000
_SAMPLE = 8
# Of gradients that are held in memory at once.
_CHUNK_BYTES = 256e6


@dataclass(frozen=True)
class Reading:
    """What is read, fixed when it begins.

    Attributes:
        size: batch limits.
        shard: records that are written together.
        groups: names of matrices.
        shapes: (out, in) of each; of an adapter's, B's.
        unseen: those that only autograd sees whole.
        number: bytes of one number of a gradient.
    """

    size: BatchSize
    shard: int
    groups: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, int]]
    unseen: tuple[str, ...]
    number: int

    @property
    def width(self) -> int:
        """Bytes of a record's gradient."""
        return self.number * sum(out * size for out, size in self.shapes.values())

    @property
    def dtype(self) -> torch.dtype:
        """Bfloat16 keeps enough of what is only ever added up; a float64 model is kept whole."""
        return torch.float64 if self.number == torch.float64.itemsize else torch.bfloat16


def gather_shares(
    run: Run,
    target: Pass,
    references: Mapping[str, Model],
    sides: Sides,
    progress: Progress,
    executor: Executor,
) -> str:
    """Hold every record's gradient against all others and what training changed.

    Only where a signal reads it and the base is known; where it would take too much, a note says so
    and the signal goes without.

    Args:
        run: the run.
        target: its own pass, with its plan.
        references: models that were trained from the same base, by name.
        sides: the records.
        progress: shows how far it is.
        executor: does the jobs.

    Returns:
        Why they were left out; empty where they were not.
    """
    settings, base = target.settings, target.settings.known_base()
    asked = {signals.get(name).evidence(settings.options_of(name)) for name in settings.signals}
    if base is None or ModelReadings not in asked:
        return "not asked for"
    if len(sides.records) > _MOST_RECORDS:
        why_not = f"{len(sides.records)} records, and {_MOST_RECORDS} can be solved"
        progress.note(f"No shares: {why_not}.")
        return why_not
    folder = run.evidence / FOLDER
    folder.mkdir(exist_ok=True)
    of = replace(target, folder=folder, of="")
    claim(of, sides)
    begun = Plan.stored(target.folder)
    assert begun is not None  # Its records were measured before.
    for name, model in {"target": target.model, **references}.items():
        points = [point for point in POINTS if not _whole(folder / _result(point, name))]
        if points:
            what = f"what training changed, {name}"
            own = replace(of, model=model, of=what)
            given = Look(own, name, base, begun, sides.records[:_SAMPLE], sides.bank)
            with progress.stage(f"Looking at {what}", 1) as advance:
                (reading,) = executor.map(look, [given], advance)
            why_not = reading if isinstance(reading, str) else _too_much(reading, sides, settings)
            if why_not or isinstance(reading, str):
                _change_file(folder, name).unlink(missing_ok=True)
                progress.note(f"No shares, {name}: {why_not}.")
                return str(why_not)
            for point in points:
                _gather_point(own, name, base, reading, point, sides, progress, executor)
            _change_file(folder, name).unlink()
    return ""


def _gather_point(
    of: Pass,
    name: str,
    base: str,
    reading: Reading,
    point: str,
    sides: Sides,
    progress: Progress,
    executor: Executor,
) -> None:
    slabs = [
        Slab(of, name, base, reading, point, sides.bank, index, sides.records[start:stop])
        for index, (start, stop) in enumerate(_spans(len(sides.records), reading.shard))
    ]
    where = f"{name} at the {point}"
    with progress.stage(f"Gradients, {where}", len(sides.records)) as advance:
        missing = [each for each in slabs if not each.done()]
        advance(len(sides.records) - sum(len(each.records) for each in missing))
        executor.map(take_gradients, missing, advance)
    with progress.stage(f"Each record against each, {where}", 1) as advance:
        executor.map(multiply, [Product(of, name, reading, point)], advance)
    for slab in slabs:
        slab.file.unlink(missing_ok=True)  # A rehearsal writes but one.


def _too_much(reading: Reading, sides: Sides, settings: AuditSettings) -> str:
    """Why the gradients cannot be written down; empty where they can."""
    needed, room = len(sides.records) * reading.width / 1e9, settings.evidence_limit
    if needed <= room:
        return ""
    return (
        f"the gradients of {len(sides.records)} records would take {needed:.3g} GB for a while, "
        f"and the evidence limit is {room:.3g} GB"
    )


def _spans(count: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, count)) for start in range(0, count, step)]


# -- jobs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """The first job: what a model changed, and how records' gradients are read there."""

    of: Pass
    name: str
    base: str
    plan: Plan
    sample: tuple[Record, ...]
    bank: tuple[Record, ...]


def look(job: Look, advance: Advance) -> Reading | str:
    """Write the change down; how gradients are read, or why they cannot be."""
    try:
        change = _change(job.of.model, job.base)
    except UserError as error:
        return error.what
    groups = chosen(change)
    names = [name for group in groups.values() for name in group]
    deltas = {name: change.delta(name).flatten(1) for name in names}
    shapes = {name: (len(each), each.shape[1]) for name, each in deltas.items()}
    save_tensors(
        _change_file(job.of.folder, job.name),
        {name: each.flatten() for name, each in deltas.items()},
        {},
    )
    target = _with_bank(change.at(0.0), job.bank, job.plan.size)
    selection = selection_of(target, names)
    unread = [name for name in names if name not in selection.shapes]
    if not names or unread:
        return f"{unread[0]} cannot be read" if unread else "no matrix differs from the base's"
    unseen: set[str] = set()
    if not target.has_adapter:
        engine = GradientEngine(target, selection)
        alone = [[each] for each in collect.encode(target, job.sample).records]
        collect.run(target, alone, lambda batch: unseen.update(engine.unseen(batch)))
    number = (torch.float64 if target.wide == torch.float64 else torch.bfloat16).itemsize
    whole = Reading(job.plan.size, job.plan.shard, groups, shapes, tuple(sorted(unseen)), number)
    advance(1)
    return replace(whole, shard=min(whole.shard, piece_of(whole.width)))


def _change(model: Model, base: str) -> Change:
    release()  # These are moved: whoever comes next must load its own.
    settings = model.settings
    return Change.between(settings.load(), lambda: settings.load(base))


def _change_file(folder: Path, name: str) -> Path:
    return folder / f"change-{name}.safetensors"


@dataclass(frozen=True)
class Slab:
    """Some records whose gradients are written together.

    Attributes:
        of: the pass, of the model whose change it is.
        name: of the model.
        base: what it was fine-tuned from.
        plan: how gradients are read.
        point: where.
        bank: of a dual encoder's negatives.
        index: of the slab.
        records: the slab.
    """

    of: Pass
    name: str
    base: str
    plan: Reading
    point: str
    bank: tuple[Record, ...]
    index: int
    records: tuple[Record, ...]

    @property
    def file(self) -> Path:
        """Where they go."""
        name = f"gradients-{self.point}-{self.name}-{self.index:05d}.safetensors"
        return self.of.folder / name

    def done(self) -> bool:
        """Whether the file is there and about these records."""
        try:
            with safe_open(self.file, "pt") as content:
                return bool(content.metadata()["of"] == self._key)
        except (OSError, SafetensorError):
            return False

    @property
    def _key(self) -> str:
        return json.dumps([record.id for record in self.records])

    def write(self, gradients: Mapping[str, Tensor], ids: Sequence[str]) -> None:
        """Write them at once; `ids` are of the records that have a gradient."""
        save_tensors(self.file, dict(gradients), {"of": self._key, "ids": json.dumps(ids)})


def take_gradients(slab: Slab, advance: Advance) -> None:
    """Write every record's gradient of a slab down."""

    def placed() -> GradientEngine:
        target = _change(slab.of.model, slab.base).at(POINTS[slab.point])
        target = _with_bank(target, slab.bank, slab.plan.size)
        selection = selection_of(target, slab.plan.shapes).whole(slab.plan.unseen)
        return GradientEngine(target, selection)

    engine = made((slab.of, slab.point), placed)
    dtype, size = slab.plan.dtype, slab.plan.size
    ids, gradients, _ = record_gradients(engine, slab.records, size, dtype, advance)
    slab.write(gradients, ids)


def _with_bank(target: Target, bank: Sequence[Record], size: BatchSize) -> Target:
    """A dual encoder needs negatives, embedded by itself."""
    if isinstance(target, DualEncoderTarget) and bank:
        target.bank = collect.embed_bank(target, bank, size)
    return target


@dataclass(frozen=True)
class Product:
    """K and b of a point, once all gradients are written."""

    of: Pass
    name: str
    reading: Reading
    point: str


def multiply(job: Product, advance: Advance) -> None:
    """K = GGᵀ and b = −ΔGᵀ of each group, some columns of some matrix at a time."""
    folder, point = job.of.folder, job.point
    device = torch.device(job.of.description.device)
    wide = torch.float64 if job.reading.dtype == torch.float64 else torch.float32
    with ExitStack() as stack:

        def opened(file: Path) -> Any:
            return stack.enter_context(safe_open(file, "pt"))

        written = folder.glob(f"gradients-{point}-{job.name}-*.safetensors")
        slabs = [opened(file) for file in sorted(written)]
        change = opened(_change_file(folder, job.name))
        ids = [key for each in slabs for key in json.loads(each.metadata()["ids"])]
        n = len(ids)
        groups = list(job.reading.groups)
        gram, against, square = (
            torch.zeros(len(groups), *shape, dtype=wide, device=device)
            for shape in ((n, n), (n,), ())
        )
        group_of = {name: groups.index(g) for g, own in job.reading.groups.items() for name in own}
        for name, g in group_of.items():
            width = math.prod(job.reading.shapes[name])
            for start, stop in _spans(width, int(_CHUNK_BYTES / wide.itemsize / max(1, n))):
                parts = [each.get_slice(name)[:, start:stop] for each in slabs]
                gradients = torch.cat(parts).to(device, wide)
                delta = change.get_slice(name)[start:stop].to(device, wide)
                gram[g] += gradients @ gradients.T
                against[g] -= gradients @ delta
                square[g] += delta.square().sum()
        content = {"gram": gram, "against": against, "square": square}
        # One entry: of several, the order in the file is not fixed.
        about = {"of": json.dumps({"ids": ids, "groups": groups})}
        save_tensors(folder / _result(point, job.name), content, about)
    advance(1)


# -- without a model --------------------------------------------------------------------------


def read_shares(run: Run) -> dict[str, dict[str, dict[str, float]]]:
    """Model → reading → record id → number: "share head base", "along inner end" and the like.

    Raises:
        UserError: a file is damaged.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for point in POINTS:
        for file in sorted((run.evidence / FOLDER).glob(f"{point}-*.safetensors")):
            own = found.setdefault(file.stem.removeprefix(f"{point}-"), {})
            for word, values in _solved(file, file.stat().st_mtime_ns).items():  # As it is now.
                own[f"{word} {point}"] = values
    return found


@lru_cache(maxsize=128)
def _solved(file: Path, _written: int) -> dict[str, dict[str, float]]:
    """Reading → record id → number. n³ steps: once for all signals and models that are compared."""
    try:
        with safe_open(file, "np") as content:
            about = json.loads(content.metadata()["of"])
        kernel = Kernel(tuple(about["groups"]), **safetensors.numpy.load_file(file))
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise UserError(
            f"it is damaged ({error})", str(file), "Delete it and run the same audit again."
        ) from error
    return {
        word: dict(zip(about["ids"], values.tolist(), strict=True))
        for word, values in kernel.readings().items()
    }


def shares_done(run: Run, asked: Mapping[str, Any]) -> bool:
    """Whether all that was to be made is there, by what was written of it when it was done."""
    if asked.get("shares") != "made":
        return "shares" in asked
    models = ("target", *asked["trained on"])
    return all(
        (run.evidence / FOLDER / _result(point, name)).is_file()
        for point in POINTS
        for name in models
    )


def _result(point: str, name: str) -> str:
    return f"{point}-{name}.safetensors"


def _whole(file: Path) -> bool:
    """Whether a result is there; one that is damaged is made again."""
    try:
        with safe_open(file, "np") as content:
            return bool(content.metadata()["of"])
    except (OSError, SafetensorError, TypeError, KeyError):
        return False
