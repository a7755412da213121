"""`lightleak lab`: targets whose truth is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lightleak.cli.config import numbers
from lightleak.cli.console import Bars, output

app = typer.Typer(help="Targets that lightleak trains itself, so that the truth is known.")


@app.callback()
def _lab() -> None:
    """Keep `build` a subcommand though it is the only one."""


@app.command("build")
def build(
    recipe: Annotated[
        str, typer.Argument(help="captions-tiny, captions-lora, pairs-clip, faces or vqa.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for target, records and truth.")],
    seed: Annotated[int, typer.Option(help="Of scenes, names, membership and training.")] = 0,
    members: Annotated[
        int | None, typer.Option(help="Records (of faces: people) to train on. [300; faces 20]")
    ] = None,
    nonmembers: Annotated[
        int | None, typer.Option(help="Records (of faces: people) to hold out. [600; faces 20]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    caption_shift: Annotated[
        bool,
        typer.Option("--caption-shift", help="Word the non-members' captions in another style."),
    ] = False,
    copies: Annotated[
        str | None,
        typer.Option(help="faces: training pairs a member; of 1,5,25 members get one each. [25]"),
    ] = None,
    attack_photos: Annotated[
        str | None, typer.Option(help="faces: write all photos or the unseen ones. [all]")
    ] = None,
) -> None:
    """Train a small model on records or people drawn at random, and write the truth."""
    from lightleak import lab

    made = lab.build(
        recipe,
        out,
        seed=seed,
        members=members,
        nonmembers=nonmembers,
        epochs=epochs,
        caption_shift=caption_shift,
        copies=None if copies is None else numbers(copies, "--copies", int, "1,5,25"),
        attack_photos=attack_photos,
        progress=Bars(),
    )
    for name in ("target", "adapter", "base", "members", "nonmembers", "truth"):
        path = getattr(made, name)
        if path is not None:
            output.print(f"{name:<11}{path}", markup=False, highlight=False, soft_wrap=True)
    if recipe not in {"faces", "vqa"}:
        adapter = f" --adapter {made.adapter}" if made.adapter else ""
        output.print(
            f"\nlightleak audit --target {made.target}{adapter} --suspect {made.members} "
            f"--control {made.nonmembers} --out run",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
