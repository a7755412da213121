"""The page that sets several membership audits side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pyarrow import csv as arrow_csv

from lightleak.errors import UserError
from lightleak.report.comparison import contents, figures, words
from lightleak.report.contents import flatten
from lightleak.report.pages import write_page
from lightleak.runs import replacing, write_table


def compare(
    runs: Sequence[str | Path],
    out: str | Path = "compare.html",
    *,
    labels: Sequence[str] = (),
    csv: str | Path | None = None,
    parquet: str | Path | None = None,
) -> Path:
    """Write one page about several membership audits, say of successive generations of a model.

    The same runs give the same page, byte for byte. The runs themselves are not changed.

    Args:
        runs: folders of two or more finished membership audits, in the order to be shown.
        out: the page: one file that opens offline, without scripts.
        labels: what to call each run; without any each is called by its folder.
        csv, parquet: also write the numbers there, one row a run and signal.

    Returns:
        Where the page is.

    Raises:
        UserError: runs that cannot be compared at all, or a file that cannot be written.
    """
    audits = contents.read(runs, labels)
    _refuse_overwriting(runs, [Path(each) for each in (out, csv, parquet) if each is not None])
    if csv is not None:
        with replacing(Path(csv)) as stream:
            arrow_csv.write_csv(contents.table(audits), stream)
    if parquet is not None:
        write_table(Path(parquet), contents.table(audits))
    return write_page(
        Path(out),
        "comparison.html.j2",
        audits=audits,
        words=words,
        prevalence=figures.prevalence(audits),
        auc=figures.auc(audits),
        manifests=[list(flatten(audit.manifest)) for audit in audits],
    )


def _refuse_overwriting(runs: Sequence[str | Path], files: Sequence[Path]) -> None:
    """No file of a comparison may lie in a run or take another one's place."""
    folders = [Path(run).resolve() for run in runs]
    for file in files:
        if file.is_dir():
            raise UserError("this is a folder", str(file), "Give a file.")
        if any(file.resolve().is_relative_to(folder) for folder in folders):
            raise UserError("a run folder holds the run and nothing else", str(file))
    if len({file.resolve() for file in files}) < len(files):
        raise UserError("page and tables are one file", str(files[0]), "Give each a name.")
