"""What the page of a probe shows, read from the run folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightleak.report.contents import thumbnail
from lightleak.runs import Run, read_table
from lightleak.validity import ProbingVerdict
from lightleak.validity.probing import ConditionFinding, OutputFinding, TrendFinding

# In the order that data flow through them; pixels are what goes in.
TOWERS = ("pixels", "vision", "projector", "language")
ALL = "all"
EXAMPLE = 336

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Contents:
    """Everything that this page alone shows, but words and drawings.

    Attributes:
        probes: rows of probes.parquet for all seeds together, in the order data flow.
        by_seed: its rows for one seed each.
        answers, utility, dynamics: rows of their files for all seeds together.
        projections: rows of projections.parquet.
        example: one image that was probed, as a data URI; None unless asked for.
    """

    verdict: ProbingVerdict
    probes: tuple[Row, ...]
    by_seed: tuple[Row, ...]
    answers: tuple[Row, ...]
    utility: tuple[Row, ...]
    dynamics: tuple[Row, ...]
    projections: tuple[Row, ...]
    example: str | None

    @property
    def tells(self) -> ConditionFinding:
        """The fine-tuned model in which the trace is surest."""
        return min(
            self.verdict.tuned,
            key=lambda each: (each.p_value_holm or each.p_value, each.p_value, -each.best.delta),
        )

    @property
    def told(self) -> OutputFinding | None:
        """What that model's answers show of the seen."""
        return next(
            (
                each
                for each in self.verdict.outputs
                if (each.condition, each.pool) == (self.tells.name, "seen")
            ),
            None,
        )

    @property
    def told_before(self) -> OutputFinding | None:
        """Likewise of the model before."""
        before = (each for each in self.verdict.outputs if each.condition == "base")
        return next((each for each in before if each.pool == "seen"), None)

    def answered(self, *, each_field: bool) -> dict[tuple[str, str], dict[str, Row]]:
        """Both pools' answers by condition and field: to all questions, or to each."""
        found: dict[tuple[str, str], dict[str, Row]] = {}
        for row in self.answers:
            if (row["field"] != ALL) is each_field:
                found.setdefault((row["condition"], row["field"]), {})[row["pool"]] = row
        return found

    def turned(self, comparison: str) -> list[Row]:
        """How far all layers' gradient is turned, from small batches to large ones."""
        rows = (
            row for row in self.dynamics if (row["comparison"], row["layer"]) == (comparison, ALL)
        )
        return sorted(rows, key=lambda row: row["batch_size"])

    def trend(self, comparison: str) -> TrendFinding | None:
        """How that changes as batches grow; the same batch again has none."""
        return next((each for each in self.verdict.trends if each.comparison == comparison), None)

    def of(self, condition: str) -> list[Row]:
        """The probes of one condition, in the order data flow."""
        return [row for row in self.probes if row["condition"] == condition]

    def published(self) -> dict[str, Row]:
        """By condition, the layer where it was probed as published: where ours is best, if there.

        Elsewhere the published probe's own best counts.
        """
        rows = {}
        for each in self.verdict.conditions:
            probed = [row for row in self.of(each.name) if row["published_accuracy"] is not None]
            if probed:
                rows[each.name] = max(
                    probed, key=lambda row: (is_at(row, each), row["published_accuracy"])
                )
        return rows


def is_at(row: Row, condition: ConditionFinding) -> bool:
    """Whether a row is of the layer and question where a condition's trace is surest."""
    best = condition.best
    return (row["condition"], row["tower"], row["layer"], row["field"]) == (
        condition.name,
        best.tower,
        best.layer,
        best.field,
    )


def read(run: Run, *, show_images: bool) -> Contents:
    """Read a judged run.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    probes = sorted(
        read_table(run.probes_file).to_pylist(),
        key=lambda row: (TOWERS.index(row["tower"]), row["layer"]),
    )
    return Contents(
        verdict=ProbingVerdict.read(run.verdict_file),
        probes=_together(probes),
        by_seed=tuple(row for row in probes if row["seed"] is not None),
        answers=_together(read_table(run.output_view_file).to_pylist()),
        utility=_together(_rows(run.utility_file)),
        dynamics=_together(_rows(run.dynamics_file)),
        projections=tuple(_rows(run.projections_file)),
        example=_example(run) if show_images else None,
    )


def _example(run: Run) -> str | None:
    """One of the images that were probed; who gave images of their own knows them."""
    files = sorted(run.watermarked.glob("seed-*/probing/seen/img/*"))
    return thumbnail(str(files[0]), EXAMPLE) if files else None


def _together(rows: Iterable[Row]) -> tuple[Row, ...]:
    return tuple(row for row in rows if row["seed"] is None)


def _rows(file: Path) -> Sequence[Row]:
    """The rows of a file that a run need not have."""
    return read_table(file).to_pylist() if file.is_file() else []
