"""How every page writes verdicts, numbers and texts of strangers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VERDICTS = {"exposed": "Exposed", "no_evidence": "No evidence", "inconclusive": "Inconclusive"}

Mark = Literal["passed", "caution", "failed", "not possible", "not run"]


@dataclass(frozen=True)
class Check:
    """One validity check and how it came out."""

    name: str
    mark: Mark
    sentence: str


def percent(share: float) -> str:
    """0.0667 → "6.7 %", which does not break over lines."""
    return f"{round(100 * share, 1):g}\N{NO-BREAK SPACE}%"


def thousands(number: int) -> str:
    """1234 → "1,234"."""
    return f"{number:,}"


def score(value: float) -> str:
    """Four digits, with a minus sign that is as wide as a plus."""
    return f"{value:.4g}".replace("-", "−")


def p_value(value: float | None) -> str:
    """Two digits; below 1 in 10,000 only that, for no formula knows its far tail so well."""
    if value is None:
        return "not computed"
    return "< 0.0001" if value < 0.95e-4 else f"{value:.2g}"


def cut(text: str, length: int = 240) -> str:
    """A text that may be of any length, to be shown; says how much of it is left out."""
    if len(text) <= length:
        return text
    return f"{text[:length].rstrip()} … (cut here; {len(text):,} characters in all)"
