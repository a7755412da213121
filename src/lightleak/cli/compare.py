"""`lightleak compare`: several membership audits on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lightleak.cli.console import output


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of audit, two or more.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("compare.html"),
    label: Annotated[
        list[str] | None,
        typer.Option(help="What to call a run; once for each, in their order. [its folder's name]"),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Also write the numbers there, one row a run and signal.")
    ] = None,
    parquet: Annotated[Path | None, typer.Option(help="Likewise as Parquet.")] = None,
) -> None:
    """Set audits side by side: how much of the suspects was used, by each signal and target.

    Example: lightleak compare runs/v1 runs/v2 runs/v3 --out compare.html
    """
    from lightleak.report.comparison import compare as build
    from lightleak.report.comparison import contents, words

    audits = contents.read(runs, label or ())
    page = build(runs, out, labels=label or (), csv=csv, parquet=parquet)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("audit", "verdict", "signal", "AUC", "share used"):
        table.add_column(column)
    for audit in audits:
        primary = audit.verdict.primary
        table.add_row(
            audit.label,
            audit.verdict.verdict,
            primary.signal,
            words.auc(primary.auc, primary.auc_ci95),
            words.share(audit.verdict, primary.signal),
        )
    output.print(table, markup=False)
    for check in words.obstacles(audits):
        output.print(f"{check.name}: {check.sentence}", markup=False, highlight=False)
    output.print(f"Page: {page}", markup=False, highlight=False, soft_wrap=True)
