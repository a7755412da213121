"""Tables of results in the pages of docs/, each between two marks of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, line by line."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def put(page: Path, script: str, lines: Sequence[str]) -> None:
    """Replace what stands between a script's marks."""
    begin, end = f"<!-- begin: {script} -->", f"<!-- end: {script} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    text = "\n".join(lines).strip()
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")
