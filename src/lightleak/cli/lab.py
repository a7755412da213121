"""`lightleak lab`: targets whose truth is known, and every signal held to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lightleak.cli.config import numbers
from lightleak.cli.console import Bars, output
from lightleak.cli.options import Workers

if TYPE_CHECKING:
    from lightleak.lab import BenchRow, LabTarget

app = typer.Typer(help="Targets that lightleak trains itself, so that the truth is known.")


@app.command("build")
def build(
    recipe: Annotated[
        str,
        typer.Argument(
            help="captions-tiny, captions-lora, captions-full, real-parts, pairs-clip, faces "
            "or vqa."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for target, records and truth.")],
    seed: Annotated[int, typer.Option(help="Of scenes, names, membership and training.")] = 0,
    members: Annotated[
        int | None,
        typer.Option(help="Records to train on; the recipe's own number, as for what follows."),
    ] = None,
    nonmembers: Annotated[
        int | None, typer.Option(help="Records (of faces: people) to hold out.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    caption_shift: Annotated[
        bool,
        typer.Option("--caption-shift", help="Word the non-members' captions in another style."),
    ] = False,
    prevalence: Annotated[
        float | None,
        typer.Option(help="Share of the suspects that is trained on, others in their place. [1]"),
    ] = None,
    copies: Annotated[
        str | None,
        typer.Option(
            help="How often a member stands in the training data; of faces, with 1,5,25 members "
            "get one each. [1; faces 25]"
        ),
    ] = None,
    attack_photos: Annotated[
        str | None, typer.Option(help="faces: write all photos or the unseen ones. [all]")
    ] = None,
) -> None:
    """Train a model on records or people drawn at random, and write the truth."""
    from lightleak import lab

    made = lab.build(
        recipe,
        out,
        seed=seed,
        members=members,
        nonmembers=nonmembers,
        epochs=epochs,
        caption_shift=caption_shift,
        prevalence=prevalence,
        copies=None if copies is None else numbers(copies, "--copies", int, "1,5,25"),
        attack_photos=attack_photos,
        progress=Bars(),
    )
    for name in ("target", "adapter", "base", "members", "known", "nonmembers", "truth"):
        path = getattr(made, name)
        if path is not None:
            _say(f"{'suspects' if path.stem == 'suspects' else name:<11}{path}")
    if recipe != "faces":
        _say(f"\n{_audit(made)}")


def _audit(made: LabTarget) -> str:
    """The command that audits it."""
    of = {"adapter": made.adapter} if made.adapter else {"base": made.base}
    options = {
        "target": made.target,
        **of,
        "suspect": made.members,
        "control": made.nonmembers,
        "design": "randomised",
        "out": "run",
    }
    given = (f"--{name} {value}" for name, value in options.items() if value is not None)
    return " ".join(("lightleak audit", *given))


@app.command("bench")
def bench(
    out: Annotated[Path, typer.Option(help="Folder; the same command goes on in it.")],
    recipes: Annotated[
        str, typer.Option(help="Of targets that are audited record by record, comma-separated.")
    ] = "captions-tiny,captions-lora,captions-full,pairs-clip",
    seeds: Annotated[int, typer.Option(min=1, help="Targets of each recipe.")] = 5,
    signals: Annotated[
        str, typer.Option(help="Names, comma-separated; all stands for those without extra passes.")
    ] = "all",
    members: Annotated[int | None, typer.Option(help="Of each target; else the recipe's.")] = None,
    nonmembers: Annotated[int | None, typer.Option(help="Likewise.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Likewise.")] = None,
    references: Annotated[
        int, typer.Option(min=0, help="Trained as the target was, where there is a base.")
    ] = 0,
    workers: Workers = 1,
) -> None:
    """Hold every signal to the truth: AUC, TPR, how large a set it needs, and what it costs."""
    from lightleak import lab

    rows = lab.bench(
        out,
        recipes=_split(recipes),
        seeds=range(seeds),
        signals=() if signals == "all" else _split(signals),
        members=members,
        nonmembers=nonmembers,
        epochs=epochs,
        references=references,
        workers=workers or None,
        progress=Bars(),
    )
    output.print(_board(rows), markup=False, highlight=False)
    _say(f"Means over {seeds} target(s) a recipe; every one is in {out / 'bench.csv'}.")


def _board(rows: Sequence[BenchRow]) -> Table:
    """A line a recipe and signal, best AUC first."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("recipe", "signal"):
        table.add_column(column)
    for column in ("AUC", "least to most", "TPR at 1 %", "at 5 %", "records needed", "ms a record"):
        table.add_column(column, justify="right")
    boards: dict[str, dict[str, list[BenchRow]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        of = f"{row.signal}, {row.references} references" if row.references else row.signal
        boards[row.recipe][of].append(row)
    for recipe, board in boards.items():
        areas = {name: [r.auc for r in found if r.auc is not None] for name, found in board.items()}
        for signal in sorted(board, key=lambda name: -mean(areas[name] or [0])):
            found, known = board[signal], areas[signal]
            table.add_row(
                recipe,
                signal,
                _mean([row.auc for row in found], ".3f"),
                f"{min(known):.3f} to {max(known):.3f}" if known else "—",
                _mean([row.tpr_at_1_percent for row in found], ".3f"),
                _mean([row.tpr_at_5_percent for row in found], ".3f"),
                _mean([row.set_size for row in found], ",.0f"),
                _mean([row.seconds_per_record for row in found], ".1f", 1000),
            )
    return table


def _mean(values: Sequence[float | None], form: str, scale: float = 1) -> str:
    """A dash where one of them is missing."""
    known = [value for value in values if value is not None]
    return format(scale * mean(known), form) if len(known) == len(values) else "—"


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _say(text: str) -> None:
    output.print(text, markup=False, highlight=False, soft_wrap=True)
