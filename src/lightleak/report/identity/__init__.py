"""The page of an identity audit."""

from __future__ import annotations

from typing import Any

from lightleak.report.identity import figures, words
from lightleak.report.identity.contents import read
from lightleak.runs import Run


def fill(run: Run, *, show_images: bool) -> dict[str, Any]:
    """What `identity.html.j2` is filled with.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    contents = read(run, show_images=show_images)
    verdict = contents.verdict
    return {
        "verdict": verdict,
        "contents": contents,
        "words": words,
        "smallest_q": min(
            (one.name_q_value for one in contents.people if one.name_q_value is not None),
            default=None,
        ),
        "declared": words.declared(contents.design),
        "scale": figures.Scale.over(contents.spreads.values()),
        "curves": figures.curves(contents.curve, verdict.cutoffs.alpha),
        "nulls": figures.nulls(contents.nulls, verdict.controls, verdict.cutoffs.alpha),
    }
