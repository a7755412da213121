"""What a probe shows beside its test: answers, utility, gradients, pictures. None of it decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lightleak import statistics as st
from lightleak.audits.probing_inputs import PIXELS, RANDOM, Condition
from lightleak.audits.stored_probe import StoredProbe
from lightleak.evidence.dynamics import ALL, ORIGINAL, Cosines
from lightleak.runs import Run, write_table
from lightleak.statistics import Estimate
from lightleak.validity.probing import OutputFinding, TrendFinding, TurnFinding, UtilityFinding

Floats = npt.NDArray[np.float64]

_DIMENSIONS = 100
_PERPLEXITY = 30
# Drawn evenly; t-SNE compares all with all: its shortcut takes minutes where points coincide.
_MOST_DRAWN = 1000


def _answering(evidence: StoredProbe) -> list[Condition]:
    return [each for each in evidence.conditions if each not in (RANDOM, PIXELS)]


def write_outputs(run: Run, evidence: StoredProbe) -> list[OutputFinding]:
    """What the answers show, by condition, pool and field; those to all fields together."""
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
                    # Where all have one value there is none to prefer it to.
                    if all(t["preferred"].null_count == t.num_rows for t in chosen):
                        continue
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
    write_table(run.output_view_file, pa.Table.from_pylist(rows, schema=_ANSWERS))
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


_ANSWERS = pa.schema(
    {
        "seed": pa.int64(),
        "condition": pa.string(),
        "rate": pa.float64(),
        "pool": pa.string(),
        "field": pa.string(),
        **{
            f"{name}{end}": pa.float64()
            for name in ("exact", "preference")
            for end in ("", "_low", "_high")
        },
    }
)


def _answers(evidence: StoredProbe, seed: int, condition: Condition) -> pa.Table:
    """Each question with whether it is answered exactly, and whether its own value is preferred."""
    own = evidence.parts("states", seed, condition, ["id", "exact", "logprob"])
    foils = evidence.parts("foils", seed, condition).rename_columns(["id", "foil"])
    joined = evidence.questions[seed].join(own, "id", join_type="inner").join(foils, "id")
    apart = joined["logprob"].to_numpy() - joined["foil"].to_numpy()
    preferred = np.where(np.isnan(apart), np.nan, (1 + np.sign(apart)) / 2)
    pools = np.where(joined["code"].to_numpy() % 2 == 0, "seen", "unseen")
    return joined.append_column("preferred", pa.array(preferred, from_pandas=True)).append_column(
        "pool", pa.array(pools.tolist())
    )


def _by_persona(table: pa.Table, column: str) -> Floats:
    """The mean of each persona; NaN is left out."""
    values = table[column].cast(pa.float64()).fill_null(float("nan")).to_numpy()
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


def _difference(by_record: Floats) -> Estimate:
    """A mean difference of shares; where no record differs, the truth may lie on either side."""
    found = _share([by_record])
    if not by_record.any():
        return Estimate(0.0, -found.high, found.high)
    return found


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def write_utility(run: Run, evidence: StoredProbe) -> list[UtilityFinding]:
    """How well the task is done, by condition; nothing of a model somebody else fine-tuned."""
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
                        else _columns("difference", _difference(after - before))
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


def write_dynamics(run: Run, evidence: StoredProbe) -> tuple[list[TurnFinding], list[TrendFinding]]:
    """How far the base's gradients are turned, by batch size, and how that changes with it."""
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


# -- pictures ----------------------------------------------------------------------------------


def projections(evidence: StoredProbe) -> pa.Table:
    """The last layer's states in the plane, of the first repeat, under the first question."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    seed, rows = evidence.seeds[0], []
    for condition in _answering(evidence):
        cell = list(evidence.cells(condition))[-1]
        tower, layer, _ = cell
        first = next(one for one in evidence.cells(condition) if one[:2] == (tower, layer))
        asked, states = evidence.states(seed, condition, first)
        shown = np.linspace(0, len(states) - 1, min(_MOST_DRAWN, len(states))).astype(np.int64)
        asked, states = asked.take(shown), states[shown]
        reduced = PCA(min(_DIMENSIONS, *states.shape), random_state=0).fit_transform(states)
        perplexity = min(_PERPLEXITY, (len(states) - 1) / 3)
        planes = {
            "pca": reduced[:, :2],
            "tsne": TSNE(
                perplexity=perplexity, random_state=0, init="pca", method="exact"
            ).fit_transform(reduced),
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
