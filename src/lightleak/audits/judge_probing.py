"""The cheap half of a probe: from stored states to curves, tests and a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightleak import statistics as st
from lightleak.audits.gather_probing import Condition
from lightleak.errors import UserError
from lightleak.evidence.dynamics import ALL, ORIGINAL, Cosines
from lightleak.evidence.table import matrix
from lightleak.runs import Progress, Run, Silent, read_json, write_json, write_table
from lightleak.statistics import Estimate
from lightleak.statistics.probing import Probed, ProbingTest
from lightleak.validity.probing import (
    ConditionFinding,
    LayerFinding,
    LegibilityFinding,
    OutputFinding,
    ProbingCoverage,
    ProbingCutoffs,
    ProbingVerdict,
    TrendFinding,
    TurnFinding,
    UtilityFinding,
    decide_probing,
)

Floats = npt.NDArray[np.float64]
Cell = tuple[str, int, str]
"""Tower, layer and field."""

_IMAGE = "image"
_DIMENSIONS = 100
_PERPLEXITY = 30
# Intervals of one repeat are drawn, not decided on.
_RESAMPLES = 2000


def judge_probing(run: Run, progress: Progress | None = None) -> ProbingVerdict:
    """Judge a probe from its evidence; needs no model.

    Raises:
        UserError: evidence is missing or damaged, or too few personas could be read.
    """
    progress = progress or Silent()
    evidence = _Evidence.open(run)
    tests: dict[str, _Tested] = {}
    with progress.stage("Probing", len(evidence.conditions) * len(evidence.seeds)) as advance:
        base: list[dict[Cell, Probed]] | None = None
        for condition in evidence.conditions:
            probed = []
            for seed in evidence.seeds:
                probed.append(evidence.probe(seed, condition))
                advance(1)
            if condition.kind is None:
                base = probed
                continue
            own = condition.kind != "control" or condition.rate is not None
            tests[condition.name] = _Tested.of(
                condition, probed, base if own else None, evidence.cutoffs.alpha
            )
    with progress.stage("Drawing states in the plane", 1) as advance:
        write_table(run.projections_file, _projections(evidence))
        advance(1)
    write_table(run.probes_file, _probes(tests, evidence))
    outputs = _write_outputs(run, evidence)
    utility = _write_utility(run, evidence)
    turns, trends = _write_dynamics(run, evidence)
    failures = _failures(run)
    write_table(run.failures_file, failures)
    legible = _legibility(run, evidence.seeds)
    found = _findings(tests, evidence.cutoffs)
    settings = run.manifest()["settings"]
    verdict, tier, reasons = decide_probing(
        design="randomised" if settings["data"] else settings["design"],
        conditions=found,
        legibility=legible,
        cutoffs=evidence.cutoffs,
    )
    result = ProbingVerdict(
        verdict=verdict,
        tier=tier,
        reasons=reasons,
        conditions=found,
        legibility=legible,
        outputs=outputs,
        utility=utility,
        dynamics=turns,
        trends=trends,
        coverage=ProbingCoverage(
            personas=evidence.pairs,
            seeds=len(evidence.seeds),
            images=evidence.images,
            failed=failures.num_rows,
        ),
        cutoffs=evidence.cutoffs,
    )
    write_json(run.verdict_file, result.model_dump(mode="json"))
    return result


# -- evidence ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Evidence:
    """What was stored, read when it is asked for: one layer at a time."""

    run: Run
    seeds: tuple[int, ...]
    conditions: tuple[Condition, ...]
    layers: tuple[tuple[str, int], ...]
    questions: Mapping[int, pa.Table]
    settings: Mapping[str, Any]
    cutoffs: ProbingCutoffs

    @staticmethod
    def open(run: Run) -> _Evidence:
        about = read_json(run.evidence / "probing.json")
        settings = run.manifest()["settings"]
        return _Evidence(
            run,
            tuple(about["seeds"]),
            tuple(Condition(*each) for each in about["conditions"]),
            tuple((each["tower"], each["layer"]) for each in about["layers"]),
            {
                seed: pq.read_table(run.evidence / f"questions-{seed}.parquet")
                for seed in about["seeds"]
            },
            settings,
            ProbingCutoffs(**settings["cutoffs"]),
        )

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
        return int(self.settings["seed"]) + 1000 * seed

    def cells(self, condition: Condition) -> Iterator[Cell]:
        """Where a condition is probed, in the order data flows."""
        if condition.name == "pixels":
            yield "pixels", 0, _IMAGE
            return
        fields = pc.unique(self.questions[self.seeds[0]]["field"]).to_pylist()
        for tower, layer in self.layers:
            for field in fields if tower == "language" else (_IMAGE,):
                yield tower, layer, field

    def states(
        self, seed: int, condition: Condition, cell: Cell
    ) -> tuple[pa.Table, npt.NDArray[Any]]:
        """The questions of a cell and their states (n, d), in one order for all conditions.

        Raises:
            UserError: evidence is missing.
        """
        tower, layer, field = cell
        stage = "states" if tower == "language" else _IMAGE
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
            return pa.concat_tables([pq.read_table(file, columns=columns) for file in files])
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"evidence is missing or damaged ({pattern})",
                str(self.run.evidence),
                "Run the same probe again: it makes what is missing.",
            ) from error

    def probe(self, seed: int, condition: Condition) -> dict[Cell, Probed]:
        """Every cell of a condition, under all labellings."""
        flips = st.draw_flips(self.pairs, self.settings["permutations"], self.random(seed))
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


# -- probes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tested:
    """A condition over all repeats, and in each of them."""

    condition: Condition
    cells: tuple[Cell, ...]
    all: ProbingTest
    by_seed: tuple[ProbingTest, ...]

    @staticmethod
    def of(
        condition: Condition,
        probed: Sequence[Mapping[Cell, Probed]],
        base: Sequence[Mapping[Cell, Probed]] | None,
        alpha: float,
    ) -> _Tested:
        runs = [list(each.values()) for each in probed]
        of_base = None if base is None else [list(each.values()) for each in base]
        return _Tested(
            condition,
            tuple(probed[0]),
            st.probing_test(runs, of_base, seed=0, alpha=alpha),
            tuple(
                st.probing_test(
                    [run],
                    None if of_base is None else [of_base[i]],
                    seed=0,
                    alpha=alpha,
                    resamples=_RESAMPLES,
                )
                for i, run in enumerate(runs)
            ),
        )


def _probes(tests: Mapping[str, _Tested], evidence: _Evidence) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for name, tested in tests.items():
        published = _published(tested, evidence)
        for seed, test in ((None, tested.all), *zip(evidence.seeds, tested.by_seed, strict=True)):
            for (tower, layer, field), cell in zip(tested.cells, test.cells, strict=True):
                said = published[seed, (tower, layer, field)]
                base = cell.base_accuracy
                rows.append(
                    {
                        "seed": seed,
                        "condition": name,
                        "rate": tested.condition.rate,
                        "tower": tower,
                        "layer": layer,
                        "field": field,
                        "accuracy": cell.accuracy.value,
                        "low": cell.accuracy.low,
                        "high": cell.accuracy.high,
                        "base_accuracy": None if base is None else base.value,
                        "delta": cell.delta.value,
                        "delta_low": cell.delta.low,
                        "delta_high": cell.delta.high,
                        "control_accuracy": cell.chance,
                        "selectivity": cell.selectivity.value,
                        "p_value": cell.p_value if seed is None else None,
                        "published_accuracy": said.value,
                        "published_low": said.low,
                        "published_high": said.high,
                    }
                )
    return pa.Table.from_pylist(rows, schema=_PROBES)


_PROBES = pa.schema(
    {
        "seed": pa.int64(),
        "condition": pa.string(),
        "rate": pa.float64(),
        "tower": pa.string(),
        "layer": pa.int64(),
        "field": pa.string(),
        **dict.fromkeys(
            (
                *("accuracy", "low", "high", "base_accuracy", "delta", "delta_low", "delta_high"),
                *("control_accuracy", "selectivity", "p_value"),
                *("published_accuracy", "published_low", "published_high"),
            ),
            pa.float64(),
        ),
    }
)


def _published(tested: _Tested, evidence: _Evidence) -> dict[tuple[int | None, Cell], Estimate]:
    """What the published design says: in each repeat, and over all of them."""
    found: dict[tuple[int | None, Cell], Estimate] = {}
    for cell in tested.cells:
        right = of = 0
        for seed in evidence.seeds:
            asked, states = evidence.states(seed, tested.condition, cell)
            seen = asked["code"].to_numpy() % 2 == 0
            said = st.published_probe(states, seen, seed=evidence.random(seed))
            found[seed, cell] = said
            tested_on = -(-len(seen) // 5)
            right, of = right + round(said.value * tested_on), of + tested_on
        found[None, cell] = st.clopper_pearson(right, of)
    return found


def _findings(tests: Mapping[str, _Tested], cutoffs: ProbingCutoffs) -> list[ConditionFinding]:
    tuned = [name for name, each in tests.items() if each.condition.kind == "tuned"]
    adjusted = dict(
        zip(tuned, st.holm([tests[name].all.p_value for name in tuned]).tolist(), strict=True)
        if tuned
        else ()
    )
    return [_finding(name, each, adjusted.get(name), cutoffs) for name, each in tests.items()]


def _finding(
    name: str, tested: _Tested, holm: float | None, cutoffs: ProbingCutoffs
) -> ConditionFinding:
    order = sorted(
        range(len(tested.cells)),
        key=lambda i: (tested.all.cells[i].p_value, -tested.all.cells[i].delta.value),
    )
    cell, (tower, layer, field) = tested.all.cells[order[0]], tested.cells[order[0]]
    base = cell.base_accuracy
    condition = tested.condition
    reached = [each.detectable for each in tested.all.cells if np.isfinite(each.detectable)]
    p_value = tested.all.p_value if holm is None else holm
    told = (
        f"{condition.name}: personas seen in training are told from unseen ones"
        if p_value <= (cutoffs.control_alarm if condition.kind == "control" else cutoffs.alpha)
        else f"{condition.name}: personas seen in training are not told from unseen ones"
    )
    where = "the pixels" if tower == "pixels" else f"{tower} layer {layer}"
    asked = "" if field == _IMAGE else f", asked for the {field.replace('_', ' ')}"
    return ConditionFinding(
        name=name,
        kind=condition.kind or "control",
        rate=condition.rate,
        p_value=tested.all.p_value,
        p_value_holm=holm,
        best=LayerFinding(
            tower=tower,
            layer=layer,
            field=field,
            accuracy=cell.accuracy.value,
            ci95=(cell.accuracy.low, cell.accuracy.high),
            base_accuracy=None if base is None else base.value,
            delta=cell.delta.value,
            delta_ci95=(cell.delta.low, cell.delta.high),
            selectivity=cell.selectivity.value,
            p_value=cell.p_value,
        ),
        cells=len(tested.cells),
        # A cell whose states never change can find nothing, and says nothing of the others.
        detectable=min(1.0, float(np.median(reached))) if reached else 1.0,
        sentence=(
            f"{told[:1].upper()}{told[1:]} (p = {p_value:.2g}). The surest difference, at {where}"
            f"{asked}: {100 * cell.accuracy.value:.0f} % right, "
            + (
                f"{100 * base.value:.0f} % before fine-tuning."
                if base is not None
                else "50 % by chance."
            )
        ),
    )


# -- what the answers show, and how well the task is done ------------------------------------------


def _answering(evidence: _Evidence) -> list[Condition]:
    return [each for each in evidence.conditions if each.name not in ("random weights", "pixels")]


def _write_outputs(run: Run, evidence: _Evidence) -> list[OutputFinding]:
    rows: list[dict[str, Any]] = []
    for condition in _answering(evidence):
        tables = {seed: _answers(evidence, seed, condition) for seed in evidence.seeds}
        for seed in (None, *evidence.seeds):
            own = list(tables.values()) if seed is None else [tables[seed]]
            for pool in ("seen", "unseen"):
                of_pool = [t.filter(pc.equal(t["pool"], pool)) for t in own]
                fields = pc.unique(of_pool[0]["field"]).to_pylist()
                for field in (ALL, *fields):
                    chosen = [
                        t if field == ALL else t.filter(pc.equal(t["field"], field))
                        for t in of_pool
                    ]
                    exact, preference = (
                        _share([_by_persona(t, column) for t in chosen])
                        for column in ("exact", "preferred")
                    )
                    rows.append(
                        {
                            "seed": seed,
                            "condition": condition.name,
                            "rate": condition.rate,
                            "pool": pool,
                            "field": field,
                            **_columns("exact", exact),
                            **_columns("preference", preference),
                        }
                    )
    write_table(run.output_view_file, pa.Table.from_pylist(rows))
    return [
        OutputFinding(
            condition=row["condition"],
            pool=row["pool"],
            exact=row["exact"],
            exact_ci95=(row["exact_low"], row["exact_high"]),
            preference=row["preference"],
            preference_ci95=(row["preference_low"], row["preference_high"]),
        )
        for row in rows
        if row["seed"] is None and row["field"] == ALL
    ]


def _answers(evidence: _Evidence, seed: int, condition: Condition) -> pa.Table:
    """Each question with whether it is answered exactly, and whether its own value is preferred."""
    own = evidence.parts("states", seed, condition, ["id", "exact", "logprob"])
    foils = evidence.parts("foils", seed, condition).rename_columns(["id", "foil"])
    joined = evidence.questions[seed].join(own, "id", join_type="inner").join(foils, "id")
    apart = joined["logprob"].to_numpy() - joined["foil"].to_numpy()
    preferred = np.where(np.isnan(apart), np.nan, (1 + np.sign(apart)) / 2)
    pools = np.where(joined["code"].to_numpy() % 2 == 0, "seen", "unseen")
    return joined.append_column("preferred", pa.array(preferred)).append_column(
        "pool", pa.array(pools.tolist())
    )


def _by_persona(table: pa.Table, column: str) -> Floats:
    """The mean of each persona; NaN is left out."""
    values = table[column].cast(pa.float64()).to_numpy()
    personas = np.unique(table["persona"].to_numpy(zero_copy_only=False), return_inverse=True)[1]
    known = ~np.isnan(values)
    counts = np.bincount(personas[known], minlength=personas.max() + 1)
    sums = np.bincount(personas[known], weights=values[known], minlength=len(counts))
    return np.asarray((sums / np.where(counts, counts, np.nan))[counts > 0], dtype=np.float64)


def _share(by_unit: Sequence[Floats]) -> Estimate:
    """A mean share over personas, which are the unit of the interval."""
    values = np.concatenate(by_unit)
    if np.ptp(values) == 0 and values[0] in (0.0, 1.0):
        return st.clopper_pearson(int(values.sum()), len(values))
    found = st.mean_over_batches(values, seed=0)
    return Estimate(float(found.value), float(found.low), float(found.high))


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _write_utility(run: Run, evidence: _Evidence) -> list[UtilityFinding]:
    if evidence.settings["data"] is None:
        return []
    exact: dict[str, dict[int, dict[str, float]]] = {}
    for condition in _answering(evidence):
        exact[condition.name] = {}
        for each in evidence.seeds:
            table = evidence.parts("utility", each, condition)
            values = table["exact"].cast(pa.float64()).to_pylist()
            exact[condition.name][each] = dict(zip(table["id"].to_pylist(), values, strict=True))
    rows: list[dict[str, Any]] = []
    for condition in _answering(evidence):
        for seed in (None, *evidence.seeds):
            seeds = evidence.seeds if seed is None else (seed,)
            ids = sorted(set.intersection(*(set(exact["base"][s]) for s in seeds)))
            own = exact[condition.name]
            ids = [key for key in ids if all(key in own[s] for s in seeds)]
            after = np.array([np.mean([own[s][key] for s in seeds]) for key in ids])
            before = np.array([np.mean([exact["base"][s][key] for s in seeds]) for key in ids])
            base = condition.kind is None
            rows.append(
                {
                    "seed": seed,
                    "condition": condition.name,
                    "rate": condition.rate,
                    **_columns("accuracy", _share([after])),
                    **(
                        dict.fromkeys(("difference", "difference_low", "difference_high"))
                        if base
                        else _columns("difference", _share([after - before]))
                    ),
                }
            )
    write_table(run.utility_file, pa.Table.from_pylist(rows))
    return [
        UtilityFinding(
            condition=row["condition"],
            accuracy=row["accuracy"],
            ci95=(row["accuracy_low"], row["accuracy_high"]),
            difference=row["difference"] or 0.0,
            difference_ci95=(row["difference_low"] or 0.0, row["difference_high"] or 0.0),
        )
        for row in rows
        if row["seed"] is None
    ]


# -- gradients ---------------------------------------------------------------------------------


def _write_dynamics(run: Run, evidence: _Evidence) -> tuple[list[TurnFinding], list[TrendFinding]]:
    if evidence.settings["data"] is None or not evidence.settings["batches"]:
        return [], []
    base = evidence.conditions[0]
    found = [Cosines.of(evidence.parts("dynamics", seed, base)) for seed in evidence.seeds]
    first = found[0]
    turned = [name for name in first.comparisons if name != ORIGINAL]
    again = first.comparisons.index(ORIGINAL)
    pairs = [(first.comparisons.index(name), again) for name in turned]
    rows = []
    of_seed = {s: each.values for s, each in zip(evidence.seeds, found, strict=True)}
    of_all = np.concatenate(list(of_seed.values()))
    both: list[tuple[int | None, Any]] = [(None, of_all), *of_seed.items()]
    for seed, values in both:
        means = st.batch_dynamics(values, first.sizes, pairs, seed=0)
        if seed is None:
            trends = means.trends
        for i, size in enumerate(first.sizes):
            for j, comparison in enumerate(first.comparisons):
                for k, layer in enumerate(first.layers):
                    at = means.cosines.value[i, j, k]
                    low, high = means.cosines.low[i, j, k], means.cosines.high[i, j, k]
                    rows.append(
                        {
                            "seed": seed,
                            "batch_size": size,
                            "comparison": comparison,
                            "layer": layer,
                            "cosine": None if np.isnan(at) else float(at),
                            "low": None if np.isnan(low) else float(low),
                            "high": None if np.isnan(high) else float(high),
                        }
                    )
    write_table(run.dynamics_file, pa.Table.from_pylist(rows))
    every = first.layers.index(ALL)
    return (
        [
            TurnFinding(
                batch_size=row["batch_size"],
                comparison=row["comparison"],
                cosine=row["cosine"],
                ci95=(row["low"], row["high"]),
            )
            for row in rows
            if row["seed"] is None and row["layer"] == ALL and row["cosine"] is not None
        ],
        [
            TrendFinding(
                comparison=name,
                slope=float(trends.value[j, every]),
                ci95=(float(trends.low[j, every]), float(trends.high[j, every])),
            )
            for j, name in enumerate(turned)
        ],
    )


# -- pictures, failures, legibility ----------------------------------------------------------------


def _projections(evidence: _Evidence) -> pa.Table:
    """The last layer's states in the plane, of the first repeat, under the first question."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    seed, rows = evidence.seeds[0], []
    for condition in _answering(evidence):
        cell = list(evidence.cells(condition))[-1]
        tower, layer, _ = cell
        first = next(one for one in evidence.cells(condition) if one[:2] == (tower, layer))
        asked, states = evidence.states(seed, condition, first)
        reduced = PCA(min(_DIMENSIONS, *states.shape), random_state=0).fit_transform(states)
        perplexity = min(_PERPLEXITY, (len(states) - 1) / 3)
        planes = {
            "pca": reduced[:, :2],
            "tsne": TSNE(perplexity=perplexity, random_state=0, init="pca").fit_transform(reduced),
        }
        rows += [
            {
                "condition": condition.name,
                "tower": tower,
                "layer": layer,
                "field": first[2],
                "method": method,
                "persona": persona,
                "seen": code % 2 == 0,
                "x": float(x),
                "y": float(y),
            }
            for method, plane in planes.items()
            for persona, code, (x, y) in zip(
                asked["persona"].to_pylist(), asked["code"].to_pylist(), plane, strict=True
            )
        ]
    return pa.Table.from_pylist(rows)


def _failures(run: Run) -> pa.Table:
    files = sorted(run.evidence.glob("failed-*.parquet"))
    table = pa.concat_tables([pq.read_table(file) for file in files])
    return table.group_by(table.column_names).aggregate([])


def _legibility(run: Run, seeds: Sequence[int]) -> LegibilityFinding | None:
    files = [run.evidence / f"legibility-{seed}.json" for seed in seeds]
    found = [read_json(file) for file in files if file.is_file()]
    if not found:
        return None
    named = st.clopper_pearson(sum(f["named"] for f in found), sum(f["of"] for f in found))
    return LegibilityFinding(
        accuracy=named.value,
        ci95=(named.low, named.high),
        chance=found[0]["chance"],
        line_height=float(np.mean([f["line_height"] for f in found])),
    )
