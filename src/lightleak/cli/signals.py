"""`lightleak signals`: what can be measured, from which paper, and with which options."""

from __future__ import annotations

import typing

from rich.table import Table

from lightleak.cli.console import output


def signals() -> None:
    """List the signals with their sources and options."""
    from lightleak import signals as room

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("signal", "what it is", "source", "options (--set SIGNAL.OPTION=VALUE)"):
        table.add_column(column, overflow="fold")
    for name in room.names():
        each = room.get(name)
        options = ", ".join(
            f"{option}={parameter.default}{_choices(parameter.annotation)}"
            for option, parameter in each.options.items()
        )
        table.add_row(name, each.summary, each.source, options or "—")
    output.print(table, markup=False)


def _choices(annotation: object) -> str:
    choices = typing.get_args(annotation)
    named = [choice for choice in choices if isinstance(choice, str)]
    return f" ({' | '.join(named)})" if named else ""
