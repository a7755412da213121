"""Underestimation: the share of the suspects that each signal says was used, against the truth.

    python benchmarks/prevalence.py            # about 25 minutes on one core

For each seed the recipe `captions-tiny` trains a target on 1,100 records drawn at random from
2,200. One audit scores all of them, 200 of either kind calibrating as in `--protocol split`. Then
400 suspects, of whom 0 to 100 % were really used, and 400 controls are drawn again and again from
the others, and judged from the stored scores by the functions that an audit calls: the share
beside 200 known members, and the lower bound that a data owner without any would get. Signals
that are fitted have no known members left, so for them there is only the bound. Beside them what
is commonly counted: the suspects above a threshold that 5 % of the controls exceed.

Three such audits are run in full, too, and compared on one page.

Writes benchmarks/results/prevalence.json and docs/images/prevalence.png.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure

from lightleak import lab, signals
from lightleak import statistics as st
from lightleak.audits.membership import audit
from lightleak.report.comparison import compare
from lightleak.runs import Run, write_json

RECORDS, KNOWN, SUSPECTS, CONTROLS = 1100, 200, 400, 400
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Audits in full: what each is called, the share that was used, and whether members are known.
IN_FULL = (
    ("a quarter used", 0.25, True),
    ("half used", 0.5, True),
    ("half (none known)", 0.5, False),
)
RESULTS = Path(__file__).parent / "results" / "prevalence.json"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "prevalence.png"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """One signal's scores at one target: of records it was trained on, and of others."""

    used: Floats
    unused: Floats


@dataclass(frozen=True)
class Target:
    """A lab target and its records as lines, in the random order that the recipe gave them."""

    made: lab.LabTarget
    used: list[str]
    unused: list[str]

    @staticmethod
    def build(work: Path, seed: int) -> Target:
        """Train it, or take up the one that is there."""
        made = lab.build(
            "captions-tiny", work / f"lab-{seed}", seed=seed, members=RECORDS, nonmembers=RECORDS
        )
        used, unused = (
            file.read_text(encoding="utf-8").splitlines(keepends=True)
            for file in (made.members, made.nonmembers)
        )
        return Target(made, used, unused)

    def audit(
        self, run: Path, suspect: Sequence[str], control: Sequence[str], *, known: bool
    ) -> Path:
        """Audit it in full, with the first records of either kind to calibrate if `known`."""
        sides = {"suspect": suspect, "control": control}
        if known:
            sides["calibration_members"] = self.used[:KNOWN]
            sides["calibration_nonmembers"] = self.unused[:KNOWN]
        files = {}
        for side, lines in sides.items():
            # Images are named relative to the file, so the file lies beside them.
            files[side] = self.made.truth.with_name(f"{run.name}-{side}.jsonl")
            files[side].write_text("".join(lines), encoding="utf-8")
        protocol = "split" if known else "crossfit"
        audit(target=self.made.target, out=run, protocol=protocol, design="held-out", **files)
        return run

    def measure(self, run: Path) -> dict[str, Scores]:
        """All records by every signal; those that are fitted give none to what calibrates them."""
        self.audit(run, self.used[KNOWN:], self.unused[KNOWN:], known=True)
        sides: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        for row in pq.read_table(Run(run).scores_file).to_pylist():
            if row["score"] is not None:
                sides[row["signal"]][row["set"] in ("control", "nonmember")].append(row["score"])
        return {name: Scores(*map(np.array, both)) for name, both in sides.items()}


def draw(scores: Scores, share: float, known: bool, rng: np.random.Generator) -> dict[str, Any]:
    """What an audit would say of suspects of whom a share was used."""
    used, unused = rng.permutation(scores.used), rng.permutation(scores.unused)
    k = round(share * SUSPECTS)
    suspect = np.concatenate([used[:k], unused[k:SUSPECTS]])
    control = unused[SUSPECTS : SUSPECTS + CONTROLS]
    row: dict[str, Any] = {
        "share": share,
        "bound": st.prevalence_lower_bound(suspect, control),
        "counted": float(np.mean(suspect > np.quantile(control, 0.95))),
    }
    if known:
        members = used[SUSPECTS : SUSPECTS + KNOWN]
        row["estimate"], row["low"], row["high"] = astuple(st.prevalence(suspect, members, control))
    return row


def summary(rows: Sequence[dict[str, Any]], share: float) -> dict[str, Any]:
    """Of all draws with one true share."""
    here = [row for row in rows if row["share"] == share]
    bounds = np.array([row["bound"] for row in here])
    found = {
        "lower bound: mean": float(bounds.mean()),
        "lower bound: holds": float((bounds <= share).mean()),
        "counted at an FPR of 5 %: mean": float(np.mean([row["counted"] for row in here])),
    }
    if "estimate" in here[0]:
        estimate, low, high = (
            np.array([row[key] for row in here]) for key in ("estimate", "low", "high")
        )
        found |= {
            "estimate: mean": float(estimate.mean()),
            "estimate: bias": float(estimate.mean() - share),
            "estimate: standard deviation": float(estimate.std(ddof=1)),
            "interval: covers": float(((low <= share) & (share <= high)).mean()),
            "interval: mean ends": [float(low.mean()), float(high.mean())],
            "interval: all of 0 to 1": float(((low == 0) & (high == 1)).mean()),
        }
    return found


def in_full(target: Target, work: Path) -> list[dict[str, Any]]:
    """Audits as anyone would run them, compared on one page."""
    runs = []
    for i, (_, share, known) in enumerate(IN_FULL):
        k = round(share * SUSPECTS)
        used, unused = target.used[KNOWN:], target.unused[KNOWN:]
        suspect, control = used[:k] + unused[k:SUSPECTS], unused[SUSPECTS : SUSPECTS + CONTROLS]
        runs.append(target.audit(work / f"full-{i}", suspect, control, known=known))
    labels = [name for name, _, _ in IN_FULL]
    table = work / "compare.parquet"
    compare(runs, work / "compare.html", labels=labels, parquet=table)
    true = {name: share for name, share, _ in IN_FULL}
    return [{"true share": true[row["run"]], **row} for row in pq.read_table(table).to_pylist()]


def picture(results: Mapping[str, Any]) -> None:
    """One panel a signal: estimated against true share, and the bound."""
    found = results["signals"]
    columns = 3
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(9.5, 0.6 + 2.9 * lines), layout="constrained")
    panels = iter(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for (name, each), axes in zip(found.items(), panels, strict=False):
        rows = [each["shares"][str(share)] for share in SHARES]
        axes.plot([0, 1], [0, 1], color="#9ca3af", lw=1, ls=(0, (4, 3)))
        title = f"AUC {np.mean(each['AUC']):.2f}"
        if "estimate: mean" in rows[0]:
            mean = [row["estimate: mean"] for row in rows]
            low, high = np.array([row["interval: mean ends"] for row in rows]).T
            axes.fill_between(SHARES, low, high, color="#0b5c94", alpha=0.14, lw=0)
            axes.plot(SHARES, mean, "D-", color="#0b5c94", ms=4.5, lw=1.4, label="estimate")
            title += f", covers {np.mean([row['interval: covers'] for row in rows]):.0%}"
        bound = [row["lower bound: mean"] for row in rows]
        axes.plot(SHARES, bound, "^-", color="#b45309", ms=5, lw=1, label="lower bound")
        counted = [row["counted at an FPR of 5 %: mean"] for row in rows]
        axes.plot(SHARES, counted, "o:", color="#4a5361", ms=4, lw=1, label="counted at 5 % FPR")
        axes.set_title(name, fontsize=10, weight="bold", loc="left")
        axes.set_title(title, fontsize=9, loc="right")
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=SHARES, yticks=SHARES)
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels:
        axes.set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8.5, loc="upper left")
    figure.supxlabel("suspects that were used", fontsize=10)
    figure.supylabel("share that the audit states", fontsize=10)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110, metadata={"Software": None})


def main() -> None:
    """Measure each target once, judge it again and again, and write results and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=200, help="for each seed and share")
    parser.add_argument("--work", type=Path, default=Path("prevalence-benchmark"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(exist_ok=True)
    areas, rows = defaultdict(list), defaultdict(list)
    for seed in range(given.seeds):
        target = Target.build(given.work, seed)
        for name, scores in target.measure(given.work / f"run-{seed}").items():
            areas[name].append(st.auc(scores.used, scores.unused))
            rng = np.random.default_rng(seed)
            rows[name] += [
                draw(scores, share, not signals.get(name).fitted, rng)
                for share in SHARES
                for _ in range(given.draws)
            ]
    results = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, one thread",
        "records": {"known": KNOWN, "suspects": SUSPECTS, "controls": CONTROLS},
        "seeds": given.seeds,
        "draws for each seed and share": given.draws,
        "signals": {
            name: {
                "AUC": areas[name],
                "shares": {str(share): summary(rows[name], share) for share in SHARES},
            }
            for name in sorted(rows, key=lambda name: -float(np.mean(areas[name])))
        },
        "audits in full": in_full(Target.build(given.work, 0), given.work),
    }
    write_json(RESULTS, results)
    picture(results)


if __name__ == "__main__":
    main()
