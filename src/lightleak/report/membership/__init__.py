"""The page of a membership audit."""

from __future__ import annotations

from typing import Any

from lightleak.report.membership import figures, words
from lightleak.report.membership.contents import read
from lightleak.runs import Run, read_table


def fill(run: Run, *, show_images: bool) -> dict[str, Any]:
    """What `membership.html.j2` is filled with.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    contents = read(run, show_images=show_images)
    verdict, scores = contents.verdict, contents.scores
    settings = run.manifest()["settings"]
    return {
        "verdict": verdict,
        "contents": contents,
        "words": words,
        "tests": words.tests(verdict),
        "declared": words.declared(settings["design"]),
        "roc": [] if scores is None else figures.roc(scores, settings["seed"]),
        "distributions": (
            [] if scores is None else figures.distributions(scores, verdict.primary.signal)
        ),
        "set_size": figures.set_size(read_table(run.curve_file), verdict.cutoffs.alpha),
        "blind_comparison": figures.blind_comparison(verdict, settings.get("blind_fields", ())),
    }
