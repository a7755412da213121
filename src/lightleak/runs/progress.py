"""How a long stage tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """Shows stages; the command line draws bars, the default shows nothing."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Open a stage of `total` records; call what it yields with how many are done."""
        ...

    def note(self, text: str) -> None:
        """Say something once."""
        ...


class Silent:
    """Shows nothing."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """A stage that nobody sees."""
        del name, total
        return nullcontext(lambda _: None)

    def note(self, text: str) -> None:
        """Nobody hears it."""
        del text
