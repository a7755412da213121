"""Questions about shapes, from the package easy-vqa (V. Zhou, MIT licence), made fit to be marked.

The pictures are scaled up, since six lines of text cannot be read at their 64 pixels, and dimmed,
since white at half opacity cannot be read on their nearly white grounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lightleak.errors import UserError
from lightleak.records import open_rgb

SIDE = 224
BRIGHTNESS = 0.6
ATTRIBUTION = "Shapes and questions: easy-VQA by Victor Zhou, MIT licence."


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    Attributes:
        picture: its number in the package.
        file: where it lies.
    """

    picture: int
    file: Path
    question: str
    answer: str

    def image(self) -> Image.Image:
        """The picture at `SIDE` pixels and `BRIGHTNESS` of its own."""
        picture = open_rgb(self.file).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        return picture.point([round(BRIGHTNESS * level) for level in range(256)] * 3)


def questions(number: int, *, seed: int) -> list[Question]:
    """Draw questions about `number` different pictures; the same for the same seed.

    Yes-or-no questions are left out: a small model answers them from their words alone.

    Raises:
        UserError: the package is not installed, or has fewer pictures.
    """
    try:
        import easy_vqa
    except ImportError as missing:
        raise UserError(
            f"the lab's questions need the package {missing.name}, which is not installed",
            what_to_do='Run: pip install "lightleak[demo]"',
        ) from missing
    asked: dict[int, list[Question]] = {}
    files = easy_vqa.get_train_image_paths()
    for text, answer, picture in zip(*easy_vqa.get_train_questions(), strict=True):
        if answer not in ("yes", "no"):
            asked.setdefault(picture, []).append(
                Question(picture, Path(files[picture]), text, answer)
            )
    if number > len(asked):
        raise UserError(f"easy-vqa has questions about {len(asked):,} pictures, not {number:,}")
    rng = np.random.default_rng([seed, 2])
    pictures = rng.permutation(sorted(asked))[:number]
    return [_one(asked[picture], rng) for picture in pictures.tolist()]


def _one(asked: Sequence[Question], rng: np.random.Generator) -> Question:
    return asked[int(rng.integers(len(asked)))]
