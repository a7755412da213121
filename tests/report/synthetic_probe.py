"""Run folders of probes without a model: what a judge would have written, made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from lightleak.runs import Run, write_json, write_table
from lightleak.validity import ProbingCutoffs, ProbingVerdict
from lightleak.validity.probing import (
    ConditionFinding,
    LayerFinding,
    LegibilityFinding,
    OutputFinding,
    ProbingCoverage,
    TrendFinding,
    TurnFinding,
    UtilityFinding,
    decide_probing,
)

QUESTIONS = ("username", "user_id", "gender", "age", "capture_time", "capture_location")
SEEDS = (0, 1, 2)
SIZES = (1, 2, 4, 8, 16)
# How far each content turns the gradient of one image.
TURNS = {"watermark": 0.5, "image": 0.35, "text": 0.6, "other batch": 0.9, "original": 0.0}


@dataclass(frozen=True)
class Condition:
    """A model that was probed, and how much more than chance it shows at its best layer."""

    name: str
    kind: str
    rate: float | None
    gain: float
    p_value: float
    holm: float | None = None


def experiment(gain: float, p_value: float, *, control_p: float = 0.4) -> list[Condition]:
    """A whole experiment, with the gain of the highest rate."""
    return [
        Condition("rate 0", "control", 0.0, 0.01, control_p),
        Condition("rate 0.5", "tuned", 0.5, gain / 2, 3 * p_value, 3 * p_value),
        Condition("rate 1", "tuned", 1.0, gain, p_value, 2 * p_value),
        Condition("planted", "planted", 1.0, 0.4, 0.001),
        Condition("random weights", "control", None, 0.0, 0.55),
        Condition("pixels", "control", None, 0.01, 0.31),
    ]


EXPOSED = experiment(0.3, 0.002)
NOTHING = experiment(0.02, 0.28)
FIRED = experiment(0.3, 0.002, control_p=0.003)
TARGET = [Condition("target", "tuned", None, 0.25, 0.004), EXPOSED[-1]]


def write_probe_run(
    folder: Path,
    conditions: Sequence[Condition],
    *,
    blocks: int = 4,
    detectable: float = 0.13,
    design: str = "randomised",
    extras: bool = True,
    failures: Sequence[Mapping[str, str]] = (),
    example: bool = False,
    target: str = "models/vlm",
) -> Run:
    """A judged run.

    Args:
        conditions: what was probed.
        blocks: of the language model; the vision tower has half of them.
        detectable: the gain that would have been found.
        extras: whether the files that a run need not have are there.
        example: whether an image is kept to be shown.
    """
    rng = np.random.default_rng(0)
    run = Run.create(folder)
    probes = [
        row
        for each in conditions
        for cell in _cells(each, blocks)
        for row in _probes(each, *cell, blocks, rng)
    ]
    write_table(run.probes_file, pa.Table.from_pylist(probes))
    tuned = ["base", *(each.name for each in conditions if each.kind == "tuned")]
    answers = [
        _answer(name, pool, field)
        for name in tuned
        for pool in ("seen", "unseen")
        for field in ("all", *QUESTIONS)
    ]
    write_table(run.output_view_file, pa.Table.from_pylist(answers))
    utility = [_task(name) for name in tuned]
    dynamics = [
        _turn(comparison, layer, size)
        for comparison in TURNS
        for layer in ("all", "vision.0", "projector", "language.0", "language.1")
        for size in SIZES
    ]
    if extras:
        write_table(run.utility_file, pa.Table.from_pylist(utility))
        write_table(run.dynamics_file, pa.Table.from_pylist(dynamics))
        states = _projected([each.name for each in conditions if each.kind != "control"], rng)
        write_table(run.projections_file, pa.Table.from_pylist(states))
    if example:
        file = run.watermarked / "seed-0" / "probing" / "seen" / "img" / "p00-00.png"
        file.parent.mkdir(parents=True)
        Image.fromarray(np.full((224, 224, 3), 200, dtype=np.uint8)).save(file)
    columns = ("id", "stage", "error")
    failed = {name: pa.array([row[name] for row in failures], pa.string()) for name in columns}
    write_table(run.failures_file, pa.table(failed))
    verdict = _verdict(conditions, probes, design, detectable, len(failures))
    verdict = verdict.model_copy(
        update={
            "outputs": [_output(row) for row in answers if row["field"] == "all"],
            "utility": [_useful(row) for row in utility[1:]] if extras else [],
            "dynamics": [_turned(row) for row in dynamics if row["layer"] == "all"]
            if extras
            else [],
            "trends": [
                TrendFinding(comparison=name, slope=turn / 10, ci95=(turn / 11, turn / 9))
                for name, turn in TURNS.items()
                if extras and name != "original"
            ],
        }
    )
    write_json(run.verdict_file, verdict.model_dump(mode="json"))
    manifest = {
        "kind": "probing",
        "command": "lightleak probe",
        "settings": {"target": target, "batches": 100, "seed": 0},
        "target": {"name": target, "kind": "generative"},
        "hashes": {"weights": "706d9e1d" * 8},
        "started": "2030-01-02T03:04:05+00:00",
        "finished": "2030-01-02T03:14:05+00:00",
    }
    write_json(run.manifest_file, manifest)
    return run


def _cells(condition: Condition, blocks: int) -> list[tuple[str, int, str]]:
    """Its layers and questions; the last is where its trace is surest."""
    if condition.name == "pixels":
        return [("pixels", 0, "image")]
    return [
        *(("vision", layer, "image") for layer in range(blocks // 2)),
        ("projector", 0, "image"),
        *(("language", layer, field) for layer in range(blocks + 1) for field in QUESTIONS),
    ]


def _probes(
    condition: Condition, tower: str, layer: int, field: str, blocks: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """One layer and question: of all seeds together, then of each."""
    best = (tower, layer, field) == _cells(condition, blocks)[-1]
    depth = layer / blocks if tower == "language" else 0.2
    delta = condition.gain if best else (condition.gain - 0.02) * depth + rng.uniform(-0.03, 0.0)
    base = None if condition.rate is None else 0.5
    rows = []
    for seed in (None, *SEEDS):
        gain, wide = (delta, 0.06) if seed is None else (delta + 0.04 * (seed - 1), 0.11)
        right = 0.5 + gain
        rows.append(
            {
                "seed": seed,
                "condition": condition.name,
                "rate": condition.rate,
                "tower": tower,
                "layer": layer,
                "field": field,
                "accuracy": right,
                "low": right - wide,
                "high": min(1.0, right + wide),
                "base_accuracy": base,
                "delta": gain,
                "delta_low": gain - wide,
                "delta_high": gain + wide,
                "control_accuracy": 0.5,
                "selectivity": gain,
                "p_value": _p_value(condition, depth, best) if seed is None else None,
                "published_accuracy": 0.99 if tower != "vision" else None,
                "published_low": 0.97 if tower != "vision" else None,
                "published_high": 0.999 if tower != "vision" else None,
            }
        )
    return rows


def _p_value(condition: Condition, depth: float, best: bool) -> float:
    return (
        condition.p_value if best else min(1.0, condition.p_value * 10 ** (4 * (1 - depth)) + 0.001)
    )


def _answer(condition: str, pool: str, field: str) -> dict[str, Any]:
    found = {"seed": None, "condition": condition, "rate": None, "pool": pool, "field": field}
    for column, value in (("exact", 0.01), ("preference", 0.51)):
        found |= {column: value, f"{column}_low": value - 0.01, f"{column}_high": value + 0.01}
    return found


def _output(row: Mapping[str, Any]) -> OutputFinding:
    return OutputFinding(
        condition=row["condition"],
        pool=row["pool"],
        exact=row["exact"],
        exact_ci95=(row["exact_low"], row["exact_high"]),
        preference=row["preference"],
        preference_ci95=(row["preference_low"], row["preference_high"]),
    )


def _task(condition: str) -> dict[str, Any]:
    base = condition == "base"
    right = 0.42 if base else 0.81
    ends = ("difference", "difference_low", "difference_high")
    return {
        "seed": None,
        "condition": condition,
        "rate": None,
        "accuracy": right,
        "accuracy_low": right - 0.02,
        "accuracy_high": right + 0.02,
        **dict(zip(ends, (None, None, None) if base else (0.39, 0.36, 0.42), strict=True)),
    }


def _useful(row: Mapping[str, Any]) -> UtilityFinding:
    return UtilityFinding(
        condition=row["condition"],
        accuracy=row["accuracy"],
        ci95=(row["accuracy_low"], row["accuracy_high"]),
        difference=row["difference"],
        difference_ci95=(row["difference_low"], row["difference_high"]),
    )


def _turn(comparison: str, layer: str, size: int) -> dict[str, Any]:
    turned = TURNS[comparison] / size ** (0.3 if comparison == "other batch" else 0.8)
    turned *= 1.2 if layer.startswith("vision") else 1.0
    return {
        "seed": None,
        "batch_size": size,
        "comparison": comparison,
        "layer": layer,
        "cosine": 1 - turned,
        "low": 1 - 1.15 * turned,
        "high": 1 - 0.85 * turned,
    }


def _turned(row: Mapping[str, Any]) -> TurnFinding:
    return TurnFinding(
        batch_size=row["batch_size"],
        comparison=row["comparison"],
        cosine=row["cosine"],
        ci95=(row["low"], row["high"]),
    )


def _projected(conditions: Sequence[str], rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for condition in ("base", *conditions):
        for method in ("pca", "tsne"):
            for person in range(40):
                seen = person % 2 == 0
                centre = rng.normal(0, 2, 2)
                if condition != "base":
                    centre[0] += 2 if seen else -2
                for x, y in rng.normal(centre, 0.4, (10, 2)):
                    rows.append(
                        {
                            "condition": condition,
                            "tower": "language",
                            "layer": 4,
                            "field": "username",
                            "method": method,
                            "persona": f"invented person {person}",
                            "seen": seen,
                            "x": x,
                            "y": y,
                        }
                    )
    return rows


def _verdict(
    conditions: Sequence[Condition],
    probes: Sequence[Mapping[str, Any]],
    design: str,
    detectable: float,
    failed: int,
) -> ProbingVerdict:
    findings = [_finding(each, probes, detectable) for each in conditions]
    cutoffs = ProbingCutoffs()
    legible = LegibilityFinding(accuracy=0.62, ci95=(0.57, 0.67), chance=0.025, line_height=11.0)
    finding, tier, reasons = decide_probing(
        design=design, conditions=findings, legibility=legible, cutoffs=cutoffs
    )
    return ProbingVerdict(
        verdict=finding,
        tier=tier,
        reasons=reasons,
        conditions=findings,
        legibility=legible,
        outputs=[],
        utility=[],
        dynamics=[],
        trends=[],
        coverage=ProbingCoverage(personas=20, seeds=len(SEEDS), images=200, failed=failed),
        cutoffs=cutoffs,
    )


def _finding(
    condition: Condition, probes: Sequence[Mapping[str, Any]], detectable: float
) -> ConditionFinding:
    own = [row for row in probes if row["condition"] == condition.name and row["seed"] is None]
    best = own[-1]
    told = "can" if condition.p_value <= 0.05 else "cannot"
    sentence = f"In {condition.name}, seen {told} be told from unseen (p = {condition.p_value:g})."
    return ConditionFinding(
        name=condition.name,
        kind=condition.kind,
        rate=condition.rate,
        p_value=condition.p_value,
        p_value_holm=condition.holm,
        best=LayerFinding(
            **{name: best[name] for name in ("tower", "layer", "field", "accuracy")},
            ci95=(best["low"], best["high"]),
            base_accuracy=best["base_accuracy"],
            delta=best["delta"],
            delta_ci95=(best["delta_low"], best["delta_high"]),
            selectivity=best["selectivity"],
            p_value=best["p_value"],
        ),
        cells=len(own),
        detectable=detectable,
        sentence=sentence,
    )
