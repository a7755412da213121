"""`lightleak report`: judge stored evidence again and rebuild the page, without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lightleak.cli.console import Bars, show, show_people, show_probe


def report(
    run: Annotated[Path, typer.Argument(help="Run folder of audit, identify or probe.")],
    show_images: Annotated[
        bool, typer.Option("--show-images", help="Show images in the report.")
    ] = False,
) -> None:
    """Judge a run again from its stored evidence and rebuild its report; needs no model."""
    from lightleak.audits.judge import judge
    from lightleak.audits.judge_identity import judge_identity
    from lightleak.audits.judge_probing import judge_probing
    from lightleak.report import report as build
    from lightleak.runs import Run

    opened = Run.open(run)
    if opened.kind == "identity":
        people = judge_identity(opened, Bars())
        show_people(people, build(run, show_images=show_images))
    elif opened.kind == "probing":
        probed = judge_probing(opened, Bars())
        show_probe(probed, build(run, show_images=show_images))
    else:
        verdict = judge(opened, Bars())
        show(verdict, build(run, show_images=show_images))
