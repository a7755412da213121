"""`--config FILE.toml`: the same names as on the command line, which wins."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from lightleak.errors import UserError

Number = TypeVar("Number", int, float)


def numbers(text: str, option: str, kind: type[Number], example: str) -> list[Number]:
    """Numbers with commas between.

    Raises:
        UserError: one of them is none.
    """
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError as error:
        raise UserError(
            "numbers with commas between are wanted", f"{option} {text}", f"For example: {example}."
        ) from error


def _load(context: typer.Context, file: Path | None) -> Path | None:
    if file is None:
        return None
    try:
        given = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"no configuration can be read from it ({error})", str(file)) from error
    known = {
        str(parameter.name).rstrip("_"): parameter
        for parameter in context.command.params
        if parameter.name != "config"
    }
    values = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"{key!r} is no option of this command",
                str(file),
                f"Did you mean {close[0].replace('_', '-')}?" if close else "",
            )
        # `set` is a word of Python, so the parameter behind it ends in an underscore.
        parameter = known[name]
        several = getattr(parameter, "multiple", False)
        if isinstance(value, list) and not several:
            value = ",".join(map(str, value))
        if several and not isinstance(value, list):
            value = [value]
        values[str(parameter.name)] = value
    context.default_map = {**(context.default_map or {}), **values}
    return file


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Read options from a TOML file; the command line wins.",
        callback=_load,
        is_eager=True,
        metavar="FILE.toml",
    ),
]
