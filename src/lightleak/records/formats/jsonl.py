"""JSON: one object a line, and what the other readers of JSON share with it."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

from lightleak.errors import UserError
from lightleak.records.formats.rows import Row, fields_of_columns


def parse_json(encoded: bytes) -> object:
    """Parse UTF-8 JSON; NaN and Infinity, which JSON does not have, are refused.

    Raises:
        ValueError: not UTF-8 or not JSON; the message says why in one line.
    """
    try:
        return json.loads(encoded.decode(), parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def _reason_in_line(error: ValueError) -> str:
    """The reason without the parser's own line number, which is 1 in every line of JSONL."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error)


def jsonl_rows(file: Path) -> Iterator[Row]:
    """Yield a row for each line that is not blank.

    Raises:
        UserError: a line is not a JSON object or has an unknown column.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            content = line.removeprefix(BOM_UTF8) if number == 1 else line
            if not content.strip():
                continue
            where = f"{file}, line {number}"
            advice = "Write one JSON object a line, in UTF-8."
            try:
                values = parse_json(content)
            except ValueError as error:
                reason = _reason_in_line(error)
                raise UserError(f"this line is not JSON ({reason})", where, advice) from error
            if not isinstance(values, dict):
                raise UserError("this line is not a JSON object", where, advice)
            field = fields_of_columns(list(values), where)
            yield Row(f"line {number}", number, {field[name]: values[name] for name in values})
