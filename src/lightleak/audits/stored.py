"""What a run has stored, read back row by row: evidence, scores, and the records compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lightleak import signals
from lightleak.audits.calibration import SCORED
from lightleak.audits.gather_references import ASKED
from lightleak.audits.gather_shares import read_shares, shares_done
from lightleak.audits.settings import AuditSettings
from lightleak.errors import UserError
from lightleak.evidence.readings import (
    ACROSS,
    AnswerDistributions,
    AugmentedCosines,
    AugmentedDivergences,
    ContrastLoss,
    CorruptedEmbeddings,
    DropoutCosines,
    Floats,
    GradientNorms,
    GradientSlices,
    ModelReadings,
    NeighbourLosses,
    OwnDescription,
    PairEmbeddings,
    PromptDistributions,
    SampledAnswers,
    TokenStatistics,
    slice_axes,
)
from lightleak.evidence.summary import losses, summary
from lightleak.evidence.table import (
    SLICE_COLUMNS,
    answer_distributions,
    augmented_cosines,
    augmented_divergences,
    contrast_loss,
    corrupted_embeddings,
    dropout_cosines,
    gradient_norms,
    gradient_slices,
    neighbour_losses,
    own_description,
    pair_embeddings,
    prompt_distributions,
    sampled_answers,
    token_statistics,
)
from lightleak.runs import Run, read_json, read_table
from lightleak.signals import cross

_SLICES = (*SLICE_COLUMNS, "in_reference")


@dataclass(frozen=True)
class Measured:
    """The evidence of one pass and the records it is about, row by row.

    Attributes:
        run, folder: where it lies.
        table: evidence without the slices, n rows.
        ids: (n,) "suspect/a1"; side, folds: (n,); groups: (n,), copies share one.
        slice_parts: yields the parts with their slices.
    """

    run: Run
    folder: Path
    table: pa.Table
    ids: list[str]
    side: NDArray[np.str_]
    folds: NDArray[np.int64]
    groups: NDArray[np.str_]
    slice_parts: Callable[[], Iterator[pa.Table]]

    @property
    def audited(self) -> NDArray[np.bool_]:
        """Suspects and controls, not calibration records."""
        return np.isin(self.side, ("suspect", "control"))


def load(run: Run, folder: Path | None = None) -> Measured:
    """Evidence and records of a run, side by side.

    Args:
        run: the run.
        folder: of another pass than the target's: a control model, shuffled texts.

    Raises:
        UserError: the evidence is not complete.
    """
    folder = folder or run.evidence
    about = read_table(run.evidence / "records.parquet", ["id", "set", "fold", "group"])
    files = sorted(folder.glob("part-*.parquet"))
    if not files:
        raise UserError("it holds no evidence yet", str(run.folder), "Run the same audit again.")
    table = pa.concat_tables([read_table(file, without=_SLICES) for file in files])
    failed = pa.concat_tables(
        [read_table(file, ["id"]) for file in folder.glob("failed-*.parquet")]
        or [pa.table({"id": pa.array([], pa.string())})]
    )["id"]
    there = pa.chunked_array([*table["id"].chunks, *failed.chunks], pa.string())
    missing = pc.sum(pc.invert(pc.is_in(about["id"], value_set=there))).as_py()
    if missing:
        raise UserError(
            f"its evidence is not complete: {missing} record(s) are missing",
            str(run.folder),
            "Run the same audit again: it goes on where it was.",
        )
    about = about.take(pc.index_in(table["id"], value_set=about["id"]))

    alone = pc.fill_null(pc.equal(about["group"], ""), True)

    def slice_parts() -> Iterator[pa.Table]:
        for file in files:
            yield read_table(file, columns=list(_SLICES))

    return Measured(
        run,
        folder,
        table,
        table["id"].to_pylist(),
        np.array(about["set"].to_pylist(), dtype=str),
        about["fold"].to_numpy(),
        np.array(pc.if_else(alone, about["id"], about["group"]).to_pylist(), dtype=str),
        slice_parts,
    )


def score(settings: AuditSettings, measured: Measured, name: str) -> Floats:
    """(n,) scores of one signal; NaN where a record cannot be scored or only calibrates."""
    stored = sorted(measured.folder.glob(f"scored-{name}-*.parquet"))
    reduced = (measured.folder / "rule.json").is_file() and name == "gradaudit"
    done = measured.folder / SCORED
    if reduced and not (done.is_file() and read_json(done).get("shards") == len(stored)):
        raise UserError(
            "its evidence is not complete: not every record is scored at the kept slices",
            str(measured.folder),
            "Run the same audit again: it goes on where it was.",
        )
    if stored:
        # The evidence was too large to keep: it was reduced to scores on the way.
        table = pa.concat_tables([read_table(file) for file in stored]).to_pydict()
        by_id = dict(zip(table["id"], table["score"], strict=True))
        return np.array([by_id.get(key, np.nan) for key in measured.ids], dtype=np.float64)
    signal = signals.get(name)
    fits = cross(settings.protocol, settings.folds, measured.side, measured.folds)
    options = settings.options_of(name)
    return signal.score(_evidence(measured, signal.evidence(options)), fits, options)


_FROM_TABLE: dict[type, Callable[[pa.Table], Any]] = {
    TokenStatistics: token_statistics,
    AnswerDistributions: answer_distributions,
    PromptDistributions: prompt_distributions,
    OwnDescription: own_description,
    PairEmbeddings: pair_embeddings,
    AugmentedCosines: augmented_cosines,
    DropoutCosines: dropout_cosines,
    ContrastLoss: contrast_loss,
    AugmentedDivergences: augmented_divergences,
    NeighbourLosses: neighbour_losses,
    CorruptedEmbeddings: corrupted_embeddings,
    SampledAnswers: sampled_answers,
}


def _evidence(measured: Measured, needs: type) -> Any:
    if needs in _FROM_TABLE:
        return _FROM_TABLE[needs](measured.table)
    if needs in ACROSS:
        return _across(measured, needs)
    described = read_json(measured.folder / "gradients.json")
    matrices = {name: tuple(shape) for name, shape in described["matrices"].items()}
    if needs is GradientNorms:
        return gradient_norms(measured.table, list(matrices))
    if needs is GradientSlices:
        norms2 = read_table(measured.folder / "reference-norms.parquet")["norms2"].to_pylist()
        return gradient_slices(
            measured.slice_parts,
            len(measured.ids),
            slice_axes(matrices),
            np.array(norms2),
            np.array(described["reference_sizes"]),
            lora=described["strategy"].startswith("lora"),
        )
    raise TypeError(f"no evidence of kind {needs.__name__}")


def _across(measured: Measured, needs: type) -> ModelReadings:
    """What the base and the references say of the same records, beside this model."""
    evidence = measured.run.evidence
    if not (evidence / ASKED).is_file():
        raise _incomplete(measured.run)
    asked = read_json(evidence / ASKED)
    if needs is ModelReadings and not shares_done(measured.run, asked):
        raise _incomplete(measured.run)
    shares = read_shares(measured.run) if needs is ModelReadings else {}
    own = _summary(measured, needs) | _own_shares(shares, measured)
    names = tuple(own)

    def other(folder: str) -> Floats:
        """Its readings (n, d), in the order of this model's; NaN where it has none."""
        there = load(measured.run, evidence / folder)
        found = _summary(there, needs) | _own_shares(shares, there)
        values = np.full((len(measured.ids), len(names)), np.nan)
        place = {key: row for row, key in enumerate(there.ids)}
        rows = np.array([place.get(key, -1) for key in measured.ids])
        for column, name in enumerate(names):
            if name in found:
                values[rows >= 0, column] = found[name][rows[rows >= 0]]
        return _finite(values)

    trained_on = asked["trained on"]
    unexposed = next((n for n in ("base", "control-target") if (evidence / n).is_dir()), None)
    empty = np.zeros((0, len(measured.ids)))
    seen = [np.isin(measured.ids, ids) for ids in trained_on.values()]
    references = [other(name) for name in trained_on]
    return needs(  # type: ignore[no-any-return]
        names,
        _finite(np.column_stack(list(own.values()))),
        None if unexposed is None else other(unexposed),
        np.stack(references) if references else np.zeros((0, len(measured.ids), len(names))),
        np.stack(seen) if seen else empty.astype(bool),
        measured.side == "control",
    )


def _summary(measured: Measured, needs: type) -> dict[str, Floats]:
    if GradientNorms not in ACROSS[needs]:
        return {"loss": losses(measured.table)}
    matrices = read_json(measured.folder / "gradients.json")["matrices"]
    return summary(measured.table, list(matrices))


def _own_shares(
    shares: Mapping[str, Mapping[str, Mapping[str, float]]], measured: Measured
) -> dict[str, Floats]:
    """This model's, (n,) by name; NaN of a record without a gradient."""
    own = shares.get("target" if measured.folder == measured.run.evidence else measured.folder.name)
    return {
        name: np.array([each.get(key, np.nan) for key in measured.ids])
        for name, each in (own or {}).items()
    }


def _finite(values: Floats) -> Floats:
    """The log of a gradient that is nought says as little as none."""
    return np.where(np.isfinite(values), values, np.nan)


def _incomplete(run: Run) -> UserError:
    return UserError(
        "its evidence is not complete: other models were still to be asked",
        str(run.folder),
        "Run the same audit again: it goes on where it was.",
    )


@dataclass(frozen=True)
class Compared:
    """Scored suspects and controls, as the statistics take them."""

    scores: Floats
    suspect: NDArray[np.bool_]
    folds: NDArray[np.int64]
    groups: NDArray[np.str_]
    rows: NDArray[np.int64]

    def enough(self, fewest: int = 2) -> bool:
        """Whether both sides have so many groups, so that there is something to compare."""
        return min(self.n_groups) >= fewest

    def where(self, kept: NDArray[np.bool_]) -> Compared:
        """Some of them."""
        return Compared(*(getattr(self, field.name)[kept] for field in fields(self)))

    @property
    def n_groups(self) -> tuple[int, int]:
        """Groups among the suspects and among the controls."""
        return len(set(self.groups[self.suspect])), len(set(self.groups[~self.suspect]))

    @property
    def effective_groups(self) -> tuple[int, int]:
        """How many groups of one size would tell as much, (Σn)²/Σn², rounded down."""
        counts = (
            np.unique(self.groups[side], return_counts=True)[1]
            for side in (self.suspect, ~self.suspect)
        )
        first, second = (int(n.sum() ** 2 / max(1, (n**2).sum()) + 1e-9) for n in counts)
        return first, second


def compared(measured: Measured, scores: Floats) -> Compared:
    """The audited records that have a score."""
    rows = np.flatnonzero(measured.audited & np.isfinite(scores))
    return Compared(
        scores[rows],
        measured.side[rows] == "suspect",
        measured.folds[rows],
        measured.groups[rows],
        rows,
    )
