"""`lightleak demo`: the main job on a target whose truth is known."""

from __future__ import annotations

import time
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from lightleak.cli.console import Bars, output, show


def demo(
    out: Annotated[Path, typer.Option(help="Folder for target and runs.")] = Path("lightleak-demo"),
    seed: Annotated[int, typer.Option(help="Of scenes, membership and training.")] = 0,
    open_report: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the first report in a browser.")
    ] = True,
) -> None:
    """Train a small model, then audit records that it was trained on, and records that it was not.

    Both audits use the same controls, so the second shows what the first would have said of
    records that the model never saw.
    """
    from lightleak import lab
    from lightleak.audits import membership
    from lightleak.report import report

    started = time.monotonic()
    bars = Bars()
    made = lab.build("captions-tiny", out / "lab", seed=seed, progress=bars)
    held_out = made.nonmembers.read_text(encoding="utf-8").splitlines(keepends=True)
    half = len(held_out) // 2
    controls = made.nonmembers.with_name("controls.jsonl")
    untrained = made.nonmembers.with_name("untrained.jsonl")
    controls.write_text("".join(held_out[:half]), encoding="utf-8")
    untrained.write_text("".join(held_out[half:]), encoding="utf-8")
    pages = []
    for name, suspects, title in (
        ("trained", made.members, "Suspects that the model was trained on"),
        ("untrained", untrained, "Suspects that the model never saw"),
    ):
        run = out / name
        verdict = membership.audit(
            target=made.target,
            suspect=suspects,
            control=controls,
            out=run,
            seed=seed,
            progress=bars,
            command=f"lightleak demo --seed {seed}",
            credit=lab.ATTRIBUTION,
        )
        pages.append(report(run, show_images=True))
        show(verdict, pages[-1], title)
    output.print(f"Done in {time.monotonic() - started:.0f} s.", highlight=False)
    output.print(lab.ATTRIBUTION, style="dim", highlight=False)
    if open_report and output.is_terminal:
        webbrowser.open(pages[0].resolve().as_uri())
