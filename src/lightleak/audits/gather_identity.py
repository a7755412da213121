"""The expensive half of an identity audit: people, names and a model in, affinities on disk."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from lightleak.audits.settings import IdentitySettings
from lightleak.audits.sides import failures_table
from lightleak.errors import UserError
from lightleak.evidence.affinity import (
    Matcher,
    best_of_block,
    matcher,
    mean_of_block,
    whole_block,
)
from lightleak.evidence.readings import Integers
from lightleak.evidence.selfcheck import self_check
from lightleak.records import Failure, PeopleSet, Person, Record, load_people
from lightleak.records.people import name_key
from lightleak.runs import (
    EvidenceStore,
    Progress,
    cache_folder,
    write_json,
    write_table,
)
from lightleak.signals.identity import QUESTIONS, TEMPLATES, TOP, beyond_others
from lightleak.targets import Target
from lightleak.validity.decoys import DecoySet, TrueName, draw, from_file

# The embeddings of more texts would take gigabytes of the user's cache.
_MOST_CACHED_TEXTS = 200_000


@dataclass(frozen=True)
class Asked:
    """Everyone that is asked about.

    Attributes:
        people: of all sets, in one order that everything follows.
        sets: suspect, control or known for each.
        failures: photos and people that cannot be used, ids led by their set.
        hashes: content hash of each set.
    """

    people: tuple[Person, ...]
    sets: tuple[str, ...]
    failures: tuple[Failure, ...]
    hashes: dict[str, str]


@dataclass(frozen=True)
class Names:
    """Every name that photos are compared with.

    Attributes:
        names: decoys, one stratum after another, then the true names in the order of the people.
        strata: of each name.
        candidate: whether a photo may be given it, as published.
        described: the strata in words.
        warnings: what limits the comparison.
    """

    names: tuple[str, ...]
    strata: tuple[int, ...]
    candidate: tuple[bool, ...]
    described: tuple[str, ...]
    warnings: tuple[str, ...]


def read_people(settings: IdentitySettings) -> Asked:
    """Load the people of every set.

    Raises:
        UserError: no one can be used, or two sets share a name or a photo.
    """
    sources = {
        "suspect": (settings.people, settings.names),
        "control": (settings.controls, None),
        "known": (settings.known, None),
    }
    loaded: dict[str, PeopleSet] = {}
    for side, (folder, names) in sources.items():
        if folder is not None:
            found = load_people(
                folder,
                names=names or _names_beside(Path(folder), settings.allow_outside),
                strict=settings.strict,
                allow_outside=settings.allow_outside,
            )
            loaded[side] = replace(
                found,
                people=tuple(_within(side, person) for person in found.people),
                failures=tuple(replace(f, id=f"{side}/{f.id}") for f in found.failures),
            )
    _refuse_overlap(loaded)
    return Asked(
        tuple(person for each in loaded.values() for person in each.people),
        tuple(side for side, each in loaded.items() for _ in each.people),
        tuple(failure for each in loaded.values() for failure in each.failures),
        {f"{side} people": each.sha256 for side, each in loaded.items()},
    )


def _names_beside(folder: Path, allow_outside: bool) -> Path | None:
    file = folder / "names.csv"
    if not file.is_file():
        return None
    if not allow_outside and not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            "the link leads outside the folder", str(file), "Give it with --names if you trust it."
        )
    return file


def _within(side: str, person: Person) -> Person:
    """The person under a key that no other set has: "suspect/marie"."""
    key = f"{side}/{person.person}"
    return replace(
        person, person=key, photos=tuple(replace(photo, person=key) for photo in person.photos)
    )


def _refuse_overlap(loaded: dict[str, PeopleSet]) -> None:
    seen: dict[str, str] = {}
    for side, each in loaded.items():
        for person in each.people:
            for key in (name_key(person.name), *(photo.sha256 for photo in person.photos)):
                other = seen.setdefault(key, person.person)
                if other.partition("/")[0] != side:
                    raise UserError(
                        f"{other!r} and {person.person!r} share a name or a photo",
                        str(each.source),
                        "A person belongs to one set: take it out of the other.",
                    )


def read_templates(settings: IdentitySettings, kind: str) -> tuple[str, ...]:
    """The sentences (or, for a generative target, questions) that names are put into.

    Raises:
        UserError: the file cannot be read, holds none, or a sentence has no place for the name.
    """
    if settings.templates is None:
        return TEMPLATES if kind == "dual-encoder" else QUESTIONS
    try:
        lines = Path(settings.templates).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"it cannot be read ({error})", settings.templates) from error
    found = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise UserError("it holds no template", settings.templates, "Write one a line.")
    for template in found if kind == "dual-encoder" else ():
        if "{}" not in template:
            raise UserError(
                f"the template {template!r} has no place for the name",
                settings.templates,
                "Write {} where the name goes.",
            )
    return found


def choose_names(settings: IdentitySettings, asked: Asked, count: int) -> Names:
    """Decoys for everyone, and the true names.

    Raises:
        UserError: decoys cannot be drawn, or a file of them cannot be used.
    """
    true = [TrueName(person.name, person.gender) for person in asked.people]
    found: DecoySet = (
        draw(true, count, seed=settings.seed)
        if settings.decoys == "auto"
        else from_file(settings.decoys, true)
    )
    order = np.argsort(found.strata, kind="stable")
    n_candidates = max(0, settings.candidates - len(true))
    drawn = np.random.default_rng([settings.seed, 4]).permutation(len(order))[:n_candidates]
    return Names(
        names=(*(found.names[i] for i in order), *(each.name for each in true)),
        strata=(*(found.strata[i] for i in order), *found.of),
        candidate=(*np.isin(np.arange(len(order)), drawn).tolist(), *([True] * len(true))),
        described=tuple(str(each) for each in found.described),
        warnings=found.warnings,
    )


# -- the expensive half ------------------------------------------------------------------------


def gather(
    folder: Path,
    settings: IdentitySettings,
    target: Target,
    asked: Asked,
    names: Names,
    templates: Sequence[str],
    progress: Progress,
) -> None:
    """How well every name fits every photo, stored in blocks of names."""
    decides = {
        "evidence version": 1,
        **{f"target {key}": value for key, value in sorted(target.hashes.items())},
        **asked.hashes,
        "dtype": str(target.dtype),
        "device kind": target.device.type,
        "names": sha256(json.dumps(names.names).encode()).hexdigest(),
        "candidates": sum(names.candidate),
        "templates": list(templates),
    }
    store = EvidenceStore.claim(folder, decides)
    photos = [photo for person in asked.people for photo in person.photos]
    with progress.stage("Checking the model", 1) as advance:
        self_check(target, None, _sample(asked, templates, target), settings.size)
        advance(1)
    with progress.stage("Encoding photos", len(photos)) as advance:
        cache = _cache(names, templates)
        fits = matcher(target, photos, templates, size=settings.size, cache=cache)
        advance(len(photos))
    person_of = {person.person: i for i, person in enumerate(asked.people)}
    people = np.array([person_of[photo.person] for photo in fits.photos], dtype=np.int64)
    n_decoys = len(names.names) - len(asked.people)
    owners = np.array([-1] * n_decoys + list(range(len(asked.people))), dtype=np.int64)
    candidate = np.array(names.candidate)
    parts: dict[str, list[int]] = defaultdict(list)
    fitting = (
        f"Fitting {len(names.names):,} names to {len(fits.photos):,} photos, {len(templates)} times"
    )
    with progress.stage(fitting, len(names.names)) as advance:
        for index, here in enumerate(_blocks(names, n_decoys, fits.block)):
            voting = candidate[here]
            ranked = "top" if here[0] < n_decoys else "own"
            stages = ("mean", ranked, *(("best",) if voting.any() else ()))
            for stage in stages:
                parts[stage].append(index)
            if not all(store.has(stage, index) for stage in stages):
                cut = fits.truncated
                found = fits.affinities([names.names[i] for i in here])
                # A likelihood says first of all how usual a name is; cosines are as published.
                fit = (
                    found[..., :-1]
                    if target.kind == "dual-encoder"
                    else beyond_others(found, people, owners[here])
                )
                if voting.any():
                    store.put("best", index, best_of_block(fit[voting], here[voting], 1))
                if ranked == "top":
                    store.put("top", index, best_of_block(fit, here, TOP))
                else:
                    store.put("own", index, whole_block(fit, here))
                store.put("mean", index, mean_of_block(fit, here, fits.truncated - cut))
            advance(len(here))
    _store_asked(folder, asked, names, templates, fits, parts)


def _sample(asked: Asked, templates: Sequence[str], target: Target) -> list[Record]:
    """Some photos with their names, as records."""
    dual = target.kind == "dual-encoder"
    return [
        Record(
            photo.id,
            photo.file,
            text=templates[0].replace("{}", person.name) if dual else person.name,
            prompt=templates[0],
        )
        for person in asked.people
        for photo in person.photos
    ]


def _blocks(names: Names, n_decoys: int, size: int) -> Iterator[Integers]:
    """Indices of names that go through together: of one stratum, or of true names."""
    kind = np.array(names.strata)
    kind[n_decoys:] = -1
    for start, stop in pairwise([0, *(np.flatnonzero(np.diff(kind)) + 1), len(kind)]):
        for first in range(start, stop, size):
            yield np.arange(first, min(first + size, stop))


def _cache(names: Names, templates: Sequence[str]) -> Path | None:
    """Where embeddings of names are kept for later runs; those of faces are kept nowhere."""
    if len(names.names) * len(templates) > _MOST_CACHED_TEXTS:
        return None
    return cache_folder() / "embeddings"


def _store_asked(
    folder: Path,
    asked: Asked,
    names: Names,
    templates: Sequence[str],
    fits: Matcher,
    parts: dict[str, list[int]],
) -> None:
    """Keep who and what was asked, and what failed; never a photo, only where it lies."""
    write_json(
        folder / "asked.json",
        {
            "templates": list(templates),
            "strata": list(names.described),
            "warnings": list(names.warnings),
            "photos given": sum(len(person.photos) for person in asked.people)
            + sum(failure.stage == "photo" for failure in asked.failures),
            "parts": parts,
        },
    )
    people = {
        "person": [person.person for person in asked.people],
        "name": [person.name for person in asked.people],
        "set": list(asked.sets),
    }
    write_table(folder / "people.parquet", pa.table(people))
    photos = {
        "person": [photo.person for photo in fits.photos],
        "photo": [photo.file.name for photo in fits.photos],
        "file": [str(photo.file.resolve()) for photo in fits.photos],
    }
    write_table(folder / "photos.parquet", pa.table(photos))
    compared = {"name": names.names, "stratum": names.strata, "candidate": names.candidate}
    write_table(folder / "names.parquet", pa.table({k: list(v) for k, v in compared.items()}))
    failures = failures_table((*asked.failures, *fits.failures))
    write_table(folder / "unusable.parquet", failures)
