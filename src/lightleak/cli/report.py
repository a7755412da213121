"""`lightleak report`: judge stored evidence again and rebuild the page, without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lightleak.cli.console import Bars, show, show_people, show_probe
from lightleak.cli.gate import FailIf, JUnit, Sarif, finish, parse


def report(
    run: Annotated[Path, typer.Argument(help="Run folder of audit, identify or probe.")],
    show_images: Annotated[
        bool, typer.Option("--show-images", help="Show images in the report.")
    ] = False,
    fail_if: FailIf = None,
    junit: JUnit = None,
    sarif: Sarif = None,
) -> None:
    """Judge a run again from its stored evidence and rebuild its report; needs no model."""
    from lightleak.audits.judge import judge
    from lightleak.audits.judge_identity import judge_identity
    from lightleak.audits.judge_probing import judge_probing
    from lightleak.report import report as build
    from lightleak.runs import Run
    from lightleak.validity import IdentityVerdict, ProbingVerdict, Verdict
    from lightleak.validity.verdict import BaseVerdict

    opened = Run.open(run)
    ends_in: dict[str, type[BaseVerdict]] = {"identity": IdentityVerdict, "probing": ProbingVerdict}
    gates = [parse(each, ends_in.get(opened.kind, Verdict)) for each in fail_if or ()]
    verdict: BaseVerdict
    if opened.kind == "identity":
        verdict = people = judge_identity(opened, Bars())
        show_people(people, build(run, show_images=show_images))
    elif opened.kind == "probing":
        verdict = probed = judge_probing(opened, Bars())
        show_probe(probed, build(run, show_images=show_images))
    else:
        verdict = judged = judge(opened, Bars())
        show(judged, build(run, show_images=show_images))
    finish(verdict, opened.folder, gates, junit, sarif)
