"""Harmless changes of a record: what watermarks are compared with (arXiv 2503.01208)."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from lightleak.records import Record

# Whole phrases, in lower case, with what means the same in any sentence that they are likely in.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "beside": ("next to",),
    "big": ("large",),
    "color": ("colour",),
    "colour": ("color",),
    "contain": ("show", "include"),
    "contains": ("shows", "includes"),
    "describe": ("give a description of", "characterise"),
    "gray": ("grey",),
    "grey": ("gray",),
    "how many": ("what number of",),
    "image": ("picture",),
    "is there": ("is it true that there is", "would you say there is"),
    "large": ("big",),
    "little": ("small",),
    "next to": ("beside",),
    "no": ("nope",),
    "photo": ("photograph",),
    "photograph": ("photo",),
    "picture": ("image",),
    "present?": ("visible?", "to be seen?"),
    "shape": ("form", "figure"),
    "show": ("display",),
    "shows": ("displays",),
    "small": ("little",),
    "what color": ("which color",),
    "what colour": ("which colour",),
    "what shape": ("which shape", "what kind of shape"),
    "yes": ("yeah", "yep"),
}
# These two are answers; within a sentence "no" is another word.
_ALONE = ("no", "yes")
_PHRASES = re.compile(
    r"(?<!\w)(?:"
    + "|".join(
        rf"\A{phrase}\Z" if phrase in _ALONE else re.escape(phrase)
        for phrase in sorted(_SYNONYMS, key=len, reverse=True)
    )
    + r")(?!\w)",
    re.IGNORECASE,
)
_CHANGES = 2
_AROUND = ("Question: {}", "Please answer: {}", "{} Answer from the picture.")
_FULL_STOPS = ".!?。"


def augment_image(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turn, mirror, and change brightness and contrast, as published.

    Turned about its centre by up to 30° either way, on a canvas that grows so that nothing is cut
    off, with black corners; mirrored left to right with probability ½ (which a question of left
    and right does not survive); brightness, then contrast, times a number from [0.8, 1.2].

    Args:
        image: RGB.
        rng: decides all four.
    """
    turned = image.rotate(rng.uniform(-30, 30), Image.Resampling.BILINEAR, expand=True)
    if rng.random() < 0.5:
        turned = ImageOps.mirror(turned)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast):
        turned = change(turned).enhance(rng.uniform(0.8, 1.2))
    return turned


def augment_text(record: Record, rng: np.random.Generator) -> Record:
    """Say the question and the answer in slightly other words, and change nothing else.

    Up to two words of each give way to synonyms, as published (there a language model chooses
    them). The list is English and short: a question without any of its words gets a few words
    around it, in English, and an answer gains or loses its full stop. Neither is ever what it was.
    """
    prompt = _with_synonyms(record.prompt, rng)
    if prompt == record.prompt:
        prompt = str(rng.choice(_AROUND)).format(record.prompt)
    text = _with_synonyms(record.text, rng)
    if text == record.text:
        ends = len(text) > 1 and text[-1] in _FULL_STOPS
        text = text[:-1] if ends else f"{text}."
    return replace(record, prompt=prompt, text=text)


def _with_synonyms(text: str, rng: np.random.Generator) -> str:
    """`text` with up to two known phrases replaced, which ones drawn at random."""
    found = list(_PHRASES.finditer(text))
    chosen = rng.permutation(len(found))[:_CHANGES]
    for match in sorted((found[i] for i in chosen), key=lambda each: -each.start()):
        synonym = str(rng.choice(_SYNONYMS[match[0].lower()]))
        if match[0][0].isupper():
            synonym = synonym[0].upper() + synonym[1:]
        text = text[: match.start()] + synonym + text[match.end() :]
    return text
