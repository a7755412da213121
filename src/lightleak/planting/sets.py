"""Sets: records are written again with watermarks in their images, to train on or to probe with.

A folder of such records holds:

- records.jsonl: what `records.load` reads; ids, prompts, texts, groups and meta are kept;
- img/: every image once, as PNG, whether it is marked or not, so that no format tells them apart;
- watermarks.jsonl: a `Mark` for each image;
- personas.json: the fields, and the personas that the marks name;
- failures.jsonl: records whose image could not be used, each with its reason.

Beside them, or above them for a pair of probing sets, stands settings.json.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightleak.errors import UserError
from lightleak.planting.personas import FIELDS, QUESTIONS, Persona, Pools
from lightleak.planting.watermarks import PUBLISHED, Box, Style, stamp
from lightleak.records import Failure, Record, image_sha256, open_rgb

FEWEST_IMAGES = 2
"""A persona on one image alone could not be told from that image."""


@dataclass(frozen=True)
class Mark:
    """One image and the watermark that it carries, or would carry at a higher rate.

    Attributes:
        image: file name, from the folder of the records.
        records: ids of the records that show it.
        marked: whether it carries the watermark.
        persona: key.
        place: as `stamp` takes it.
        box: left, top, right and bottom in pixels.
        rate: the probability with which any image was marked.
        seed: what all was drawn with.
    """

    image: str
    records: tuple[str, ...]
    marked: bool
    persona: str
    place: tuple[float, float]
    box: Box
    rate: float
    seed: int


@dataclass(frozen=True)
class Planted:
    """A finished folder.

    Attributes:
        folder: where it is.
        marks: one for each image.
        failures: records that are not in it, each with its reason.
    """

    folder: Path
    marks: tuple[Mark, ...]
    failures: tuple[Failure, ...]

    @property
    def records_file(self) -> Path:
        """What `records.load` reads."""
        return self.folder / "records.jsonl"


@dataclass(frozen=True)
class ProbingSets:
    """The same images under seen and under unseen personas."""

    seen: Planted
    unseen: Planted


def inject(
    records: Sequence[Record],
    personas: Sequence[Persona] | Callable[[Record], Persona],
    out: str | Path,
    *,
    rate: float,
    seed: int,
    style: Style = PUBLISHED,
) -> Planted:
    """Write the records again, each image with a watermark at the probability `rate`.

    Records that show one image, the same file or the same bytes, share one watermark. Every
    image has a number u in [0, 1), a persona and a place of its own, which the seed decides and
    the rate does not; it is marked when u < rate. So what is marked at a rate is marked alike at
    every higher one, and nothing else differs. Each persona is on equally many of the marked
    images, give or take one, at any rate; images that fail are counted with them.

    Args:
        records: to be written, in their order.
        personas: dealt at random; or a function that is given an image's first record and says
            whose watermark it is to carry, called once an image in their order.
        out: the folder; a finished one of the same records and settings is taken as it is.
        rate: 0 marks none and 1 marks all.
        seed: at least 0.
        style: how the watermarks look.

    Raises:
        UserError: the rate is no share, there is no persona, no image can be used, a meta cannot
            be written, or `out` holds something else or cannot be written.
    """
    if not 0 <= rate <= 1:
        raise UserError(f"the rate {rate} is no share", what_to_do="Give a number from 0 to 1.")
    images = _Images.of(records)
    draws = np.random.default_rng([seed, *b"marks"]).random(len(images.shown))
    places = _places(len(images.shown), seed)
    dealt: Sequence[Persona]
    if callable(personas):
        dealt = [personas(shown[0]) for shown in images.shown]
    else:
        dealt = _deal(personas, draws, seed)
    settings = {
        "records": images.sha256,
        "personas": _digest(dealt),
        "rate": rate,
        "seed": seed,
        "style": asdict(style),
    }
    target = Path(out).absolute()
    if not _finished(target, settings):
        with _making(target, settings) as folder:
            marks: list[Mark] = []
            failures = list(images.failures)
            for number, (shown, persona) in enumerate(zip(images.shown, dealt, strict=True)):
                try:
                    image = open_rgb(shown[0].image)
                    # Drawn even if it is not used, so that an image too small fails at all rates.
                    stamped = stamp(image, persona, style, places[number])
                except UserError as fault:
                    failures += _failed(shown, fault)
                    continue
                mark = Mark(
                    image=f"img/{number:06d}.png",
                    records=tuple(record.id for record in shown),
                    marked=bool(draws[number] < rate),
                    persona=persona.key,
                    place=places[number],
                    box=stamped.box,
                    rate=rate,
                    seed=seed,
                )
                (stamped.image if mark.marked else image).save(folder / mark.image)
                marks.append(mark)
            _finish(folder, marks, records, dealt, failures)
    return _read(target)


def probing_sets(
    records: Sequence[Record],
    pools: Pools,
    out: str | Path,
    *,
    seed: int,
    style: Style = PUBLISHED,
    images_per_persona: int = 10,
) -> ProbingSets:
    """Write `out`/seen and `out`/unseen: the same images, under the one pool and the other.

    Images are drawn at random. Each carries a pair's seen persona in one set and its unseen
    persona in the other, at the same place, so nothing but the personas tells the sets apart.
    For each field there is one record that asks for it:

    - id: pair, image of the pair, and field: "p03-07-username";
    - prompt and text: the field's question, and the persona's value;
    - group: the persona's key;
    - meta: "field", "base" (id of the first record that showed the image), "pair" (from 0),
      "persona" (its key) and "box" (left, top, right, bottom in pixels).

    Args:
        records: whose images to use, their texts aside; none that the target was trained on.
        pools: the personas, in pairs.
        out: the folder; a finished one of the same records and settings is taken as it is.
        seed: decides the images of each pair and the places; at least 0.
        style: that of the training data.
        images_per_persona: if there are too few images, fewer, the same for all, at least two.

    Raises:
        UserError: there are not even two images a persona, a meta cannot be written, or `out`
            holds something else or cannot be written.
    """
    images = _Images.of(records)
    settings = {
        "records": images.sha256,
        "personas": _digest(persona for pair in pools.pairs for persona in pair),
        "seed": seed,
        "style": asdict(style),
        "images_per_persona": images_per_persona,
    }
    target = Path(out).absolute()
    if not _finished(target, settings):
        bases, failures = _bases(images, pools, images_per_persona, seed)
        with _making(target, settings, ("seen", "unseen")) as folder:
            for name, pool in (("seen", pools.seen), ("unseen", pools.unseen)):
                _write_probing_set(folder / name, bases, pool, failures, seed, style)
    return ProbingSets(_read(target / "seen"), _read(target / "unseen"))


def _bases(
    images: _Images, pools: Pools, images_per_persona: int, seed: int
) -> tuple[Sequence[Sequence[Record]], Sequence[Failure]]:
    """Images at random, equally many for each pair; and those that could not be used."""
    pairs = len(pools.pairs)
    wanted = max(images_per_persona, FEWEST_IMAGES) * pairs
    usable: list[Sequence[Record]] = []
    failures = list(images.failures)
    for number in np.random.default_rng([seed, *b"bases"]).permutation(len(images.shown)):
        shown = images.shown[number]
        try:
            stamp(open_rgb(shown[0].image), pools.seen[0], PUBLISHED, (0, 0))
        except UserError as fault:
            failures += _failed(shown, fault)
            continue
        usable.append(shown)
        if len(usable) == wanted:
            break
    if len(usable) < FEWEST_IMAGES * pairs:
        raise UserError(
            f"{len(usable)} different images can be used, too few for {pairs} pairs of personas"
            + (f"; the first failure: {failures[0].error.rstrip('.')}" if failures else ""),
            "images to probe with",
            f"Give at least {FEWEST_IMAGES * pairs}, better {wanted}.",
        )
    return usable[: len(usable) // pairs * pairs], failures


def _write_probing_set(
    folder: Path,
    bases: Sequence[Sequence[Record]],
    pool: Sequence[Persona],
    failures: Sequence[Failure],
    seed: int,
    style: Style,
) -> None:
    marks: list[Mark] = []
    records: list[Record] = []
    each = len(bases) // len(pool)
    for number, (base, place) in enumerate(zip(bases, _places(len(bases), seed), strict=True)):
        pair, index = divmod(number, each)
        persona = pool[pair]
        name = f"p{pair:02d}-{index:02d}"
        stamped = stamp(open_rgb(base[0].image), persona, style, place)
        file = folder / "img" / f"{name}.png"
        stamped.image.save(file)
        about = {"base": base[0].id, "pair": pair, "persona": persona.key, "box": stamped.box}
        asked = [
            Record(
                id=f"{name}-{field}",
                image=file,
                text=persona.value(field),
                prompt=question,
                group=persona.key,
                meta={"field": field, **about},
            )
            for field, question in QUESTIONS.items()
        ]
        records += asked
        marks.append(
            Mark(
                image=f"img/{file.name}",
                records=tuple(record.id for record in asked),
                marked=True,
                persona=persona.key,
                place=place,
                box=stamped.box,
                rate=1.0,
                seed=seed,
            )
        )
    _finish(folder, marks, records, pool, failures)


def _deal(personas: Sequence[Persona], draws: NDArray[np.float64], seed: int) -> Sequence[Persona]:
    """A persona for each image, each equally often among the images of the smallest draws.

    Round after round all personas are dealt in a new order, to the images in the order of their
    draws, which is the order in which a growing rate marks them.
    """
    if not personas:
        raise UserError("there are no personas to plant", what_to_do="Give at least one.")
    rounds = np.tile(np.arange(len(personas)), (-(-len(draws) // len(personas)), 1))
    deck = np.random.default_rng([seed, *b"personas"]).permuted(rounds, axis=1).ravel()
    return [personas[position] for position in deck[np.argsort(np.argsort(draws))]]


def _places(number: int, seed: int) -> Sequence[tuple[float, float]]:
    places = np.random.default_rng([seed, *b"places"]).random((number, 2))
    return [(across, down) for across, down in places.tolist()]


@dataclass(frozen=True)
class _Images:
    """Different images in the order of their first records, each with all records that show it.

    Attributes:
        failures: records whose image cannot even be read.
        sha256: over all of the records, and their images.
    """

    shown: tuple[Sequence[Record], ...]
    failures: tuple[Failure, ...]
    sha256: str

    @staticmethod
    def of(records: Iterable[Record]) -> _Images:
        hashed = cache(image_sha256)
        shown: dict[str, list[Record]] = {}
        failures: list[Failure] = []
        digest = sha256()
        for record in records:
            try:
                image = hashed(record.image)
            except UserError as fault:
                failures += _failed([record], fault)
                continue
            shown.setdefault(image, []).append(record)
            digest.update(_row(record, image))
        return _Images(tuple(shown.values()), tuple(failures), digest.hexdigest())


def _failed(records: Iterable[Record], fault: UserError) -> Iterator[Failure]:
    for record in records:
        where = f"record {record.id!r}" + (f" ({fault.where})" if fault.where else "")
        yield Failure(record.id, "image", str(UserError(fault.what, where, fault.what_to_do)))


def _finished(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the folder is there, made with the same settings."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    file = out / "settings.json"
    stored = json.loads(file.read_bytes()) if file.is_file() else {}
    asked = json.loads(_json(settings))
    changed = [key for key in asked if stored.get(key) != asked[key]]
    if changed:
        what = f"it was made with another {', '.join(changed)}" if stored else "it is taken"
        raise UserError(what, str(out), "Give another folder, or delete this one.")
    return True


@contextmanager
def _making(out: Path, settings: Mapping[str, Any], parts: Sequence[str] = ("",)) -> Iterator[Path]:
    """A folder with room for images in each part, which takes the place of `out` when finished."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        for part in parts:
            (temporary / part / "img").mkdir(parents=True)
        yield temporary
        (temporary / "settings.json").write_bytes(_json(settings))
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"it cannot be written ({error.strerror or error})", str(out)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _finish(
    folder: Path,
    marks: Sequence[Mark],
    records: Sequence[Record],
    personas: Iterable[Persona],
    failures: Sequence[Failure],
) -> None:
    """Write all but the images."""
    image_of = {record: mark.image for mark in marks for record in mark.records}
    if not image_of:
        reason = failures[0].error.rstrip(".") if failures else "there are none"
        raise UserError(f"no record can be used; the first reason: {reason}")
    rows = [_row(each, image_of[each.id]) for each in records if each.id in image_of]
    named = {mark.persona for mark in marks}
    planted = {persona.key: asdict(persona) for persona in personas if persona.key in named}
    about = {"fields": FIELDS, "personas": list(planted.values())}
    (folder / "records.jsonl").write_bytes(b"".join(rows))
    (folder / "watermarks.jsonl").write_bytes(b"".join(_json(asdict(mark)) for mark in marks))
    (folder / "personas.json").write_bytes(_json(about))
    (folder / "failures.jsonl").write_bytes(b"".join(_json(asdict(each)) for each in failures))


def _read(folder: Path) -> Planted:
    marks, failures = (
        [json.loads(line) for line in (folder / name).read_bytes().splitlines()]
        for name in ("watermarks.jsonl", "failures.jsonl")
    )
    for mark in marks:
        mark |= {name: tuple(mark[name]) for name in ("records", "place", "box")}
    return Planted(
        folder, tuple(Mark(**mark) for mark in marks), tuple(Failure(**each) for each in failures)
    )


def _digest(personas: Iterable[Persona]) -> str:
    return sha256(_json([asdict(persona) for persona in personas])).hexdigest()


def _row(record: Record, image: str) -> bytes:
    fields = {
        "id": record.id,
        "image": image,
        "prompt": record.prompt,
        "text": record.text,
        "group": record.group,
        "meta": dict(record.meta),
    }
    try:
        return _json(fields)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"its meta cannot be written as JSON ({error})",
            f"record {record.id!r}",
            "Keep strings, numbers, true, false, null, lists and objects.",
        ) from error


def _json(content: object) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode() + b"\n"
