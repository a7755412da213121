"""Run folders without a model: simulated token statistics, judged by the real rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from lightleak.audits.judge import judge
from lightleak.evidence.table import schema
from lightleak.evidence.tokens import AnswerReader
from lightleak.runs import Run, write_json, write_table

TOKENS = 12
SIGNALS = ["loss", "mink", "zlib"]
BLIND = {"auc": 0.503, "auc_ci95": [0.461, 0.545]}


def write_run(
    folder: Path,
    *,
    effect: float,
    records: int,
    design: str = "held-out",
    blind: dict[str, Any] = BLIND,
    differences: Sequence[dict[str, Any]] = (),
    duplicates: Sequence[dict[str, str]] = (),
    texts: dict[str, str] | None = None,
    unusable: Sequence[tuple[str, str, str]] = (),
    empty: int = 0,
    images: Path | None = None,
    seed: int = 0,
) -> Run:
    """A judged run of so many suspects and controls.

    Args:
        effect: how far a suspect's mean log-likelihood lies above a control's, in standard
            deviations between records.
        texts: of chosen records, by "suspect/3"; all others have a plain one.
        unusable: (id, stage, error) of records that could not be used.
        empty: how many suspects have an answer without tokens.
        images: where to put a picture for every suspect.
    """
    rng = np.random.default_rng(seed)
    run = Run.create(folder)
    ids = [f"{side}/{i}" for side in ("suspect", "control") for i in range(records)]
    is_suspect = np.repeat([True, False], records)
    level = rng.normal(-3, 1, 2 * records) + effect * is_suspect
    logprob = level[:, None] + rng.normal(0, 1, (2 * records, TOKENS))
    lengths = np.where(np.arange(2 * records) < empty, 0, TOKENS)
    rows = {
        "id": ids,
        "n_tokens": lengths,
        "boundary_ambiguous": [False] * len(ids),
        "zlib_bytes": rng.integers(30, 60, len(ids)),
        "logprob": [list(row[:n]) for row, n in zip(logprob, lengths, strict=True)],
        "mean": [[-3.1] * n for n in lengths],
        "variance": [[1.5] * n for n in lengths],
        **{name: [[]] * len(ids) for name in ("matrix_norms", "slice_norms2", "slice_dots")},
        "in_reference": [[]] * len(ids),
    }
    write_table(
        run.evidence / "part-00000.parquet",
        pa.table(rows, schema=schema(AnswerReader().columns, double=True)),
    )
    paths = {}
    if images is not None:
        images.mkdir(exist_ok=True)
        for i in range(records):
            paths[f"suspect/{i}"] = str(images / f"{i}.png")
            colours = rng.integers(0, 255, (150, 200, 3), dtype=np.uint8)
            Image.fromarray(colours).save(paths[f"suspect/{i}"])
    about = {
        "id": ids,
        "set": [key.partition("/")[0] for key in ids],
        "fold": np.tile(np.arange(records) % 2, 2),
        "group": [str(i) for i in range(len(ids))],
        "prompt": ["Describe the image."] * len(ids),
        "text": [(texts or {}).get(key, f"a red kettle, number {key}") for key in ids],
        "image": pa.array([paths.get(key) for key in ids], pa.string()),
    }
    write_table(run.evidence / "records.parquet", pa.table(about))
    write_table(run.evidence / "bank.parquet", pa.table({"id": pa.array([], pa.string())}))
    failed = list(zip(*unusable, strict=True)) or [(), (), ()]
    columns = {
        name: pa.array(values, pa.string())
        for name, values in zip(("id", "stage", "error"), failed, strict=True)
    }
    write_table(run.evidence / "unusable.parquet", pa.table(columns))
    parts = {
        "text": blind,
        "image": BLIND,
        "joint": blind,
        "trees": BLIND,
        "stronger": blind,
        "p_value": 0.5,
        "differences": list(differences),
    }
    write_json(run.evidence / "blind.json", parts)
    features = list(rng.normal(size=(len(ids), 2)))
    write_table(run.evidence / "blind.parquet", pa.table({"id": ids, "features": features}))
    write_json(run.evidence / "duplicates.json", {"across": list(duplicates)})
    settings = {
        "target": "models/kettle-7b",
        "suspect": "suspects.jsonl",
        "control": "controls.jsonl",
        "signals": SIGNALS,
        "primary": "loss",
        "design": design,
        "seed": 0,
    }
    manifest = {
        "command": "lightleak audit",
        "settings": settings,
        "pre_registered_primary_signal": "loss",
        "target": {
            "name": "models/kettle-7b",
            "kind": "generative",
            "dtype": "torch.float32",
            "device": "cpu",
        },
        "hashes": {"weights": "706d9e1d" * 8, "suspect records": "9d436eec" * 8},
        "versions": {"lightleak": "0.1.0", "python": "3.11"},
        "host": {"system": "Linux"},
        "started": "2030-01-02T03:04:05+00:00",
        "finished": "2030-01-02T03:14:05+00:00",
    }
    write_json(run.manifest_file, manifest)
    judge(run)
    return run


def exposed(folder: Path, **changes: Any) -> Run:
    """Suspects that the model was trained on."""
    return write_run(folder, **{"effect": 0.9, "records": 300, **changes})


def no_evidence(folder: Path, **changes: Any) -> Run:
    """Suspects that it was not, and enough of them to have told."""
    return write_run(folder, **{"effect": 0.0, "records": 300, **changes})


def inconclusive(folder: Path, **changes: Any) -> Run:
    """Suspects and controls that differ by themselves."""
    return write_run(
        folder,
        **{
            "effect": 0.9,
            "records": 60,
            "design": "observational",
            "blind": {"auc": 0.952, "auc_ci95": [0.905, 0.977]},
            "differences": [
                {
                    "feature": "text length",
                    "sentence": "suspect texts are longer (median 41 against 18 characters)",
                    "auc": 0.94,
                    "p_value_adjusted": 1e-9,
                }
            ],
            "duplicates": [
                {"suspect": "suspect/1", "control": "control/7", "kind": "same image file"}
            ],
            **changes,
        },
    )
