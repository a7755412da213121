"""`lightleak signals`: what can be measured, from which paper, and with which options."""

from __future__ import annotations

import typing

from rich.table import Table

from lightleak.cli.console import output


def signals() -> None:
    """List the signals with their sources and options."""
    from lightleak import signals as room
    from lightleak.evidence.readings import EXTRA, OF_KIND

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("signal", "for", "what it is", "source", "options (--set SIGNAL.OPTION=VALUE)"):
        table.add_column(column, overflow="fold")
    for name in room.names():
        each = room.get(name)
        options = ", ".join(
            f"{option}={parameter.default}{_choices(parameter.annotation)}"
            for option, parameter in each.options.items()
        )
        kinds = [kind for kind, needs in OF_KIND.items() if each.needs in needs]
        further = EXTRA.get(each.needs)
        unit = "answers" if "endpoint" in kinds else "forwards"
        cost = f" Of a model only where it is named: {further} more {unit} a record."
        table.add_row(
            name,
            " and ".join(kinds),
            each.summary + cost * bool(further),
            each.source,
            options or "—",
        )
    output.print(table, markup=False)


def _choices(annotation: object) -> str:
    choices = typing.get_args(annotation)
    named = [choice for choice in choices if isinstance(choice, str)]
    return f" ({' | '.join(named)})" if named else ""
