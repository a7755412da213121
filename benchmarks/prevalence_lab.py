"""Shares as whole audits state them, against the truth, from the lab's own `prevalence`.

    python benchmarks/prevalence_lab.py            # 44 minutes on two busy cores

For each seed the recipe `captions-tiny` trains a target on 300 records: half of the suspects that
it writes, and as many known members. Suspects are drawn from them by the truth, 0 to 100 % really
used, and audited with 100 known members and non-members to calibrate (`--protocol split`). Every
number is what the verdict says: an estimate with its interval, or, for signals that are fitted,
the lower bound. Audits of one target share its records, so that there are as many independent
draws as seeds: `prevalence.py` judges many more, from stored scores.

Writes benchmarks/results/prevalence_lab.json and docs/images/prevalence-lab.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from lightleak import lab
from lightleak.audits.membership import audit
from lightleak.runs import write_json

RECORDS, SUSPECTS, CONTROLS, CALIBRATION = 300, 150, 250, 100
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
RESULTS = Path(__file__).parent / "results" / "prevalence_lab.json"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "prevalence-lab.png"

Row = dict[str, Any]


def audits(work: Path, seed: int) -> list[Row]:
    """A row a share and signal, at one target."""
    made = lab.build(
        "captions-tiny",
        work / f"lab-{seed}",
        seed=seed,
        members=RECORDS,
        nonmembers=CONTROLS + CALIBRATION,
        prevalence=0.5,
    )
    assert made.known is not None
    suspects, known, others = (
        file.read_text(encoding="utf-8").splitlines(keepends=True)
        for file in (made.members, made.known, made.nonmembers)
    )
    truth = json.loads(made.truth.read_text(encoding="utf-8"))["member"]
    used, unused = (
        [line for line in suspects if truth[json.loads(line)["id"]] is side]
        for side in (True, False)
    )
    rows = []
    for share in SHARES:
        k = round(share * SUSPECTS)
        sides = {
            "suspect": used[:k] + unused[: SUSPECTS - k],
            "control": others[:CONTROLS],
            "calibration_members": known[:CALIBRATION],
            "calibration_nonmembers": others[CONTROLS:],
        }
        files = {side: made.truth.with_name(f"{side}-{share}.jsonl") for side in sides}
        for side, lines in sides.items():
            files[side].write_text("".join(lines), encoding="utf-8")
        verdict = audit(
            target=made.target,
            out=work / f"run-{seed}-{share}",
            protocol="split",
            design="randomised",
            negative_controls=False,
            **files,
        )
        for name, found in verdict.signals.items():
            if found.prevalence is not None:
                each = found.prevalence
                stated = {"estimate": each.estimate, "low": each.ci95[0], "high": each.ci95[1]}
                rows.append({"seed": seed, "share": share, "signal": name, **stated})
    return rows


def summary(rows: Sequence[Row]) -> Row:
    """Of one signal at one share, over the seeds."""
    lows, highs = (np.array([row[key] for row in rows]) for key in ("low", "high"))
    share = rows[0]["share"]
    found: Row = {
        "low: mean": float(lows.mean()),
        "interval or bound holds": float(((lows <= share) & (share <= highs)).mean()),
    }
    if rows[0]["estimate"] is not None:
        estimates = [row["estimate"] for row in rows]
        found["high: mean"] = float(highs.mean())
        found["estimates"] = estimates
        found["bias"] = float(np.mean(estimates) - share)
    return found


def picture(found: Mapping[str, Mapping[str, Row]]) -> None:
    """A panel a signal: stated against true share."""
    columns = 4
    lines = -(-len(found) // columns)
    sheet = Figure(figsize=(10.5, 0.6 + 2.6 * lines), layout="constrained")
    panels = list(sheet.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, (name, each) in zip(panels, found.items(), strict=False):
        axes.plot([0, 1], [0, 1], color="#9ca3af", lw=1, ls=(0, (4, 3)))
        shares = [float(share) for share in each]
        low = [row["low: mean"] for row in each.values()]
        if all("estimates" in row for row in each.values()):
            high = [row["high: mean"] for row in each.values()]
            axes.fill_between(shares, low, high, color="#0b5c94", alpha=0.14, lw=0)
            for share, row in zip(shares, each.values(), strict=True):
                axes.plot(
                    [share] * len(row["estimates"]), row["estimates"], "o", color="#0b5c94", ms=4
                )
            means = [np.mean(row["estimates"]) for row in each.values()]
            axes.plot(shares, means, color="#0b5c94", lw=1.4, label="estimate")
        else:
            axes.plot(shares, low, "^-", color="#b45309", ms=5, lw=1, label="lower bound")
        axes.set_title(name, fontsize=10, weight="bold", loc="left")
        axes.legend(frameon=False, fontsize=8.5, loc="upper left")
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    sheet.supxlabel("suspects that were used", fontsize=10)
    sheet.supylabel("share that the audit states", fontsize=10)
    FIGURE.parent.mkdir(exist_ok=True)
    sheet.savefig(FIGURE, dpi=110, metadata={"Software": None})


def main() -> None:
    """Run the audits, write what they said, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="keep targets and runs, and go on in it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        work = given.work or Path(name)
        work.mkdir(exist_ok=True)
        rows = [row for seed in range(given.seeds) for row in audits(work, seed)]
    grouped: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        grouped[row["signal"]][str(row["share"])].append(row)
    found = {
        name: {share: summary(each) for share, each in shares.items()}
        for name, shares in sorted(grouped.items())
    }
    picture(found)
    write_json(
        RESULTS,
        {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, "
            f"Python {platform.python_version()}, one thread",
            "seeds": given.seeds,
            "records": {"suspects": SUSPECTS, "controls": CONTROLS, "calibration": CALIBRATION},
            "signals": found,
        },
    )


if __name__ == "__main__":
    main()
