"""How often a verdict is wrong, situation by situation, beside what peers do on the same data.

    python benchmarks/soundness.py --workers 2      # about an hour and a half; goes on where it was

Records and scores are real, membership is known. One lab target (`captions-tiny`) reads, once,
members that it was trained on and a pool of scenes that it never saw, these with their captions
as trained, with captions in another style, and with their images dimmed and saved as JPEG. Then
audit after audit draws its suspects and controls from what was read: each has its own draw, blind
baseline, tests and verdict, by the code that judges every run.

A shift comes from shares: where δ of the suspects more than of the controls have the trained style
(or plain images), the best blind classifier has an AUC of ½ + δ/2. In the rows with a control
target, a model that was trained on other scenes reads the same records.

Of the negative controls the random halves of the controls are left out: they could only turn an
`exposed` into an `inconclusive`, and take as long as all the rest.

The naive columns are what peers report: Mann–Whitney on the same scores, and dataset inference on
them, neither after any check.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from PIL import Image, ImageEnhance

from lightleak import lab, targets
from lightleak.audits import judge_controls
from lightleak.audits.gather import store_blind
from lightleak.audits.judge import judge
from lightleak.audits.settings import AuditSettings
from lightleak.audits.sides import Sides, store_records
from lightleak.evidence import collect
from lightleak.evidence.tokens import AnswerReader
from lightleak.lab import corpora
from lightleak.lab.models import IMAGE_SIDE
from lightleak.records import Record, assign_folds, load
from lightleak.runs import Run, read_json, write_json, write_table
from lightleak.runs.executors import executor
from lightleak.runs.progress import Advance
from lightleak.statistics import clopper_pearson
from lightleak.validity.blind_features import BlindFeatures, blind_features
from lightleak.validity.duplicates import find_duplicates
from lightleak.validity.verdict import Verdict

RESULTS = Path(__file__).parent / "results" / "soundness.json"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "soundness.png"
ALPHA = 0.01
MEMBERS, POOL, SIDE = 900, 2400, 240


@dataclass(frozen=True)
class Situation:
    """One row of the table.

    Attributes:
        name: in words.
        bound: what the share of `exposed` must be, "≤ 0.01" or "≥ 0.9".
        trained: whether the suspects were trained on.
        shift: "" or what is shifted: captions, images.
        suspects, controls: share of either side that has the other style or dimmed images.
        design: as declared.
        control_target: whether a second model reads the records.
    """

    name: str
    bound: str
    trained: bool = False
    shift: str = ""
    suspects: float = 0.0
    controls: float = 0.0
    design: str = "observational"
    control_target: bool = False

    @property
    def blind_auc(self) -> float:
        """Of the best blind classifier."""
        return 0.5 + (self.controls - self.suspects) / 2

    @property
    def holds(self) -> Any:
        """Whether a share keeps the bound."""
        sign, value = self.bound.split()
        return (lambda share: share <= float(value)) if sign == "≤" else lambda s: s >= float(value)


def _shifted(what: str, auc: float, **more: Any) -> Situation:
    half = auc - 0.5
    name = f"never trained on, {what} shifted to a blind AUC of {auc}"
    if more.get("control_target"):
        name += ", with a control target"
    return Situation(name, "≤ 0.02", shift=what, suspects=0.5 - half, controls=0.5 + half, **more)


SITUATIONS = (
    Situation("never trained on, same distribution", "≤ 0.01"),
    Situation("the same, drawn at random", "≤ 0.01", design="randomised"),
    *(_shifted("captions", auc) for auc in (0.6, 0.75, 0.92)),
    _shifted("captions", 0.75, control_target=True),
    *(_shifted("images", auc) for auc in (0.6, 0.75, 0.92)),
    Situation("trained on, same distribution", "≥ 0.9", trained=True),
    *(
        Situation(
            f"trained on, captions shifted to a blind AUC of {auc}",
            "≥ 0.6",
            trained=True,
            shift="captions",
            controls=2 * (auc - 0.5),
        )
        for auc in (0.6, 0.75)
    ),
)


# -- what is read once ------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Train both models, draw the pool, and read every record once."""
    if (folder / "ready").is_file():
        return
    made = lab.build("captions-tiny", folder / "lab", members=MEMBERS, nonmembers=2)
    other = lab.build("captions-tiny", folder / "other", members=MEMBERS, nonmembers=2, seed=1)
    members = list(load(made.members, strict=True).records)
    known = {r.text for file in (made.members, other.members) for r in load(file).records}
    drawn = corpora.scenes(POOL, seed=2**22)
    scenes = [each for each in drawn if each.caption() not in known]
    pool = [Record(f"pool-{i}", s.png(IMAGE_SIDE), s.caption()) for i, s in enumerate(scenes)]
    alike = find_duplicates([*members, *pool], np.arange(len(members) + len(pool)) < len(members))
    copies = {
        place for pair in (*alike.across, *alike.within) for place in (pair.first, pair.second)
    }
    members = [r for i, r in enumerate(members) if i not in copies]
    kept = [i for i in range(len(pool)) if i + MEMBERS not in copies]
    variants = {
        "member": members,
        "": [pool[i] for i in kept],
        "captions": [replace(pool[i], text=scenes[i].caption("list")) for i in kept],
        "images": [replace(pool[i], image=_dimmed(pool[i])) for i in kept],
    }
    everyone = [
        replace(record, id=f"{name or 'plain'}-{record.id}")
        for name, records in variants.items()
        for record in records
    ]
    for name, model in (("target", made.target), ("control", other.target)):
        loaded = targets.load(model, device="cpu", dtype="float32")
        measured = collect.measure(loaded, None, AnswerReader(), everyone)
        assert not measured.failures, measured.failures[0]
        write_table(folder / f"{name}.parquet", measured.table)
    write_table(
        folder / "records.parquet",
        pa.table(
            {
                "id": [r.id for r in everyone],
                "image": [
                    r.image if isinstance(r.image, bytes) else r.image.read_bytes()
                    for r in everyone
                ],
                "text": [r.text for r in everyone],
                "variant": [name for name, records in variants.items() for _ in records],
            }
        ),
    )
    (folder / "ready").touch()


def _dimmed(record: Record) -> bytes:
    assert isinstance(record.image, bytes)
    with Image.open(BytesIO(record.image)) as image:
        stream = BytesIO()
        ImageEnhance.Brightness(image.convert("RGB")).enhance(0.6).save(stream, "JPEG", quality=60)
    return stream.getvalue()


@dataclass(frozen=True)
class Read:
    """The pool as read: records and evidence row by row, and the rows of each variant."""

    records: tuple[Record, ...]
    features: BlindFeatures
    evidence: dict[str, pa.Table]
    rows: dict[str, np.ndarray[Any, np.dtype[np.int64]]]


@cache
def read(folder: Path) -> Read:
    """What `prepare` left; the same for every audit of a process."""
    import pyarrow.parquet as pq

    stored = pq.read_table(folder / "records.parquet").to_pydict()
    records = tuple(
        Record(*each) for each in zip(stored["id"], stored["image"], stored["text"], strict=True)
    )
    place = {key: i for i, key in enumerate(stored["id"])}
    evidence = {}
    for name in ("target", "control"):
        table = pq.read_table(folder / f"{name}.parquet")
        order = np.argsort([place[key] for key in table["id"].to_pylist()])
        evidence[name] = table.take(order)
    variant = np.array(stored["variant"])
    return Read(
        records,
        blind_features(records, seed=0),
        evidence,
        {name: np.flatnonzero(variant == name) for name in ("member", "", "captions", "images")},
    )


# -- one audit --------------------------------------------------------------------------------


def draw(pool: Read, situation: Situation, number: int) -> tuple[list[int], list[int]]:
    """Rows of the suspects and of the controls; no scene appears twice."""
    rng = np.random.default_rng([SITUATIONS.index(situation), number])
    scenes = rng.permutation(pool.rows[""].size)[: 2 * SIDE]

    def side(chosen: Any, share: float) -> list[int]:
        moved = np.arange(SIDE) < round(share * SIDE)
        other = pool.rows[situation.shift]
        return np.where(moved, other[chosen], pool.rows[""][chosen]).tolist()

    suspects = side(scenes[:SIDE], situation.suspects)
    if situation.trained:
        suspects = rng.permutation(pool.rows["member"])[:SIDE].tolist()
    return suspects, side(scenes[SIDE:], situation.controls)


def audit(pool: Read, situation: Situation, number: int) -> Verdict:
    """Draw, compare without the model, score, test and decide."""
    suspects, controls = draw(pool, situation, number)
    rows = np.array([*suspects, *controls])
    side = np.repeat(["suspect", "control"], SIDE)
    ids = [f"{name}/{pool.records[row].id}" for name, row in zip(side, rows, strict=True)]
    # Of groups the audit would make one a record, since the pool holds no copies.
    records = [
        replace(pool.records[row], id=key, group=str(i))
        for i, (row, key) in enumerate(zip(rows, ids, strict=True))
    ]
    suspect = side == "suspect"
    folder = Path(tempfile.mkdtemp(prefix="soundness-"))
    try:
        run = Run.create(folder)
        folds = assign_folds(suspect, [record.group for record in records], 2, number)
        store_records(run, Sides(tuple(records), side, folds, (), {}))
        store_blind(run, number, records, suspect, pool.features.take(rows))
        write_json(run.evidence / "duplicates.json", {"across": []})
        settings = AuditSettings(
            target="target",
            suspect="suspects",
            control="controls",
            signals=("loss",),
            primary="loss",
            design=situation.design,
            seed=number,
        )
        passes = {"target": run.evidence}
        if situation.control_target:
            passes["control"] = run.evidence / "control-target"
            passes["control"].mkdir()
        for name, place in passes.items():
            table = pool.evidence[name].take(rows).set_column(0, "id", pa.array(ids))
            write_table(place / "part-00000.parquet", table)
        write_json(
            run.manifest_file,
            {"kind": "membership", "settings": settings.model_dump(mode="json")},
        )
        return judge(run)
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Job:
    """Some audits of one situation."""

    folder: Path
    situation: int
    start: int
    stop: int

    @property
    def file(self) -> Path:
        """Where their results go."""
        return self.folder / f"done-{self.situation:02d}-{self.start:05d}.json"


def perform(job: Job, advance: Advance) -> None:
    """Run a job's audits, unless they are done."""
    advance(1)
    if job.file.is_file():
        return
    judge_controls.HALVES.update(permutation=0, residual=0)
    situation, pool = SITUATIONS[job.situation], read(job.folder)
    rows = []
    for number in range(job.start, job.stop):
        verdict = audit(pool, situation, number)
        inference = verdict.dataset_inference
        rows.append(
            {
                "verdict": verdict.verdict,
                "tier": verdict.tier,
                "auc": verdict.primary.auc,
                "p": verdict.primary.p_value,
                "p adjusted": verdict.primary.p_value_adjusted,
                "Mann–Whitney": verdict.primary.tests["Mann–Whitney"],
                "dataset inference": None if inference is None else inference.p_value,
                "blind": verdict.validity.blind_auc,
                "control fired": any(each.fired for each in verdict.validity.controls),
            }
        )
    write_json(job.file, {"rows": rows})


# -- the table --------------------------------------------------------------------------------


def summary(situation: Situation, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table."""

    def share(count: int) -> dict[str, Any]:
        found = clopper_pearson(count, len(rows))
        return {"share": found.value, "ci95": [found.low, found.high]}

    def rejected(name: str) -> dict[str, Any]:
        return share(sum(row[name] is not None and row[name] <= ALPHA for row in rows))

    exposed = share(sum(row["verdict"] == "exposed" for row in rows))
    return {
        **asdict(situation),
        "blind AUC": {
            "by design": situation.blind_auc,
            "median measured": float(np.median([row["blind"] for row in rows])),
        },
        "audits": len(rows),
        "median AUC of loss": float(np.median([row["auc"] for row in rows])),
        "verdicts": dict(Counter(row["verdict"] for row in rows)),
        "tiers": dict(Counter(row["tier"] for row in rows)),
        "exposed": exposed,
        "holds": bool(situation.holds(exposed["share"])),
        "naive: Mann–Whitney": rejected("Mann–Whitney"),
        "naive: dataset inference": rejected("dataset inference"),
    }


def picture(table: Sequence[dict[str, Any]], file: Path) -> None:
    """Shares of exposed, lightleak beside naive practice, by situation."""
    figure = Figure(figsize=(9, 0.52 * len(table) + 1.3), layout="constrained")
    axes = figure.subplots()
    kinds = (
        ("naive: dataset inference", "dataset inference, unchecked", "#b9bec7", "s"),
        ("naive: Mann–Whitney", "Mann–Whitney, unchecked", "#6b7280", "o"),
        ("exposed", "lightleak: exposed", "#b3261e", "D"),
    )
    for place, row in enumerate(reversed(table)):
        sign, value = row["bound"].split()
        allowed = (0, float(value)) if sign == "≤" else (float(value), 1)
        axes.barh(place, allowed[1] - allowed[0], left=allowed[0], height=0.8, color="#e3f1e5")
        for name, label, colour, marker in kinds:
            low, high = row[name]["ci95"]
            axes.plot([low, high], [place, place], color=colour, lw=2, solid_capstyle="butt")
            axes.plot(
                row[name]["share"],
                place,
                marker,
                color=colour,
                ms=6,
                clip_on=False,
                zorder=3,
                label=label if place == 0 else None,
            )
    axes.set_yticks(
        range(len(table)), [row["name"].replace(", ", ",\n", 1) for row in reversed(table)]
    )
    axes.set_xscale("function", functions=(lambda x: np.abs(x) ** 0.4, lambda x: np.abs(x) ** 2.5))
    axes.set_xticks(
        [0, 0.01, 0.05, 0.2, 0.5, 0.9, 1], ["0", "1 %", "5 %", "20 %", "50 %", "90 %", ""]
    )
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of audits that say “trained on”; green: asked for")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Run what is missing, then write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--audits", type=int, default=500, help="for each situation")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="*", default=range(len(SITUATIONS)))
    parser.add_argument("--work", type=Path, default=Path("soundness-work"))
    given = parser.parse_args()
    started = time.monotonic()
    given.work.mkdir(exist_ok=True)
    prepare(given.work)
    step = 25
    jobs = [
        Job(given.work, place, start, min(start + step, given.audits))
        for start in range(0, given.audits, step)
        for place in given.rows
    ]
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        print(f"{done} of {len(jobs)} jobs, {time.monotonic() - started:.0f} s", flush=True)

    with executor(workers=given.workers) as these:
        these.map(perform, jobs, advance)
    rows = {
        place: [
            row for job in jobs if job.situation == place for row in read_json(job.file)["rows"]
        ]
        for place in given.rows
    }
    table = [summary(SITUATIONS[place], found) for place, found in rows.items()]
    results = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, "
        f"Python {platform.python_version()}, one thread a process",
        "recipe": f"captions-tiny, {MEMBERS} members, seed 0; pool of {POOL} other scenes",
        "records a side": SIDE,
        "level": ALPHA,
        "seconds": round(time.monotonic() - started),
        "table": table,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, results)
    picture(table, FIGURE)
    print(json.dumps(table, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
