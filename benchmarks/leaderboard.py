"""Every signal on targets of the lab, side by side: the table and figure of docs/leaderboard.md.

    python benchmarks/leaderboard.py --work FOLDER     # 2 hours on two busy cores

For each recipe and seed `lightleak lab bench` builds a target and audits it by every signal that
takes no forwards of its own. Some targets of `captions-lora` are audited again with references,
trained as the target was; for other recipes and more of them see `signature.py`. The same command
goes on where it stopped. Writes benchmarks/results/leaderboard.json, docs/images/leaderboard.png,
and the table between the marks in docs/leaderboard.md.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from pages import put, table
from signature import interval, told

from lightleak import lab
from lightleak.lab.bench import RECIPES, BenchRow
from lightleak.runs import write_json

MEMBERS, NONMEMBERS, REFERENCES, REFERENCED = 200, 400, 4, "captions-lora"
MEASURES = ("auc", "tpr_at_1_percent", "tpr_at_5_percent")
# What costs one forward pass a record, by which all else is divided.
FORWARD = ("loss", "cosine")
HERE = Path(__file__).parent
RESULTS = HERE / "results" / "leaderboard.json"
DOCS = HERE.parent / "docs"
PAGE, FIGURE = DOCS / "leaderboard.md", DOCS / "images" / "leaderboard.png"
HEAD = ("signal", "targets", "AUC", "TPR at 1 % FPR", "at 5 % FPR", "suspects needed", "forwards")

Board = dict[str, dict[str, Any]]


def measured(work: Path, seeds: int, with_references: int, workers: int) -> list[BenchRow]:
    """All rows: every seed without references, and the first of one recipe with them, too."""
    parts = [(recipe, seeds, 0) for recipe in RECIPES]
    parts.insert(RECIPES.index(REFERENCED), (REFERENCED, with_references, REFERENCES))
    found: dict[BenchRow, None] = {}  # Those of the first seeds come twice.
    for recipe, count, references in parts:
        rows = lab.bench(
            work / recipe,
            recipes=[recipe],
            seeds=range(count),
            members=MEMBERS,
            nonmembers=NONMEMBERS,
            references=references,
            workers=workers,
        )
        found |= dict.fromkeys(rows)
    return list(found)


def board(rows: Iterable[BenchRow]) -> Board:
    """One recipe's signals by their names, the best TPR first."""
    by_signal = defaultdict(list)
    for row in rows:
        of = f", {row.references} references" if row.references else ""
        by_signal[row.signal + of].append(row)
    forward = {row.seed: row for name in FORWARD for row in by_signal.get(name, ())}
    found = {}
    for name, own in by_signal.items():
        told = [asdict(row) for row in own]
        costs = [
            row.seconds_per_record / base
            for row in own
            if row.seconds_per_record and (base := forward[row.seed].seconds_per_record)
        ]
        sizes = [row.set_size or math.inf for row in own]
        found[name] = {
            measure: interval(known, measure)
            for measure in MEASURES
            if len(known := [row for row in told if row[measure] is not None]) == len(told)
        } | {
            "by seed": {row.seed: row.tpr_at_1_percent for row in own},
            "set size": statistics.median(sizes) if math.isfinite(max(sizes)) else None,
            "forwards": statistics.median(costs) if costs else None,
        }
    return dict(sorted(found.items(), key=_rank))


def _rank(item: tuple[str, Mapping[str, Any]]) -> tuple[float, ...]:
    own = item[1]
    return tuple(-own[each]["mean"] if each in own else 1.0 for each in reversed(MEASURES[:2]))


def tables(boards: Mapping[str, Board]) -> list[str]:
    """In Markdown, one a recipe."""
    lines = []
    for recipe, own in boards.items():
        rows = []
        for name, each in own.items():
            cells = [name, str(len(each["by seed"]))]
            cells += [told(each.get(measure), 3) for measure in MEASURES]
            size, forwards = each["set size"], each["forwards"]
            cells += ["–" if size is None else f"{size:,.0f}"]
            rows.append([*cells, "–" if forwards is None else f"{forwards:.1f}"])
        lines += [f"### {recipe}", "", *table(HEAD, rows), ""]
    return lines


def draw(boards: Mapping[str, Board]) -> None:
    """A panel a recipe: TPR at 1 % FPR, a dot a seed and a bar their mean."""
    heights = [len(own) for own in boards.values()]
    columns = 2
    lines = -(-len(boards) // columns)
    tallest = [max(heights[i * columns : (i + 1) * columns]) for i in range(lines)]
    sheet = Figure(figsize=(10.5, 0.8 * lines + 0.24 * sum(tallest)), layout="constrained")
    panels = sheet.subplots(lines, columns, squeeze=False, height_ratios=tallest, sharex=True)
    for axes, (recipe, own) in zip(panels.flat, boards.items(), strict=False):
        for y, (name, each) in enumerate(reversed(own.items())):
            values = [value for value in each["by seed"].values() if value is not None]
            colour = "#0b5c94" if name.startswith("signature") else "#c9ccd1"
            axes.barh(y, np.mean(values) if values else 0, color=colour, height=0.7)
            axes.plot(values, [y] * len(values), "o", color="#222222", ms=3, alpha=0.7)
        axes.axvline(0.01, color="#b45309", lw=1, ls=(0, (4, 3)))
        axes.set_yticks(range(len(own)), list(reversed(own)), fontsize=8.5)
        axes.set_title(recipe, fontsize=10, weight="bold", loc="left")
        axes.margins(y=0.01)
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
    sheet.supxlabel("TPR at 1 % FPR (dots: targets; dashed: a coin toss)", fontsize=10)
    FIGURE.parent.mkdir(exist_ok=True)
    sheet.savefig(FIGURE, dpi=110, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write results, table and figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="targets and runs stay there")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--with-references", type=int, default=3, help="seeds that have them")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = measured(given.work, given.seeds, given.with_references, given.workers)
    boards = {recipe: board(r for r in rows if r.recipe == recipe) for recipe in RECIPES}
    write_json(
        RESULTS,
        {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, "
            f"Python {platform.python_version()}, one thread a process",
            "records": {"members": MEMBERS, "nonmembers": NONMEMBERS},
            "boards": boards,
            "rows": [asdict(row) for row in rows],
        },
    )
    draw(boards)
    put(PAGE, "benchmarks/leaderboard.py", tables(boards))


if __name__ == "__main__":
    main()
