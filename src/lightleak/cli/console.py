"""What the user sees while something runs, and how a verdict looks in a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from lightleak.runs.progress import Advance

if TYPE_CHECKING:
    from lightleak.validity import IdentityVerdict, ProbingVerdict, Verdict
    from lightleak.validity.verdict import BaseVerdict

output = Console()
errors = Console(stderr=True)
_SHOWN = 20
_STYLES = {"exposed": "bold red", "no_evidence": "bold green", "inconclusive": "bold yellow"}


class _Rate(ProgressColumn):
    """Records a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed or (task.total or 0) < 10 else f"{speed:,.0f}/s")


class Bars:
    """One bar a stage in a terminal; one plain line a stage elsewhere."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Show a stage while it runs."""
        if not errors.is_terminal:
            started = time.monotonic()
            yield lambda _: None
            took = time.monotonic() - started
            errors.print(f"{name}: done in {took:.0f} s", highlight=False)
            return
        columns = (
            TextColumn("{task.description:<42}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=errors) as bars:
            task = bars.add_task(name, total=total)
            yield lambda done: bars.advance(task, done)
            bars.update(task, completed=total)

    def note(self, text: str) -> None:
        """Say something once."""
        errors.print(text, highlight=False)


def show(verdict: Verdict, report: Path, title: str = "") -> None:
    """Print a membership verdict, its reasons and where the report is."""
    _panel(verdict, title)
    output.print(_signals(verdict))
    counts = verdict.coverage
    aside = f", {counts.set_aside:,} more are the bank of negatives" if counts.set_aside else ""
    output.print(
        f"Records: {counts.attempted:,} given, {counts.scored:,} scored, {counts.failed:,} failed"
        f"{aside}.",
        highlight=False,
    )
    _report(report)


def show_people(verdict: IdentityVerdict, report: Path) -> None:
    """Print an identity verdict, who was found and where the report is."""
    _panel(verdict)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("person", "name", "p, name", "p, face", "q of the larger"):
        table.add_column(column)
    for each in sorted(verdict.found, key=lambda found: found.p_value)[:_SHOWN]:
        face = "—" if each.face_p_value is None else f"{each.face_p_value:.2g}"
        table.add_row(each.person, each.name, f"{each.p_value:.2g}", face, f"{each.q_value:.2g}")
    if verdict.found:
        output.print(table, markup=False)
    if len(verdict.found) > _SHOWN:
        output.print(f"… and {len(verdict.found) - _SHOWN} more in people.parquet.")
    published = verdict.published
    output.print(
        f"The published attack, among {published.names:,} names: {published.suspects.count} of "
        f"{published.suspects.of} recognised.",
        highlight=False,
    )
    for control in verdict.controls:
        output.print(control.sentence, markup=False, highlight=False)
    _report(report)


def show_probe(verdict: ProbingVerdict, report: Path) -> None:
    """Print the verdict of a probe, its conditions and where the report is."""
    _panel(verdict)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("condition", "surest at", "seen or unseen", "gain, 95 % interval", "p"):
        table.add_column(column)
    for each in verdict.conditions:
        best = each.best
        low, high = best.delta_ci95
        table.add_row(
            each.name,
            f"{best.tower} {best.layer}, {best.field}",
            f"{100 * best.accuracy:.1f} %",
            f"{100 * best.delta:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
            f"{each.p_value if each.p_value_holm is None else each.p_value_holm:.2g}",
        )
    output.print(table, highlight=False)
    for task in verdict.utility:
        low, high = task.ci95
        output.print(
            f"Task, {task.condition}: {100 * task.accuracy:.1f} % right "
            f"[{100 * low:.1f}, {100 * high:.1f}]",
            markup=False,
            highlight=False,
        )
    _report(report)


def _panel(verdict: BaseVerdict, title: str = "") -> None:
    head = Text(verdict.verdict.replace("_", " ").upper(), style=_STYLES[verdict.verdict])
    head.append(f"   evidence: {verdict.tier.replace('_', '-')}", style="dim")
    body = Text.assemble(head, "\n\n", verdict.sentence, "\n")
    for reason in verdict.reasons:
        body.append(f"\n• {reason}")
    output.print(Panel(body, title=title or None, title_align="left", width=min(100, output.width)))


def _report(page: Path) -> None:
    output.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)


def _signals(verdict: Verdict) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("signal", "AUC", "95 % interval", "TPR at 1 % FPR", "p (Holm)"):
        table.add_column(column)
    for name, each in sorted(verdict.signals.items(), key=lambda item: -(item[1].auc or 0)):
        rate = each.tpr_at_fpr.get("0.01")
        low, high = each.auc_ci95 or (float("nan"), float("nan"))
        table.add_row(
            f"{name} ◂ primary" if name == verdict.primary.signal else name,
            "—" if each.auc is None else f"{each.auc:.3f}",
            "—" if each.auc is None else f"{low:.3f} to {high:.3f}",
            "—" if rate is None else f"{rate.tpr:.3f} [{rate.ci95[0]:.3f}, {rate.ci95[1]:.3f}]",
            "—" if each.p_value_holm is None else f"{each.p_value_holm:.2g}",
        )
    return table
