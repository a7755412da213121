"""Run folders of identity audits without a model: what a judge would have written, made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from lightleak import statistics as st
from lightleak.runs import Run, write_json, write_table
from lightleak.validity import IdentityCutoffs, IdentityVerdict
from lightleak.validity.identity import (
    ControlFinding,
    DecoyFinding,
    PeopleCoverage,
    PublishedFinding,
    RateFinding,
    decide_identity,
)

TEMPLATES = ["{}", "a photo of {}", "{} in a suit"]
OTHERS = 999  # other people whose photos stand behind the test on faces
PHOTOS = 4
DECOYS = 999


def rate(hits: Sequence[bool]) -> RateFinding:
    count, of = sum(hits), len(hits)
    found = st.clopper_pearson(count, of)
    return RateFinding(count=count, of=of, rate=found.value, ci95=(found.low, found.high))


def write_people_run(
    folder: Path,
    *,
    sets: Mapping[str, int],
    known: int = 0,
    namesakes: int = 0,
    names: Mapping[str, str] | None = None,
    fired: bool = False,
    warnings: Sequence[str] = (),
    failures: Sequence[tuple[str, str, str]] = (),
    decoys: int = DECOYS,
    photos: Path | None = None,
    seed: int = 0,
) -> Run:
    """A judged run.

    Args:
        sets: how many people are in each set.
        known: how many of the suspects the model knows, from the first on.
        namesakes: how many more names it knows, with other faces.
        names: of chosen people, by "suspect/p3"; others are called "Suspect Number 3".
        fired: whether the first negative control finds too much.
        photos: where the photos lie; nowhere if None.
    """
    rng = np.random.default_rng(seed)
    run = Run.create(folder)
    people: list[dict[str, Any]] = []
    total = sum(sets.values())
    for side, count in sets.items():
        for i in range(count):
            in_data = side == "known" or (side == "suspect" and i < known)
            named = in_data or (side == "suspect" and i < known + namesakes)
            people.append(
                {
                    "person": f"p{i}",
                    "name": (names or {}).get(f"{side}/p{i}", f"{side.title()} Number {i}"),
                    "set": side,
                    "n_photos": PHOTOS,
                    "templates_correct": 2 if in_data else 0,
                    "member_published": in_data,
                    "member_majority": in_data,
                    "statistic": 0.7 if named else 0.01,
                    "p_value": 1 / (decoys + 1) if named else (i + 1.5) / (count + 2),
                    "n_decoys": decoys,
                    "face_p_value": None if total == 1 else 1 / (OTHERS + 1) if in_data else 0.5,
                    "shuffled_p_value": None if total == 1 else (i + 1.5) / (count + 2),
                }
            )
    suspects = [row for row in people if row["set"] == "suspect"]
    for row in people:
        face = 1.0 if row["face_p_value"] is None else row["face_p_value"]
        row |= {"decisive_p_value": max(row["p_value"], face), "found": None}
        row |= {"name_q_value": None, "q_value": None}
    for column, p_column in (("name_q_value", "p_value"), ("q_value", "decisive_p_value")):
        adjusted = st.benjamini_hochberg([row[p_column] for row in suspects]).adjusted.tolist()
        for row, q in zip(suspects, adjusted, strict=True):
            row[column] = q
    for row in suspects:
        row["found"] = row["q_value"] <= 0.05
    _write_tables(run, people, decoys, rng)
    _write_evidence(run, people, photos, rng)
    columns = ("id", "stage", "error")
    failed = list(zip(*failures, strict=True)) or [(), (), ()]
    failed_columns = [pa.array(values, pa.string()) for values in failed]
    write_table(run.failures_file, pa.table(dict(zip(columns, failed_columns, strict=True))))
    verdict = _verdict(people, suspects, decoys, fired, list(warnings))
    write_json(run.verdict_file, verdict.model_dump(mode="json"))
    manifest = {
        "kind": "identity",
        "command": "lightleak identify",
        "settings": {"target": "models/clip", "design": "observational", "seed": 0},
        "target": {"name": "models/clip", "kind": "dual-encoder"},
        "hashes": {"weights": "706d9e1d" * 8},
        "started": "2030-01-02T03:04:05+00:00",
        "finished": "2030-01-02T03:14:05+00:00",
    }
    write_json(run.manifest_file, manifest)
    return run


def _write_tables(
    run: Run, people: list[dict[str, Any]], decoys: int, rng: np.random.Generator
) -> None:
    write_table(run.people_file, pa.Table.from_pylist(people))
    predictions = [
        {
            "person": row["person"],
            "set": row["set"],
            "photo": f"{photo}.png",
            "template": template,
            "predicted": "",
            # The second template names people in the data on every photo, the third on three.
            "correct": row["member_published"] and photo < (0, PHOTOS, PHOTOS - 1)[j],
        }
        for row in people
        for photo in range(PHOTOS)
        for j, template in enumerate(TEMPLATES)
    ]
    write_table(run.predictions_file, pa.Table.from_pylist(predictions))
    spreads = {
        "person": [row["person"] for row in people],
        "set": [row["set"] for row in people],
        "statistics": [rng.beta(0.3, 8, decoys).astype(np.float32) for _ in people],
    }
    write_table(run.decoys_file, pa.table(spreads))
    curve = [
        {
            "n_photos": size,
            "set": side,
            "rule": rule,
            "people": sum(row["set"] == side for row in people),
            "rate": 0.03 if side == "control" else 1 - 0.3 / size,
            "sd": 0.02,
        }
        for side in dict.fromkeys(row["set"] for row in people)
        for rule in ("published", "majority", "p_value")
        for size in (1, 3)
    ]
    write_table(run.curve_file, pa.Table.from_pylist(curve))


def _write_evidence(
    run: Run, people: list[dict[str, Any]], photos: Path | None, rng: np.random.Generator
) -> None:
    rows = []
    for row in people:
        for i in range(PHOTOS):
            key = f"{row['set']}/{row['person']}"
            file = (photos or Path("/nowhere")) / key / f"{i}.png"
            if photos is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 255, (120, 100, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file)
            rows.append({"person": key, "photo": file.name, "file": str(file)})
    write_table(run.evidence / "photos.parquet", pa.Table.from_pylist(rows))
    write_json(run.evidence / "asked.json", {"templates": TEMPLATES, "parts": {}})


def _verdict(
    people: list[dict[str, Any]],
    suspects: list[dict[str, Any]],
    decoys: int,
    fired: bool,
    warnings: list[str],
) -> IdentityVerdict:
    cutoffs = IdentityCutoffs()
    knowns = [row for row in people if row["set"] == "known"]
    controls = []
    tried = {
        "people known to be out": [row["p_value"] for row in people if row["set"] == "control"],
        "photos under somebody else's name": [
            row["shuffled_p_value"] for row in people if row["shuffled_p_value"] is not None
        ],
    }
    for name, p_values in tried.items():
        if p_values:
            alarm = fired and not controls
            rejected = rate([p <= 0.05 for p in p_values])
            verb = "more than chance allows" if alarm else "as chance allows"
            controls.append(
                ControlFinding(
                    name=name,
                    rejected=rejected,
                    p_excess=0.0001 if alarm else 0.61,
                    p_uniform=0.37 if name == "people known to be out" else None,
                    fired=alarm,
                    sentence=f"Negative control, {name}: {rejected.count} of {rejected.of}, {verb}",
                )
            )
    named = rate([row["name_q_value"] <= 0.05 for row in suspects])
    kept = ("person", "name", "p_value", "q_value", "face_p_value")
    about = DecoyFinding(
        fewest=decoys,
        others=OTHERS if len(people) > 1 else 0,
        strata=["Latin script, three words, from the name lists of en_US"],
        warnings=warnings,
        smallest_p=1 / (decoys + 1),
        resolvable=st.smallest_resolvable(len(suspects), decoys, 0.05),
    )
    common: dict[str, Any] = {
        "found": [{key: row[key] for key in kept} for row in suspects if row["found"]],
        "named": named,
        "known": rate([True] * len(knowns)) if knowns else None,
        "controls": controls,
        "decoys": about,
        "cutoffs": cutoffs,
    }
    finding, tier, reasons = decide_identity(design="observational", **common)
    out = [row["member_published"] for row in people if row["set"] == "control"]
    return IdentityVerdict(
        verdict=finding,
        tier=tier,
        reasons=reasons,
        suspects=rate([row["found"] for row in suspects]),
        published=PublishedFinding(
            names=1000,
            templates=len(TEMPLATES),
            suspects=rate([row["member_published"] for row in suspects]),
            majority=rate([row["member_majority"] for row in suspects]),
            controls=rate(out) if out else None,
        ),
        coverage=PeopleCoverage(
            people=len(people),
            people_tested=len(people),
            photos=PHOTOS * len(people),
            truncated=0,
            photos_used=PHOTOS * len(people),
        ),
        **common,
    )
