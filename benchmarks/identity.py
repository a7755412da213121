"""Identity inference where the truth is known: the published attack and ours, person by person.

    python benchmarks/identity.py            # about 20 minutes on two cores

For each seed the recipe `faces` draws 20 members and 20 non-members among 40 people, names all of
them by lot and trains a dual encoder on the members' photos: 1, 2, 5, 10, 25, 50 or 75 pairs each.
Everyone is then asked about, with all ten photos and with the five that no training pair shows.
The statistic was chosen on seeds 100 to 105; these are seeds 0 to 9.

Writes benchmarks/results/identity.json and docs/images/identity-benchmark.png.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from scipy import stats

from lightleak.runs import Run, write_json
from lightleak.statistics import benjamini_hochberg, clopper_pearson

COPIES = (1, 2, 5, 10, 25, 50, 75)
RESULTS = Path(__file__).parent / "results" / "identity.json"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "identity-benchmark.png"


def one_seed(seed: int) -> list[dict[str, Any]]:
    """Build, ask about everyone, and return one row a person, photo set and seed."""
    import torch

    from lightleak import identify, lab

    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        made = lab.build("faces", work / "lab", seed=seed, copies=COPIES)
        truth = json.loads(made.truth.read_text(encoding="utf-8"))["people"]
        everyone = work / "lab" / "people"
        for photos in ("all", "unseen"):
            asked = everyone if photos == "all" else _unseen(everyone, work / "unseen", truth, seed)
            run = work / f"run-{photos}"
            identify(target=made.target, people=asked, out=run, seed=seed, design="randomised")
            rows += [
                {**row, "seed": seed, "photos": photos, **truth[row["person"]], **_modes(run, row)}
                for row in pq.read_table(Run(run).people_file).to_pylist()
            ]
            rows[-1]["curve"] = _curve(run, truth) if photos == "all" else None
    print("seed", seed, flush=True)
    return rows


def _unseen(everyone: Path, folder: Path, truth: dict[str, Any], seed: int) -> Path:
    """The same people with five photos each: of members those never trained on."""
    shutil.copytree(everyone, folder)
    rng = np.random.default_rng(seed)
    for person, about in sorted(truth.items()):
        names = sorted(path.name for path in (folder / person).iterdir())
        seen = about["seen"] or rng.permutation(names)[: len(names) // 2].tolist()
        seen += [name for name in names if name not in seen][: len(names) // 2 - len(seen)]
        for name in seen:
            (folder / person / name).unlink()
    return folder


def _modes(run: Path, row: dict[str, Any]) -> dict[str, float]:
    """How many wrong names the published attack would have confirmed for a person."""
    table = pq.read_table(Run(run).predictions_file).to_pylist()
    votes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for each in table:
        if each["person"] == row["person"]:
            votes[each["template"]][each["predicted"]] += 1
    confirmed = set()
    for counts in votes.values():
        most = max(counts.values())
        best = [name for name, count in counts.items() if count == most]
        confirmed |= set(best) if len(best) == 1 else set()
    return {"wrong_names_confirmed": len(confirmed - {row["name"]})}


def _curve(run: Path, truth: dict[str, Any]) -> list[dict[str, Any]]:
    """The sub-sampling curve, people in and people out apart: judged anew with known sets."""
    from lightleak.audits.judge_identity import judge_identity

    evidence = Run(run).evidence
    people = pq.read_table(evidence / "people.parquet").to_pydict()
    people["set"] = [
        "known" if truth[key.partition("/")[2]]["member"] else "control" for key in people["person"]
    ]
    people["set"][0] = "suspect"  # An audit needs one.
    pq.write_table(pa.table(people), evidence / "people.parquet")
    judge_identity(Run(run))
    return pq.read_table(Run(run).curve_file).to_pylist()


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """A share of people with its exact interval."""
    found = clopper_pearson(int(np.sum(hits)), len(hits))
    return {
        "count": int(np.sum(hits)),
        "of": len(hits),
        "rate": found.value,
        "ci95": [found.low, found.high],
    }


def _both(row: dict[str, Any]) -> bool:
    """Found by the larger of both p-values, were nobody else asked about."""
    return max(row["p_value"], row["face_p_value"]) <= 0.05


def summary(rows: Sequence[dict[str, Any]], names: int) -> dict[str, Any]:
    """Rates of both attacks over all seeds for one kind of photos."""
    members = [row for row in rows if row["member"]]
    others = [row for row in rows if not row["member"]]
    # How often the published rule confirms a name that means nothing, counted over all names.
    published_fpr = float(np.mean([row["wrong_names_confirmed"] for row in others])) / names
    p_out = np.array([row["p_value"] for row in others])
    discoveries, false = [], []
    for seed in sorted({row["seed"] for row in rows}):
        here = [row for row in rows if row["seed"] == seed]
        found = benjamini_hochberg([row["p_value"] for row in here]).rejected
        wrong = sum(bool(hit) and not row["member"] for hit, row in zip(found, here, strict=True))
        discoveries += [bool(hit) for hit, row in zip(found, here, strict=True) if row["member"]]
        false.append(wrong / max(1, int(found.sum())))
    wrong_people = [row["q_value"] <= 0.05 for row in others]
    return {
        "published: TPR": share([row["member_published"] for row in members]),
        "published: FPR": share([row["member_published"] for row in others]),
        "published: FPR over all wrong names": published_fpr,
        "published, majority rule: TPR": share([row["member_majority"] for row in members]),
        "published, majority rule: FPR": share([row["member_majority"] for row in others]),
        "ours: TPR at the published FPR": share(
            [row["p_value"] <= published_fpr for row in members]
        ),
        "ours: TPR after correction (q <= .05)": share(discoveries),
        "ours: FPR after correction": share(wrong_people),
        "ours: mean false discovery proportion": float(np.mean(false)),
        "ours: FPR at p <= .05": share(p_out <= 0.05),
        "ours: people out, Kolmogorov-Smirnov p": float(stats.kstest(p_out, "uniform").pvalue),
        "name and face, one person asked about: TPR": share([_both(row) for row in members]),
        "name and face, one person asked about: FPR": share([_both(row) for row in others]),
        "photos under somebody else's name, p <= .05": share(
            [row["shuffled_p_value"] <= 0.05 for row in rows]
        ),
        "by copies": {
            str(copies): {
                "published": share(
                    [row["member_published"] for row in members if row["copies"] == copies]
                ),
                "ours": share(
                    [row["q_value"] <= 0.05 for row in members if row["copies"] == copies]
                ),
                "name and face": share([_both(row) for row in members if row["copies"] == copies]),
            }
            for copies in COPIES
        },
    }


def curve(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Rates against the number of photos, mean and deviation over seeds."""
    names = {"published": "published", "p_value": "ours"}
    sides = {"known": "TPR", "control": "FPR"}
    grouped: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["rule"] in names and row["set"] in sides:
            grouped[f"{names[row['rule']]}, {sides[row['set']]}"][row["n_photos"]].append(
                row["rate"]
            )
    return {
        key: {
            "photos": sorted(by_size),
            "mean": [float(np.mean(by_size[size])) for size in sorted(by_size)],
            "sd": [float(np.std(by_size[size], ddof=1)) for size in sorted(by_size)],
        }
        for key, by_size in sorted(grouped.items())
    }


def draw(results: dict[str, Any]) -> None:
    """Copies per person, number of photos, and p-values of people out."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colours = {"published": "#b45309", "ours": "#0b5c94", "name and face": "#166534"}
    for rule, colour in colours.items():
        found = [results["all"]["by copies"][str(copies)][rule] for copies in COPIES]
        rates = np.array([each["rate"] for each in found])
        bounds = np.abs(np.array([each["ci95"] for each in found]).T - rates)
        left.errorbar(COPIES, rates, bounds, color=colour, marker="o", ms=4, capsize=2, label=rule)
    left.set(xscale="log", xticks=COPIES, xticklabels=COPIES, ylim=(0, 1.02))
    left.set(xlabel="training pairs of a person", ylabel="people in the data that are found")
    left.legend(frameon=False, loc="lower right")
    for label, found in results["curve"].items():
        colour = colours[label.partition(",")[0]]
        mean, sd = np.array(found["mean"]), np.array(found["sd"])
        line = "-" if label.endswith("TPR") else ":"
        middle.plot(found["photos"], mean, line, color=colour, marker="o", ms=3, label=label)
        middle.fill_between(found["photos"], mean - sd, mean + sd, color=colour, alpha=0.12, lw=0)
    middle.set(ylim=(0, 1.02), xlabel="photos of each person", ylabel="share found (p ≤ .05)")
    middle.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.3))
    p_out = np.sort(results["p-values of people out"])
    right.plot([0, 1], [0, 1], color="#9ca3af", lw=1)
    right.step(p_out, np.arange(1, len(p_out) + 1) / len(p_out), color=colours["ours"])
    right.set(xlim=(0, 1), ylim=(0, 1), xlabel="p-value", ylabel="people out, cumulated")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110, metadata={"Software": None})


def main() -> None:
    """Run all seeds in two processes and write results and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        rows = [row for found in pool.imap(one_seed, range(given.seeds)) for row in found]
    curves = [each for row in rows for each in row.pop("curve", None) or []]
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {platform.system()}, one thread a process",
        "seeds": list(range(given.seeds)),
        "people": "20 in and 20 out a seed, names and membership by lot",
        "copies": list(COPIES),
    }
    for photos in ("all", "unseen"):
        results[photos] = summary([row for row in rows if row["photos"] == photos], names=1000)
    results["p-values of people out"] = [
        row["p_value"] for row in rows if row["photos"] == "all" and not row["member"]
    ]
    results["curve"] = curve(curves)
    write_json(RESULTS, results)
    draw(results)
    print(json.dumps({key: results[key] for key in ("all", "unseen")}, indent=1))


if __name__ == "__main__":
    main()
