"""What a page shows, read from the run folder."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from lightleak import statistics as st
from lightleak.errors import UserError
from lightleak.runs import Run, read_json
from lightleak.validity import Verdict

RECORDS_SHOWN = 20
FAILURES_SHOWN = 20
FALSE_DISCOVERY_RATE = 0.05
THUMBNAIL = 128
# Formats that Pillow decodes by itself; no picture may start another program.
THUMBNAIL_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PrimaryScores:
    """Scores of the primary signal, unscorable records left out.

    Attributes:
        auc: the verdict's.
        suspect, control: (n₁,) and (n₀,), higher = more member-like.
        suspect_folds, control_folds: the fold of each.
        comparable: whether all scores share one scale; where they were fitted on other folds,
            only those of one fold do.
    """

    auc: st.Estimate
    suspect: Floats
    control: Floats
    suspect_folds: Integers
    control_folds: Integers
    comparable: bool

    def folds(self) -> Iterator[tuple[Floats, Floats]]:
        """Suspects' and controls' scores that may be compared with each other."""
        if self.comparable:
            yield self.suspect, self.control
            return
        for fold in np.unique(self.control_folds):
            yield self.suspect[self.suspect_folds == fold], self.control[self.control_folds == fold]


@dataclass(frozen=True)
class Claim:
    """One suspect and what may be said of it alone; `thumbnail` is a data URI or None."""

    id: str
    text: str
    score: float
    p_value: float
    q_value: float
    thumbnail: str | None


@dataclass(frozen=True)
class Claims:
    """The highest-scoring suspects.

    Attributes:
        shown: the first `RECORDS_SHOWN`.
        tested: how many suspects have a p-value.
        surviving: how many have a q-value of at most `FALSE_DISCOVERY_RATE`.
        controls: how many controls a suspect is ranked among.
        resolvable: how many must be discovered at once before any can be; above `tested` none.
    """

    shown: tuple[Claim, ...]
    tested: int
    surviving: int
    controls: int
    resolvable: int


@dataclass(frozen=True)
class Failure:
    """A record that failed, or that a signal could not score."""

    id: str
    set: str
    stage: str
    error: str


@dataclass(frozen=True)
class Failures:
    """All failures counted by stage and side, and the first of them."""

    counts: tuple[tuple[str, str, int], ...]
    shown: tuple[Failure, ...]
    total: int


@dataclass(frozen=True)
class Contents:
    """Everything on the page but words and drawings."""

    verdict: Verdict
    manifest: Mapping[str, Any]
    blind_unknown: str | None
    scores: PrimaryScores | None
    claims: Claims | None
    failures: Failures
    hashes: Mapping[str, str]


def read(run: Run, *, show_images: bool) -> Contents:
    """Read a judged run.

    Raises:
        UserError: it has no verdict, or a file of it is missing or damaged.
    """
    if not run.verdict_file.is_file():
        raise UserError(
            "this run has no verdict yet", str(run.folder), "Run the same audit again to its end."
        )
    verdict = Verdict.read(run.verdict_file)
    scores = _primary_scores(run, verdict)
    files = (
        run.manifest_file,
        run.verdict_file,
        run.scores_file,
        run.claims_file,
        run.failures_file,
    )
    return Contents(
        verdict=verdict,
        manifest=run.manifest(),
        blind_unknown=read_json(run.evidence / "blind.json").get("unknown"),
        scores=scores,
        claims=None if scores is None else _claims(run, scores, show_images),
        failures=_failures(_table(run.failures_file)),
        hashes={file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    )


def _table(file: Path) -> pa.Table:
    try:
        return pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            "it is missing or damaged", str(file), "Judge the run again: lightleak report RUN."
        ) from error


def _primary_scores(run: Run, verdict: Verdict) -> PrimaryScores | None:
    """None where there are too few to compare."""
    auc, interval = verdict.primary.auc, verdict.primary.auc_ci95
    if auc is None or interval is None:
        return None
    table = _table(run.scores_file)
    table = table.filter(
        pc.and_(pc.equal(table["signal"], verdict.primary.signal), pc.is_valid(table["score"]))
    )
    sides = {side: table.filter(pc.equal(table["set"], side)) for side in ("suspect", "control")}
    suspect, control = (each["score"].to_numpy() for each in sides.values())
    suspect_folds, control_folds = (each["fold"].to_numpy() for each in sides.values())
    # Scores fitted on other folds are compared within folds, and give the verdict's AUC only so.
    comparable = bool(np.isclose(st.auc(suspect, control), auc, rtol=0, atol=1e-9))
    estimate = st.Estimate(auc, *interval)
    return PrimaryScores(estimate, suspect, control, suspect_folds, control_folds, comparable)


def _claims(run: Run, scores: PrimaryScores, show_images: bool) -> Claims:
    # Conformal p-values are often tied.
    table = _table(run.claims_file).sort_by([("p_value", "ascending"), ("score", "descending")])
    rows = table.slice(0, RECORDS_SHOWN).to_pylist()
    records = _table(run.evidence / "records.parquet")
    wanted = pa.array([f"suspect/{row['id']}" for row in rows], pa.string())
    about = {row["id"]: row for row in records.filter(pc.is_in(records["id"], wanted)).to_pylist()}
    shown = []
    for row in rows:
        record = about[f"suspect/{row['id']}"]
        image = record["image"] if show_images else None
        shown.append(
            Claim(**row, text=record["text"], thumbnail=None if image is None else thumbnail(image))
        )
    controls = min(control.size for _, control in scores.folds())
    return Claims(
        shown=tuple(shown),
        tested=table.num_rows,
        surviving=int((table["q_value"].to_numpy() <= FALSE_DISCOVERY_RATE).sum()),
        controls=controls,
        resolvable=st.smallest_resolvable(table.num_rows, controls, FALSE_DISCOVERY_RATE),
    )


def thumbnail(file: str) -> str | None:
    """The picture as a JPEG data URI of at most 128 × 128 pixels; None if it cannot be read."""
    try:
        with Image.open(file, formats=THUMBNAIL_FORMATS) as image:
            image.draft("RGB", (THUMBNAIL, THUMBNAIL))
            small = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = BytesIO()
    small.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _failures(table: pa.Table) -> Failures:
    rows = [Failure(**row) for row in table.to_pylist()]
    counted = Counter((row.stage, row.set) for row in rows)
    counts = tuple((stage, side, count) for (stage, side), count in counted.most_common())
    return Failures(counts, tuple(rows[:FAILURES_SHOWN]), len(rows))


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values of nested content, for a table of two columns."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        elif isinstance(value, list):
            yield name, ", ".join(str(each) for each in value)
        else:
            yield name, "not given" if value in (None, {}) else str(value)
