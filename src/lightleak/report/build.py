"""From a run folder to report.html."""

from __future__ import annotations

from pathlib import Path

from lightleak.errors import UserError
from lightleak.report import contents, identity, membership, probing
from lightleak.report.pages import write_page
from lightleak.runs import Run

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
    manifest, cutoffs = opened.manifest(), filled["verdict"].cutoffs
    return write_page(
        opened.report_file,
        f"{opened.kind}.html.j2",
        manifest=manifest,
        manifest_rows=list(contents.flatten(manifest)),
        failures=contents.failures(opened),
        hashes=contents.hashes(opened),
        cutoffs=[
            (field.description, getattr(cutoffs, name))
            for name, field in type(cutoffs).model_fields.items()
        ],
        show_images=show_images,
        **filled,
    )
