"""What goes into a probe: its models, its records and questions, without any model yet."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lightleak.audits.settings import FEWEST_PAIRS, ProbingSettings
from lightleak.errors import UserError
from lightleak.evidence.augment import augment_image, augment_text
from lightleak.planting import FEWEST_IMAGES, FIELDS, Persona, draw_personas
from lightleak.records import Failure, Record, RecordSet, image_sha256, load, open_rgb
from lightleak.validity.probing import Kind

# More than this share of the images is never taken from the training.
_MOST_ASIDE = 0.25
_MOST_UTILITY = 400
_ANY_FIELD = "question"
# A seed of the data's own: what is trained on is the same in every repeat.
_SPLIT = 11


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


def seed_of_repeat(seed: int, repeat: int) -> int:
    """What a repeat draws with: its personas, places, order and labellings.

    Args:
        seed: of the whole run.
        repeat: from 0.
    """
    return seed + 1000 * repeat


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


def split(records: Sequence[Record], personas: int, each: int, *, seed: int) -> Data:
    """Divide records by image and group: a quarter at most to probe, a quarter for the task.

    Args:
        records: all of them.
        personas: in each pool.
        each: images to probe a persona with; where that is more than a quarter, fewer.
        seed: of the division.

    Raises:
        UserError: a quarter does not give two images a persona.
    """
    units = _units(records)
    order = np.random.default_rng([seed, _SPLIT]).permutation(len(units))
    shuffled = [units[i] for i in order]
    quarter = int(_MOST_ASIDE * len(shuffled))
    if quarter < FEWEST_IMAGES * personas:
        least, best = (round(n * personas / _MOST_ASIDE) for n in (FEWEST_IMAGES, each))
        raise UserError(
            f"{len(shuffled)} different images (or groups) are too few: a quarter is to probe "
            f"{personas} personas with",
            what_to_do=f"Give at least {least}, better {best}, or ask for fewer --personas.",
        )
    aside, tested = min(personas * each, quarter), min(_MOST_UTILITY, quarter)
    parts = shuffled[:aside], shuffled[aside : aside + tested], shuffled[aside + tested :]
    probing, utility, training = (tuple(chain.from_iterable(part)) for part in parts)
    return Data(training, probing, utility)


def _units(records: Sequence[Record]) -> list[list[Record]]:
    """Records that share an image or a group, or that others tie together, as one."""
    number: dict[str, int] = {}
    ties = []
    for record in records:
        image = number.setdefault(f"image {_digest(record.image)}", len(number))
        group = image
        if record.group is not None:
            group = number.setdefault(f"group {record.group}", len(number))
        ties.append((image, group))
    shape = (len(number), len(number))
    graph = coo_array((np.ones(len(ties)), tuple(zip(*ties, strict=True))), shape=shape)
    unit_of = connected_components(graph, directed=False)[1]
    units: dict[int, list[Record]] = {}
    for record, (image, _) in zip(records, ties, strict=True):
        units.setdefault(int(unit_of[image]), []).append(record)
    return list(units.values())


_digest = lru_cache(maxsize=65536)(image_sha256)


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
        for pool, folder in given_pools(settings).items()
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
    if min(len(seen), len(unseen)) < FEWEST_PAIRS:
        raise UserError(
            f"{len(seen)} seen and {len(unseen)} unseen personas are too few to probe",
            "--seen and --unseen",
            f"Give at least {FEWEST_PAIRS} of each, better twenty.",
        )
    drawn = [{str(pair): key for key, pair in pool.items()} for pool in (seen, unseen)]
    known = [pair for pair in drawn[0] if pair in drawn[1] and pair != "None"]
    if len(known) >= FEWEST_PAIRS:
        # One whose partner is missing is left out; its images say nothing of anybody else.
        return {side[pair]: i for i, pair in enumerate(known) for side in drawn}
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(sorted(pool)).tolist() for pool in (seen, unseen)]
    return {key: i for i, pair in enumerate(zip(*orders, strict=False)) for key in pair}


def given_pools(settings: ProbingSettings) -> dict[str, str | Path]:
    """Where the records of both pools are, of a model that somebody else fine-tuned."""
    return {"seen": settings.seen or "", "unseen": settings.unseen or ""}


def decided(
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
    often = {key: of_image[image] for key, image in shown.items()}
    answers = [text for text, _ in Counter(record.text for record in records).most_common(2)]
    answer = {True: answers[0], False: answers[1] if len(answers) > 1 else "none"}
    pool = {True: cycle(seen), False: cycle(draw_personas(len(seen), seed=seed[0] + 2**20))}
    return (
        [replace(record, text=answer[often[record.id]]) for record in records],
        lambda record: next(pool[often[record.id]]),
    )


def foils(questions: Sequence[Question], seed: Sequence[int]) -> list[Record]:
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


class Augmented(Sequence[Record]):
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
