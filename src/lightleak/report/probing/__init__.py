"""The page of a probe."""

from __future__ import annotations

from typing import Any

from lightleak.report.probing import figures, words
from lightleak.report.probing.contents import read
from lightleak.runs import Run


def fill(run: Run, *, show_images: bool) -> dict[str, Any]:
    """What `probing.html.j2` is filled with.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    contents = read(run, show_images=show_images)
    return {
        "verdict": contents.verdict,
        "contents": contents,
        "words": words,
        "layer_curves": figures.layer_curves(contents),
        "gains": figures.gains(contents),
        "by_seed": figures.by_seed(contents),
        "published": figures.published(contents),
        "projections": figures.projections(contents),
        "turning": figures.turning(contents),
    }
