"""From a run folder to report.html."""

from __future__ import annotations

from pathlib import Path

import jinja2

from lightleak.report import figures, words
from lightleak.report.contents import Contents, flatten, read
from lightleak.runs import Run, replacing
from lightleak.validity import Cutoffs


def report(run: str | Path | Run, *, show_images: bool = False) -> Path:
    """Write a run's report.html: one file that opens offline, without scripts.

    The same run gives the same page, byte for byte. Building it changes nothing else.

    Args:
        run: the folder of a judged run.
        show_images: embed small copies of the pictures of the records that are listed.

    Returns:
        Where the page is.

    Raises:
        UserError: the run has no verdict, or a file of it is missing or damaged.
    """
    opened = run if isinstance(run, Run) else Run.open(run)
    page = render(read(opened, show_images=show_images), show_images=show_images)
    with replacing(opened.report_file) as stream:
        stream.write(page.encode())
    return opened.report_file


def render(contents: Contents, *, show_images: bool) -> str:
    """The page as HTML. Every text of the run is escaped: records and file names are hostile."""
    verdict, scores = contents.verdict, contents.scores
    settings = contents.manifest["settings"]
    tests = words.tests(verdict)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lightleak.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": words.percent,
        "p": words.p_value,
        "score": words.score,
        "cut": words.cut,
    }
    return environment.get_template("report.html.j2").render(
        contents=contents,
        verdict=verdict,
        manifest=contents.manifest,
        manifest_rows=list(flatten(contents.manifest)),
        show_images=show_images,
        words=words,
        tests=tests,
        counted=next((test for test in tests if test.counts), None),
        declared=words.declared(settings["design"]),
        cutoffs=[
            (field.description, getattr(verdict.cutoffs, name))
            for name, field in Cutoffs.model_fields.items()
        ],
        roc=[] if scores is None else figures.roc(scores, settings["seed"]),
        distributions=(
            [] if scores is None else figures.distributions(scores, verdict.primary.signal)
        ),
        blind_comparison=figures.blind_comparison(verdict),
    )
