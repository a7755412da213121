"""The evidence of a probe as it was stored, read one layer at a time; no model is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lightleak import statistics as st
from lightleak.audits.probing_inputs import PIXELS, Condition, seed_of_repeat
from lightleak.errors import UserError
from lightleak.evidence.table import matrix
from lightleak.runs import Run, read_json, read_table
from lightleak.statistics import Probed
from lightleak.validity.probing import ProbingCutoffs

Cell = tuple[str, int, str]
"""Tower, layer and field."""

IMAGE = "image"
"""The field of a cell that no question touches."""


@dataclass(frozen=True)
class StoredProbe:
    """What was stored, read when it is asked for: one layer at a time."""

    run: Run
    seeds: tuple[int, ...]
    conditions: tuple[Condition, ...]
    layers: tuple[tuple[str, int], ...]
    questions: Mapping[int, pa.Table]
    about: Mapping[str, Any]
    settings: Mapping[str, Any]
    cutoffs: ProbingCutoffs

    @staticmethod
    def open(run: Run) -> StoredProbe:
        about = read_json(run.evidence / "probing.json")
        settings = run.manifest()["settings"]
        return StoredProbe(
            run,
            tuple(about["seeds"]),
            tuple(Condition(*each) for each in about["conditions"]),
            tuple((each["tower"], each["layer"]) for each in about["layers"]),
            {
                seed: read_table(run.evidence / f"questions-{seed}.parquet")
                for seed in about["seeds"]
            },
            about,
            settings,
            ProbingCutoffs(**settings["cutoffs"]),
        )

    @property
    def level(self) -> float:
        """The level of each test that Holm's correction leaves at the least."""
        tuned = [each for each in self.conditions if each.kind == "tuned"]
        return self.cutoffs.alpha / max(1, len(tuned))

    @property
    def pairs(self) -> int:
        """Of personas, in each repeat."""
        return len(pc.unique(self.questions[self.seeds[0]]["code"])) // 2

    @property
    def images(self) -> int:
        """Shown with seen personas, in each repeat."""
        asked = self.questions[self.seeds[0]]
        seen = pc.equal(pc.bit_wise_and(asked["code"], 1), 0)
        return int(pc.sum(pc.and_(asked["first"], seen)).as_py())

    def random(self, seed: int) -> int:
        """A seed of a repeat's own."""
        return seed_of_repeat(self.settings["seed"], seed)

    def cells(self, condition: Condition) -> Iterator[Cell]:
        """Where a condition is probed, in the order data flows."""
        if condition == PIXELS:
            yield "pixels", 0, IMAGE
            return
        fields = pc.unique(self.questions[self.seeds[0]]["field"]).to_pylist()
        for tower, layer in self.layers:
            for field in fields if tower == "language" else (IMAGE,):
                yield tower, layer, field

    def states(
        self, seed: int, condition: Condition, cell: Cell
    ) -> tuple[pa.Table, npt.NDArray[Any]]:
        """The questions of a cell and their states (n, d), in one order for all conditions.

        Raises:
            UserError: evidence is missing.
        """
        tower, layer, field = cell
        stage = "states" if tower == "language" else IMAGE
        column = f"{tower}.{layer}"
        table = self.parts(stage, seed, condition, ["id", column])
        asked = self.questions[seed]
        if tower == "language":
            asked = asked.filter(pc.equal(asked["field"], field))
        joined = asked.join(
            table.append_column("row", pa.array(np.arange(table.num_rows))).select(["id", "row"]),
            "id",
            join_type="inner",
        ).sort_by("id")
        return joined, matrix(table, column)[joined["row"].to_numpy()]

    def parts(
        self, stage: str, seed: int, condition: Condition, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """All parts of a stage as one table.

        Raises:
            UserError: there is none, or one is damaged.
        """
        pattern = f"{stage}-{seed}-{condition.stage}-[0-9]*.parquet"
        try:
            files = sorted(self.run.evidence.glob(pattern))
            return pa.concat_tables([read_table(file, columns=columns) for file in files])
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"evidence is missing or damaged ({pattern})",
                str(self.run.evidence),
                "Run the same probe again: it makes what is missing.",
            ) from error

    def probe(self, seed: int, condition: Condition) -> dict[Cell, Probed]:
        """Every cell of a condition, under all labellings."""
        flips = st.draw_flips(
            self.pairs,
            self.settings["permutations"],
            self.random(seed),
            listed=len(self.seeds) == 1,
        )
        found = {}
        for cell in self.cells(condition):
            asked, states = self.states(seed, condition, cell)
            try:
                found[cell] = st.probe(
                    states, asked["code"].to_numpy(), flips, seed=self.random(seed)
                )
            except ValueError as error:
                raise UserError(
                    f"{condition.name} cannot be probed ({error})",
                    str(self.run.folder),
                    "See the failures: every persona needs images that the model can read.",
                ) from error
        return found
