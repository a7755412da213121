"""Errors that a user can mend: one line that says what, where, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input or the usage; shown as one line, without a traceback, exit code 2.

    Args:
        what: what is wrong, in plain words.
        where: the record, file or option it is about; empty when there is none.
        what_to_do: how to mend it; empty when it is obvious.
    """

    def __init__(self, what: str, where: str = "", what_to_do: str = "") -> None:
        self.what, self.where, self.what_to_do = map(_one_line, (what, where, what_to_do))
        super().__init__(str(self))

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return f"{line}. {self.what_to_do}" if self.what_to_do else line


def _one_line(text: str) -> str:
    """Without line breaks and without characters that could steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
