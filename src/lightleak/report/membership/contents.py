"""What the page of a membership audit shows, read from the run folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lightleak import statistics as st
from lightleak.report.contents import thumbnail
from lightleak.runs import Run, read_json, read_table
from lightleak.validity import Verdict

RECORDS_SHOWN = 20
FALSE_DISCOVERY_RATE = 0.05

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PrimaryScores:
    """Scores of the primary signal, unscorable records left out.

    Attributes:
        auc: the verdict's.
        suspect, control: (n₁,) and (n₀,), higher = more member-like.
        suspect_folds, control_folds: the fold of each.
        suspect_groups, control_groups: what each was sampled with.
        comparable: whether all scores share one scale; where they were fitted on other folds,
            only those of one fold do.
    """

    auc: st.Estimate
    suspect: Floats
    control: Floats
    suspect_folds: Integers
    control_folds: Integers
    suspect_groups: npt.NDArray[np.str_]
    control_groups: npt.NDArray[np.str_]
    comparable: bool

    def folds(self) -> Iterator[PrimaryScores]:
        """The scores in parts that may be compared with each other: all, or those of a fold."""
        if self.comparable:
            yield self
            return
        for fold in np.unique(self.control_folds):
            sides = {"suspect": self.suspect_folds == fold, "control": self.control_folds == fold}
            kept = {
                f"{side}{what}": getattr(self, f"{side}{what}")[here]
                for side, here in sides.items()
                for what in ("", "_folds", "_groups")
            }
            yield PrimaryScores(auc=self.auc, comparable=True, **kept)


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
class Contents:
    """Everything that this page alone shows, but words and drawings.

    `servers` is what an endpoint says that it runs; None where the target is none.
    """

    verdict: Verdict
    blind_unknown: str | None
    scores: PrimaryScores | None
    claims: Claims | None
    servers: tuple[str, ...] | None


def read(run: Run, *, show_images: bool) -> Contents:
    """Read a judged run.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    verdict = Verdict.read(run.verdict_file)
    scores = _primary_scores(run, verdict)
    return Contents(
        verdict=verdict,
        blind_unknown=read_json(run.evidence / "blind.json").get("unknown"),
        scores=scores,
        claims=None if scores is None else _claims(run, scores, show_images),
        servers=_servers(run) if run.manifest()["target"]["kind"] == "endpoint" else None,
    )


def _servers(run: Run) -> tuple[str, ...]:
    parts = [read_table(file, ["servers"]) for file in run.evidence.glob("part-*.parquet")]
    named = {name for part in parts for row in part["servers"].to_pylist() for name in row}
    return tuple(sorted(named))


def _primary_scores(run: Run, verdict: Verdict) -> PrimaryScores | None:
    """None where there are too few to compare."""
    auc, interval = verdict.primary.auc, verdict.primary.auc_ci95
    if auc is None or interval is None:
        return None
    table = read_table(run.scores_file)
    table = table.filter(
        pc.and_(pc.equal(table["signal"], verdict.primary.signal), pc.is_valid(table["score"]))
    )
    sides = {side: table.filter(pc.equal(table["set"], side)) for side in ("suspect", "control")}
    suspect, control = (each["score"].to_numpy() for each in sides.values())
    suspect_folds, control_folds = (each["fold"].to_numpy() for each in sides.values())
    records = read_table(run.evidence / "records.parquet").select(["id", "group"]).to_pydict()
    group = {key: own or key for key, own in zip(records["id"], records["group"], strict=True)}
    suspect_groups, control_groups = (
        np.array([group[f"{side}/{key}"] for key in each["id"].to_pylist()])
        for side, each in sides.items()
    )
    # Scores fitted on other folds are compared within folds, and give the verdict's AUC only so.
    comparable = bool(np.isclose(st.auc(suspect, control), auc, rtol=0, atol=1e-9))
    estimate = st.Estimate(auc, *interval)
    return PrimaryScores(
        estimate,
        suspect,
        control,
        suspect_folds,
        control_folds,
        suspect_groups,
        control_groups,
        comparable,
    )


def _claims(run: Run, scores: PrimaryScores, show_images: bool) -> Claims:
    # Conformal p-values are often tied.
    table = read_table(run.claims_file).sort_by([("p_value", "ascending"), ("score", "descending")])
    rows = table.slice(0, RECORDS_SHOWN).to_pylist()
    records = read_table(run.evidence / "records.parquet")
    wanted = pa.array([f"suspect/{row['id']}" for row in rows], pa.string())
    about = {row["id"]: row for row in records.filter(pc.is_in(records["id"], wanted)).to_pylist()}
    shown = []
    for row in rows:
        record = about[f"suspect/{row['id']}"]
        image = record["image"] if show_images else None
        shown.append(
            Claim(**row, text=record["text"], thumbnail=None if image is None else thumbnail(image))
        )
    controls = min(part.control.size for part in scores.folds())
    return Claims(
        shown=tuple(shown),
        tested=table.num_rows,
        surviving=int((table["q_value"].to_numpy() <= FALSE_DISCOVERY_RATE).sum()),
        controls=controls,
        resolvable=st.smallest_resolvable(table.num_rows, controls, FALSE_DISCOVERY_RATE),
    )
