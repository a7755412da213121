"""What pixels alone say: whether a watermark can be read, and nothing of who was seen."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lightleak.planting import PUBLISHED, draw_personas, stamp
from lightleak.validity.pixels import Marked, legibility, project


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """Five personas on the same eight plain grounds, at random places."""
    folder, rng, found = tmp_path_factory.mktemp("marked"), np.random.default_rng(0), []
    for base in range(8):
        ground = tuple(rng.integers(0, 150, 3).tolist())
        for persona in draw_personas(5, seed=1):
            place = tuple(rng.random(2).tolist())
            done = stamp(Image.new("RGB", (224, 224), ground), persona, PUBLISHED, place)
            file = folder / f"{base}-{persona.key}.png"
            done.image.save(file)
            found.append(Marked(file, done.box, persona.key, str(base)))
    return found


def test_watermarks_can_be_read_where_the_model_sees_enough_pixels(marked):
    found = legibility(marked, 224, seed=0)
    assert found.accuracy.low > 0.5
    assert found.chance == 0.2
    assert 14 < found.line_height < 20


def test_watermarks_cannot_be_read_at_32_pixels(marked):
    found = legibility(marked, 32, seed=0)
    assert found.accuracy.low < 0.3
    assert found.line_height < 3


def test_projections_keep_distances(marked):
    files = [each.image for each in marked[:12]]
    projected = project(files, 64, seed=0)
    pixels = np.array(
        [
            np.asarray(Image.open(file).resize((64, 64), Image.Resampling.BICUBIC)).ravel() / 255
            for file in files
        ]
    )
    own, kept = (
        np.linalg.norm(values[:, None] - values[None], axis=2) for values in (pixels, projected)
    )
    apart = own > 0
    assert np.abs(kept[apart] / own[apart] - 1).max() < 0.35
