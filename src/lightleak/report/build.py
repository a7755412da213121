"""From a run folder to report.html."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from lightleak.errors import UserError
from lightleak.report import contents, identity, membership, probing, words
from lightleak.runs import Run, replacing

_KINDS = {"membership": membership.fill, "identity": identity.fill, "probing": probing.fill}


def report(run: str | Path | Run, *, show_images: bool = False) -> Path:
    """Write a run's report.html: one file that opens offline, without scripts.

    The same run gives the same page, byte for byte. Building it changes nothing else.

    Args:
        run: the folder of a judged run.
        show_images: embed small copies of the pictures of the records or people that are listed;
            without it faces are blurred beyond recognition, and other pictures left out.

    Returns:
        Where the page is.

    Raises:
        UserError: the run has no verdict, or a file of it is missing or damaged.
    """
    opened = run if isinstance(run, Run) else Run.open(run)
    if opened.kind not in _KINDS:
        raise UserError(
            f"no page is known for a run of the kind {opened.kind!r}",
            str(opened.manifest_file),
            f"Kinds: {', '.join(_KINDS)}.",
        )
    if not opened.verdict_file.is_file():
        raise UserError(
            "this run has no verdict yet",
            str(opened.folder),
            "Run the same audit again to its end.",
        )
    filled = _KINDS[opened.kind](opened, show_images=show_images)
    page = _render(opened, show_images=show_images, **filled)
    with replacing(opened.report_file) as stream:
        stream.write(page.encode())
    return opened.report_file


def _render(run: Run, **filled: Any) -> str:
    """The page as HTML. Every text of the run is escaped: records and file names are hostile."""
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
        "thousands": words.thousands,
        "cut": words.cut,
    }
    environment.globals["VERDICTS"] = words.VERDICTS
    manifest, cutoffs = run.manifest(), filled["verdict"].cutoffs
    return environment.get_template(f"{run.kind}.html.j2").render(
        manifest=manifest,
        manifest_rows=list(contents.flatten(manifest)),
        failures=contents.failures(run),
        hashes=contents.hashes(run),
        cutoffs=[
            (field.description, getattr(cutoffs, name))
            for name, field in type(cutoffs).model_fields.items()
        ],
        **filled,
    )
