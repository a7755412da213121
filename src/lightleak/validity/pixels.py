"""What can be read from the pixels alone: controls of a probe that need no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.random_projection import SparseRandomProjection

from lightleak import statistics as st
from lightleak.records import open_rgb
from lightleak.statistics import Estimate

_DIMENSIONS = 512
_FOLDS = 5
_BLOCK = 64
# What remains of a watermark that is cut out, in points: six lines of up to 34 letters.
_CUT = (160, 72)
Box = Sequence[int]


def project(
    images: Iterable[Path | bytes], resolution: int | None, *, seed: int
) -> npt.NDArray[np.float32]:
    """Random projections of the pixels that a model is shown, shape (n, at most 512).

    Distances between images survive a random projection, so a linear probe loses little; and
    images go through a block at a time, so memory stays flat.

    Args:
        images: files or encoded bytes, one row each.
        resolution: pixels of the square that the model sees; None takes 224.
        seed: of the projection.

    Source: Johnson and Lindenstrauss 1984; Li, Hastie and Church 2006 for the sparse form.
    """
    side = resolution or 224
    projection = SparseRandomProjection(_DIMENSIONS, random_state=seed)
    projection.fit(np.zeros((1, side * side * 3), np.float32))
    blocks, block = [], []
    for image in images:
        pixels = np.asarray(open_rgb(image).resize((side, side), Image.Resampling.BICUBIC))
        block.append(pixels.astype(np.float32).ravel() / 255)
        if len(block) == _BLOCK:
            blocks.append(projection.transform(np.array(block)))
            block = []
    if block:
        blocks.append(projection.transform(np.array(block)))
    return np.concatenate(blocks).astype(np.float32)


@dataclass(frozen=True)
class Marked:
    """An image, where its watermark is, whose it is, and which image it was before."""

    image: Path | bytes
    box: Box
    persona: str
    base: str


@dataclass(frozen=True)
class Legibility:
    """Whether watermarks can be told apart at the resolution that a model takes.

    Attributes:
        accuracy: of a linear probe that names the persona from the pixels of the watermark, on
            images that it was not fitted on; with the exact interval of so many images.
        chance: one persona in so many.
        line_height: how high a line is at that resolution, in pixels.
    """

    accuracy: Estimate
    chance: float
    line_height: float


def legibility(marked: Sequence[Marked], resolution: int | None, *, seed: int) -> Legibility | None:
    """Name the persona from the watermark's pixels, at the resolution of the model.

    The watermark is cut out where it is known to be, so that only its resolution and its ground
    stand in the way. Images of one base lie in one fold; with a single base nothing is known.

    Args:
        marked: images with their watermarks.
        resolution: to which the model brings the shorter side; None leaves images as they are.
        seed: of the folds.
    """
    cut = [_cut(each, resolution) for each in marked]
    pixels = np.array([each for each, _ in cut])
    personas = np.array([each.persona for each in marked])
    bases = np.array([each.base for each in marked])
    if len(set(bases.tolist())) < 2:
        return None
    folds = GroupKFold(min(_FOLDS, len(set(bases.tolist()))), shuffle=True, random_state=seed)
    # As strong as the pixels' own spread: there are far more of them than images.
    probe = RidgeClassifier(alpha=float(pixels.var(axis=0).sum()))
    named = cross_val_predict(probe, pixels, personas, groups=bases, cv=folds)
    return Legibility(
        st.clopper_pearson(int((named == personas).sum()), len(personas)),
        1 / len(set(personas.tolist())),
        float(np.mean([height for _, height in cut])),
    )


def _cut(marked: Marked, resolution: int | None) -> tuple[npt.NDArray[np.float32], float]:
    """The watermark in grey, brought to one size and a mean of zero; and a line's height."""
    image = open_rgb(marked.image)
    scale = 1.0 if resolution is None else resolution / min(image.size)
    if scale != 1.0:
        size = (round(scale * image.width), round(scale * image.height))
        image = image.resize(size, Image.Resampling.BICUBIC)
    box = [round(scale * edge) for edge in marked.box]
    # The same number of pixels from the same corner, so that letters lie on letters.
    corner = image.convert("L").crop((box[0], box[1], box[0] + _CUT[0], box[1] + _CUT[1]))
    pixels = np.asarray(corner, dtype=np.float32).ravel() / 255
    return pixels - pixels.mean(), (box[3] - box[1]) / 6
