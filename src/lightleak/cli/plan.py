"""`lightleak plan`: before anything is spent, what an audit will take and what it could find."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.table import Table

from lightleak.cli import audit
from lightleak.cli.console import Bars, output

if TYPE_CHECKING:
    from lightleak.audits.planning import Forecast, Prospect

_JSON = Annotated[Path | None, typer.Option("--json", help="Also write the forecast there.")]


def plan(json: Path | None, **given: Any) -> None:
    """What would an audit take, and what could it find? A few records are tried; nothing is kept.

    Takes the options of audit.

    Example: lightleak plan --target ./model --suspect mine.jsonl --control others.jsonl
    """
    from lightleak.audits import planning
    from lightleak.runs import write_json

    forecast = planning.plan(**audit.settings_of(given), progress=Bars())
    show(forecast)
    if json is not None:
        content = {**asdict(forecast), "seconds": forecast.seconds}
        for step, each in zip(content["steps"], forecast.steps, strict=True):
            step["seconds"] = each.seconds(forecast.workers)
        write_json(json, content)


def _options() -> Iterator[inspect.Parameter]:
    """Those of an audit, and `--json`."""
    # Where results go is taken, so that an audit's file of options can be, and not heeded.
    for each in inspect.signature(audit.audit, eval_str=True).parameters.values():
        if each.name not in audit.RESULTS:
            yield each
            continue
        kind, option = get_args(each.annotation)
        option = copy(option)
        option.hidden = True
        default = None if each.default is each.empty else each.default
        yield each.replace(annotation=Annotated[kind | None, option], default=default)
    yield inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_JSON)


plan.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in _options()]
)


def show(forecast: Forecast) -> None:
    """Print a forecast: first whether there can be an answer at all."""
    declared = forecast.prospects[0]
    if declared.hopeless:
        _say("These records can give no answer, whatever the model shows:")
        for reason in declared.reasons:
            _say(f"• {reason}")
        _say("")
    _say(f"What the audit takes, {_processes(forecast)}:")
    output.print(_steps(forecast), highlight=False, markup=False)
    _say(
        f"Estimated from at most {max(each.tried for each in forecast.steps)} records a step. "
        "Starting (seconds a process), scoring and testing (minutes for many thousand records) "
        "come on top."
    )
    held = forecast.memory
    _say(
        f"Memory, each process: {size(held.weights + held.batch)} (weights "
        f"{size(held.weights)}, the largest batch {size(held.batch)}), beside the program."
    )
    meanwhile = f", and {size(forecast.scratch_bytes)} meanwhile" * bool(forecast.scratch_bytes)
    _say(f"Disk: {size(forecast.evidence_bytes)} of evidence{meanwhile}.\n")
    _power(forecast)
    output.print(_prospects(forecast.prospects), highlight=False, markup=False)
    if not declared.hopeless:
        _say(declared.reasons[0])


def _processes(forecast: Forecast) -> str:
    count = f"{forecast.workers} processes" if forecast.workers > 1 else "one process"
    return f"in {count} on {forecast.device}, {forecast.dtype}"


def _steps(forecast: Forecast) -> Table:
    table = _table(">records", ">shards", ">time", first=("pass", "step"))
    table.add_row("records", "reading, comparing", "", "", duration(forecast.reading_seconds))
    for each in forecast.steps:
        numbers = (
            f"{each.records:,}",
            f"{each.shards:,}",
            duration(each.seconds(forecast.workers)),
        )
        table.add_row(each.of, each.what, *numbers)
    table.add_row("in all", "", "", "", duration(forecast.seconds))
    return table


def _power(forecast: Forecast) -> None:
    power = forecast.power
    least = power.min_detectable_auc
    records, groups = (
        (power.suspects, power.controls),
        (power.suspect_groups, power.control_groups),
    )
    worth = "worth {:,} and {:,} independent ones, ".format(*groups) * (records != groups)
    _say(
        f"What it could find, by {power.signal} at a level of {power.alpha:g}, with 90 % "
        f"probability: with {power.suspects:,} suspects and {power.controls:,} controls, {worth}"
        + ("nothing." if least is None else f"an AUC of {least:.3f} or more.")
    )
    table = _table(">independent records needed a side", "", first=("AUC",))
    for auc, count in power.needed.items():
        asked = float(auc) == round(power.asked, 2)
        table.add_row(auc, f"{count:,}", "◂ asked for “no evidence”" if asked else "")
    output.print(table, highlight=False)
    enough = power.needed[f"{power.asked:.2f}"]
    if min(power.suspect_groups, power.control_groups) < enough:
        _say(f"“No evidence” is out of reach: it takes {enough:,} independent records a side.")
    _say("")


def _prospects(prospects: tuple[Prospect, ...]) -> Table:
    table = _table("evidence", "if the test rejects", "if it does not", first=("design",))
    for each in prospects:
        name = f"{each.design} ◂ declared" if each is prospects[0] else each.design
        table.add_row(
            name, *(str(w).replace("_", " ") for w in (each.tier, each.if_found, each.if_not))
        )
    return table


def _table(*columns: str, first: tuple[str, ...]) -> Table:
    """A table; a column whose name begins with > stands to the right."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in (*first, *columns):
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    return table


def _say(text: str) -> None:
    output.print(text, markup=False, highlight=False)


def duration(seconds: float) -> str:
    """Seconds as a reader takes them in."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def size(count: int) -> str:
    """Bytes likewise."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count, 1e5) / 1e6:.1f} MB"
