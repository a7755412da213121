"""The cheap half of a probe: from stored states to curves, tests and a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lightleak import statistics as st
from lightleak.audits.probing_inputs import Condition
from lightleak.audits.probing_views import (
    projections,
    write_dynamics,
    write_outputs,
    write_utility,
)
from lightleak.audits.stored_probe import IMAGE, Cell, StoredProbe
from lightleak.runs import Progress, Run, Silent, read_json, read_table, write_json, write_table
from lightleak.statistics import Estimate
from lightleak.statistics.probing import Probed, ProbingTest
from lightleak.validity.probing import (
    ConditionFinding,
    LayerFinding,
    LegibilityFinding,
    ProbingCoverage,
    ProbingCutoffs,
    ProbingVerdict,
    decide_probing,
)

# Intervals of one repeat are drawn, not decided on.
_RESAMPLES = 2000


def judge_probing(run: Run, progress: Progress | None = None) -> ProbingVerdict:
    """Judge a probe from its evidence; needs no model.

    Raises:
        UserError: evidence is missing or damaged, or too few personas could be read.
    """
    progress = progress or Silent()
    evidence = StoredProbe.open(run)
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
                condition, probed, base if own else None, evidence.level
            )
    with progress.stage("Drawing states in the plane", 1) as advance:
        write_table(run.projections_file, projections(evidence))
        advance(1)
    write_table(run.probes_file, _probes(tests, evidence))
    outputs = write_outputs(run, evidence)
    utility = write_utility(run, evidence)
    turns, trends = write_dynamics(run, evidence)
    failures = _failures(run)
    write_table(run.failures_file, failures)
    legible = _legibility(run, evidence.seeds)
    found = _findings(tests, evidence.cutoffs)
    verdict, tier, reasons = decide_probing(
        design=evidence.settings["design"],
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
            images_wanted=evidence.about.get("images_wanted"),
            records_trained_on=evidence.about.get("records_trained_on"),
            records_of_the_task=evidence.about.get("records_of_the_task"),
            failed=failures.num_rows,
        ),
        cutoffs=evidence.cutoffs,
    )
    write_json(run.verdict_file, result.model_dump(mode="json"))
    return result


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


def _probes(tests: Mapping[str, _Tested], evidence: StoredProbe) -> pa.Table:
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


def _published(tested: _Tested, evidence: StoredProbe) -> dict[tuple[int | None, Cell], Estimate]:
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
    asked = "" if field == IMAGE else f", asked for the {field.replace('_', ' ')}"
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


def _failures(run: Run) -> pa.Table:
    files = sorted(run.evidence.glob("failed-*.parquet"))
    table = pa.concat_tables([read_table(file) for file in files])
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
