"""`lightleak lab`: targets whose truth is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lightleak.cli.console import Bars, output

app = typer.Typer(help="Targets that lightleak trains itself, so that the truth is known.")


@app.callback()
def _lab() -> None:
    """Keep `build` a subcommand though it is the only one."""


@app.command("build")
def build(
    recipe: Annotated[str, typer.Argument(help="captions-tiny or captions-lora.")],
    out: Annotated[Path, typer.Option(help="Folder for target, records and truth.")],
    seed: Annotated[int, typer.Option(help="Of scenes, membership and training.")] = 0,
    members: Annotated[int, typer.Option(help="Records to train on.")] = 300,
    nonmembers: Annotated[int, typer.Option(help="Records to hold out.")] = 600,
    epochs: Annotated[int | None, typer.Option(help="Passes over the members.")] = None,
    caption_shift: Annotated[
        bool,
        typer.Option("--caption-shift", help="Word the non-members' captions in another style."),
    ] = False,
) -> None:
    """Train a small vision-language model on records drawn at random, and write the truth."""
    from lightleak import lab

    made = lab.build(
        recipe,
        out,
        seed=seed,
        members=members,
        nonmembers=nonmembers,
        epochs=epochs,
        caption_shift=caption_shift,
        progress=Bars(),
    )
    for name in ("target", "adapter", "base", "members", "nonmembers", "truth"):
        path = getattr(made, name)
        if path is not None:
            output.print(f"{name:<11}{path}", markup=False, highlight=False, soft_wrap=True)
