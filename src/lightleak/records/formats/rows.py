"""What every reader yields, and the columns that every table may have."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightleak.errors import UserError

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "id": ("id",),
    "image": ("image", "file_name", "image_path"),
    "prompt": ("prompt", "question", "instruction"),
    "text": ("text", "caption", "answer", "response"),
    "group": ("group",),
    "meta": ("meta",),
}
"""The fields of a record, each with the names that a file may call it by."""

FIELD_OF = {name: field for field, names in COLUMNS.items() for name in names}


@dataclass(frozen=True)
class Row:
    """One record as its file has it; types and content are not checked yet.

    Attributes:
        place: where in the file, for messages: "line 3".
        number: the same as a number: lines count from 1, rows and entries from 0.
        fields: raw values by field name (`COLUMNS`); absent when the file has none.
        fault: why no record can be made of it, when the reader already knows.
    """

    place: str
    number: int
    fields: Mapping[str, object]
    fault: str = ""


def fields_of_columns(columns: Sequence[str], where: str) -> dict[str, str]:
    """Return the field that each column of a file holds.

    Raises:
        UserError: a column is unknown or given twice, or two columns mean the same field.
    """
    for column in columns:
        if column not in FIELD_OF:
            close = difflib.get_close_matches(column.lower(), FIELD_OF, n=1)
            guess = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(
                f"unknown column {column!r}",
                where,
                f"{guess.capitalize()}Known columns: {', '.join(FIELD_OF)}. "
                "Put anything else under meta.",
            )
    for field, count in Counter(FIELD_OF[column] for column in columns).items():
        if count > 1:
            same = " and ".join(repr(name) for name in columns if FIELD_OF[name] == field)
            raise UserError(f"the columns {same} all mean {field}", where, "Keep one of them.")
    return {column: FIELD_OF[column] for column in columns}
