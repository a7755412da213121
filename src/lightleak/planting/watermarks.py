"""Watermarks: the details of a persona drawn over an image.

Source: Ju et al. 2025, arXiv:2503.01208: six lines, white at alpha 128, at a random position.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil
from typing import Literal, get_args

from PIL import Image, ImageDraw, ImageFont

from lightleak.errors import UserError
from lightleak.planting.personas import Persona

Position = Literal["random", "corner", "fixed"]
Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels; right and bottom lie outside."""

SMALLEST_SIDE = 96
"""Pixels; on a smaller image six lines would be no text but noise."""


@dataclass(frozen=True)
class Style:
    """How a watermark looks; as published unless said otherwise.

    Attributes:
        alpha: of the text, 0 (invisible) … 255 (opaque).
        colour: of the text, red, green and blue, 0 … 255.
        size: of the font, as a share of the image's shorter side. The least that was legible
            when looked at on images of 224 pixels, where it makes a font of 12.
        position: "random": anywhere that the watermark fits; "corner": one of the four; "fixed":
            the top left.
        plate: alpha of a black plate behind the text, 0 … 255. The published watermark has none
            and cannot be read on a white ground, where 96 makes it legible.
    """

    alpha: int = 128
    colour: tuple[int, int, int] = (255, 255, 255)
    size: float = 0.055
    position: Position = "random"
    plate: int = 0

    def __post_init__(self) -> None:
        if not all(0 <= level <= 255 for level in (self.alpha, self.plate, *self.colour)):
            raise UserError(
                f"alpha {self.alpha}, colour {self.colour} and plate {self.plate} must be levels",
                "style of the watermark",
                "Give numbers from 0 to 255.",
            )
        if not 0 < self.size <= 1 / 6:
            raise UserError(
                f"the size {self.size} leaves no room for six lines",
                "style of the watermark",
                "Give a share of the image's shorter side: more than 0, at most 1/6.",
            )
        if self.position not in get_args(Position):
            raise UserError(
                f"unknown position {self.position!r}",
                "style of the watermark",
                f"Use one of {', '.join(get_args(Position))}.",
            )


PUBLISHED = Style()


@dataclass(frozen=True)
class Stamped:
    """A marked image; outside the box it is as it was."""

    image: Image.Image
    box: Box


def stamp(
    image: Image.Image, persona: Persona, style: Style, place: tuple[float, float]
) -> Stamped:
    """Draw a persona's lines over a copy of an image.

    Where the longest line would leave the image, the font is smaller.

    Args:
        image: mode RGB.
        persona: whose lines.
        style: how they look.
        place: where, across and down, as shares in [0, 1] of the room that the watermark leaves
            free: (0, 0) is the top left and (1, 1) the bottom right, whatever its size. For
            "corner" the nearest corner is taken; for "fixed" it makes no difference.

    Raises:
        UserError: a side is shorter than `SMALLEST_SIDE`.
    """
    mask = _mask("\n".join(persona.lines), style, image.size)
    across, down = {
        "random": place,
        "corner": (round(place[0]), round(place[1])),
        "fixed": (0, 0),
    }[style.position]
    left = round(across * (image.width - mask.width))
    top = round(down * (image.height - mask.height))
    box = (left, top, left + mask.width, top + mask.height)
    marked = image.copy()
    marked.paste((0, 0, 0), box, Image.new("L", mask.size, style.plate))
    marked.paste(style.colour, box, mask)
    return Stamped(marked, box)


@lru_cache(maxsize=32)  # most images of a set have one size, and a pool is small
def _mask(text: str, style: Style, image_size: tuple[int, int]) -> Image.Image:
    """The text's alpha (mode L) with a margin, in the largest font that fits."""
    width, height = image_size
    largest = max(1, round(style.size * min(image_size)))
    for pixels in range(largest if min(image_size) >= SMALLEST_SIDE else 0, 0, -1):
        margin = pixels // 3
        drawing = ImageDraw.Draw(Image.new("L", (0, 0)))
        left, top, right, bottom = drawing.multiline_textbbox((0, 0), text, _font(pixels))
        size = (ceil(right - left) + 2 * margin, ceil(bottom - top) + 2 * margin)
        if size[0] <= width and size[1] <= height:
            mask = Image.new("L", size)
            start = (margin - left, margin - top)
            ImageDraw.Draw(mask).multiline_text(start, text, style.alpha, _font(pixels))
            return mask
    raise UserError(
        f"the image has {width} × {height} pixels, too few for a watermark of six lines",
        what_to_do=f"Scale it up: at least {SMALLEST_SIDE} pixels a side, better 224.",
    )


@cache
def _font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # Comes with Pillow, so it is there wherever Pillow is.
    return ImageFont.load_default(pixels)
