"""The probe on the lab's model: what it finds, what it finds wrongly, what it costs.

    python benchmarks/probing.py            # everything
    python benchmarks/probing.py --only null

experiment: `lightleak lab build vqa` and `lightleak probe` with probing.toml: three repeats of
rates 0, 50 and 100 %, planted trace, controls, gradients, answers, utility.
null: two models that saw no persona (the base, and the one fine-tuned at rate 0), asked about
pools drawn by lot from personas that nobody trained on; the max-T test may reject at its level.
stream: states of 10,000 images to disk, with the memory that it takes (Linux only).

Results go to benchmarks/results/probing.json, the figure to docs/images/probing-benchmark.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import torch
from scipy import stats

from lightleak import lab, targets
from lightleak import statistics as st
from lightleak.evidence.hidden import layers, read_hidden
from lightleak.lab import vqa
from lightleak.planting import QUESTIONS, Style, draw_personas, stamp
from lightleak.records import Record, load
from lightleak.runs import write_json

HERE = Path(__file__).parent
CONFIG = HERE / "probing.toml"
RESULTS = HERE / "results" / "probing.json"
FIGURE = HERE.parent / "docs" / "images" / "probing-benchmark.png"
REPEATS, PERSONAS, IMAGES, PAIRS = 200, 200, 8, 20
STREAMED, PART = 10_000, 512


def experiment(work: Path) -> dict[str, Any]:
    """Build the lab's model, probe it as a user does, and read the run."""
    made = lab.build("vqa", work / "lab")
    program = str(Path(sys.executable).with_name("lightleak"))
    command = [program, "probe", "--target", str(made.target), "--data", str(made.nonmembers)]
    started = time.monotonic()
    subprocess.run([*command, "--out", str(work / "run"), "--config", str(CONFIG)], check=True)
    verdict = json.loads((work / "run" / "verdict.json").read_text(encoding="utf-8"))
    probes = pq.read_table(work / "run" / "probes.parquet").to_pylist()
    return {
        "seconds": round(time.monotonic() - started),
        "config": CONFIG.read_text(encoding="utf-8").splitlines(),
        "verdict": verdict,
        "probes": [row for row in probes if row["seed"] is None],
        "dynamics": [
            row
            for row in pq.read_table(work / "run" / "dynamics.parquet").to_pylist()
            if row["seed"] is None
        ],
    }


def null(work: Path) -> dict[str, Any]:
    """Pools by lot among personas that no model saw: how often the test rejects."""
    style = Style(**_style())
    pictures = vqa.questions(PERSONAS * IMAGES // 8, seed=77)
    personas = draw_personas(PERSONAS, seed=2**21)
    folder = work / "null"
    folder.mkdir(exist_ok=True)
    records = []
    for i, persona in enumerate(personas):
        for j in range(IMAGES):
            picture = pictures[(i * IMAGES + j) % len(pictures)]
            file = folder / f"{i:04d}-{j}.png"
            stamp(picture.image(), persona, style, (0.5, 0.5)).image.save(file, compress_level=1)
            records.append(Record(f"{i:04d}-{j}", file, persona.username, QUESTIONS["username"]))
    states = {}
    for name, where in (
        ("base", work / "lab" / "target"),
        ("tuned", work / "run" / "evidence" / "models" / "seed-0" / "rate-0"),
    ):
        states[name] = read_hidden(targets.load(where, device="cpu"), records).states
    owner = np.repeat(np.arange(PERSONAS), IMAGES)
    p_values = []
    for repeat in range(REPEATS):
        rng = np.random.default_rng([repeat, 5])
        chosen = rng.permutation(PERSONAS)[: 2 * PAIRS]
        rows = np.concatenate([np.flatnonzero(owner == each) for each in chosen])
        codes = np.repeat(np.arange(2 * PAIRS), IMAGES)
        flips = st.draw_flips(PAIRS, 199, seed=repeat)
        probed = {
            name: [st.probe(each[rows], codes, flips, seed=repeat) for each in found.values()]
            for name, found in states.items()
        }
        p_values.append(st.probing_test([probed["tuned"]], [probed["base"]], seed=0).p_value)
    rejected = sum(p <= 0.05 for p in p_values)
    share = st.clopper_pearson(rejected, REPEATS)
    return {
        "repeats": REPEATS,
        "personas a pool": PAIRS,
        "cells": len(states["base"]),
        "rejected at 5 %": rejected,
        "share, 95 % interval": [share.value, share.low, share.high],
        "p uniform, Kolmogorov-Smirnov": float(stats.kstest(p_values, "uniform").pvalue),
        "p-values": p_values,
    }


def stream(work: Path) -> dict[str, Any]:
    """States of 10,000 images, part by part, with the memory held after each part."""
    target = targets.load(work / "lab" / "target", device="cpu")
    own = load(work / "lab" / "nonmembers.jsonl").records
    records = [replace(own[i % len(own)], id=f"r{i}") for i in range(STREAMED)]
    folder = work / "stream"
    folder.mkdir(exist_ok=True)
    peaks, started = [], time.monotonic()
    for start in range(0, STREAMED, PART):
        table = read_hidden(target, records[start : start + PART]).table()
        pq.write_table(table, folder / f"{start:06d}.parquet")
        del table
        peaks.append(_memory())
    return {
        "images": STREAMED,
        "layers": len(layers(target)),
        "seconds": round(time.monotonic() - started),
        "MiB in memory after each part of 512": peaks,
        "MiB on disk": round(sum(f.stat().st_size for f in folder.iterdir()) / 2**20),
    }


def _memory() -> int:
    """MiB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 2**20


def _style() -> dict[str, Any]:
    import tomllib

    given = tomllib.loads(CONFIG.read_text(encoding="utf-8"))
    return {key: given[key] for key in ("alpha", "plate", "position") if key in given}


def draw(results: dict[str, Any]) -> None:
    """The figure of the docs: layers, batches, null."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"rate 0": "#9ca3af", "rate 0.5": "#d97706", "rate 1": "#0b5c94"}
    colours |= {"planted": "#047857"}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    probes = results["experiment"]["probes"]
    places = list(dict.fromkeys((r["tower"], r["layer"]) for r in probes if r["tower"] != "pixels"))
    for name, colour in colours.items():
        rows = [
            [r for r in probes if r["condition"] == name and (r["tower"], r["layer"]) == place]
            for place in places
        ]
        mean, low, high = (
            100 * np.array([np.mean([r[key] for r in cell]) for cell in rows])
            for key in ("delta", "delta_low", "delta_high")
        )
        left.plot(range(len(places)), mean, color=colour, marker="o", ms=4, label=name)
        left.fill_between(range(len(places)), low, high, color=colour, alpha=0.12, lw=0)
    left.axhline(0, color="black", lw=0.7)
    left.set_xticks(range(len(places)), [f"{t[:4]} {i}" for t, i in places], rotation=45)
    left.set(ylabel="seen told from unseen:\npoints above the base", xlabel="layer")
    left.legend(frameon=False)
    rows = [r for r in results["experiment"]["dynamics"] if r["layer"] == "all"]
    for name, colour in (
        ("watermark", "#0b5c94"),
        ("image", "#d97706"),
        ("text", "#047857"),
        ("other batch", "#9ca3af"),
    ):
        own = sorted((r for r in rows if r["comparison"] == name), key=lambda r: r["batch_size"])
        sizes = [r["batch_size"] for r in own]
        turn = 1 - np.array([[r["cosine"], r["high"], r["low"]] for r in own]).T
        middle.plot(sizes, turn[0], color=colour, marker="o", ms=4, label=name)
        middle.fill_between(sizes, turn[1], turn[2], color=colour, alpha=0.15, lw=0)
    middle.set(
        xscale="log",
        xlabel="records in a batch",
        ylabel="1 − cosine with the original's gradient",
    )
    middle.set_xticks(sizes, sizes)
    middle.minorticks_off()
    middle.legend(frameon=False)
    p_values = np.sort(results["null"]["p-values"])
    right.plot([0, 1], [0, 1], color="#9ca3af", lw=1)
    right.step(p_values, np.arange(1, len(p_values) + 1) / len(p_values), color="#0b5c94")
    right.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="p-value where nothing was trained on",
        ylabel="repeats, cumulated",
    )
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110, metadata={"Software": None})


def main() -> None:
    """Run what is asked for, beside what was measured before."""
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "experiment": experiment,
        "null": null,
        "stream": stream,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[*parts, "figure"])
    parser.add_argument("--work", type=Path, default=Path("probing-benchmark"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(exist_ok=True)
    if given.only is None:
        shutil.rmtree(given.work)
        given.work.mkdir()
    results: dict[str, Any] = {}
    if given.only is not None and RESULTS.is_file():
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    results["machine"] = (
        f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores, one thread a process"
    )
    for name, part in parts.items():
        if given.only in (None, name):
            results[name] = part(given.work)
            write_json(RESULTS, results)
    draw(results)


if __name__ == "__main__":
    main()
