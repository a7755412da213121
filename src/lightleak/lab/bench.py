"""The leaderboard: every signal on targets whose truth is known."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from lightleak import signals as registry
from lightleak import statistics as st
from lightleak.audits.membership import audit
from lightleak.audits.reference_training import train_references
from lightleak.errors import UserError
from lightleak.evidence.readings import ACROSS, EXTRA, OtherLosses, ReferenceLosses
from lightleak.lab.captions import TUNED
from lightleak.lab.recipes import LabTarget, build, kind_of
from lightleak.runs import (
    Advance,
    Progress,
    Run,
    Silent,
    read_json,
    read_table,
    replacing,
    write_json,
)

RECIPES = ("captions-tiny", "captions-lora", "captions-full", "pairs-clip")
ALPHA, POWER = 0.01, 0.9
# Stages of an audit in which records go through a model, or their gradients are compared.
_TIMED = (
    "Measuring",
    "Reference gradient",
    "Scoring the kept slices",
    "Gradients,",
    "Each record against each",
)


@dataclass(frozen=True)
class BenchRow:
    """One signal on one target.

    Attributes:
        references: how many it compared with.
        auc, auc_low, auc_high: with its 95 % interval; None where too few records were scored.
            Scores of a signal that was fitted on other folds share no scale and are compared
            within a fold only, here and in the rates.
        tpr_at_1_percent, tpr_at_5_percent: conservative; None with too few non-members.
        set_size: suspects, and as many controls, with which a one-sided Mann–Whitney test at a
            level of 1 % finds such an AUC with a probability of 90 %; None where it is at most ½.
        seconds_per_record: of the passes that the signal's evidence takes, at all models, without
            the references' training; None where the run was interrupted.
    """

    recipe: str
    seed: int
    signal: str
    references: int
    auc: float | None
    auc_low: float | None
    auc_high: float | None
    tpr_at_1_percent: float | None
    tpr_at_5_percent: float | None
    set_size: int | None
    seconds_per_record: float | None


_NUMBERS = [field.name for field in fields(BenchRow)][4:]


@dataclass(frozen=True)
class _Asked:
    """An audit: the signals that one kind of evidence serves, with or without references."""

    needs: type
    signals: list[str]
    references: int = 0

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.needs.__name__ + (f"-{self.references}" if self.references else "")


def bench(
    out: str | Path,
    *,
    recipes: Sequence[str] = RECIPES,
    seeds: Sequence[int] = range(5),
    signals: Sequence[str] = (),
    members: int | None = None,
    nonmembers: int | None = None,
    epochs: int | None = None,
    references: int = 0,
    workers: int | None = 1,
    progress: Progress | None = None,
) -> list[BenchRow]:
    """Build every recipe with every seed, audit it by every signal, and hold it to the truth.

    There is one audit for each kind of evidence, so that its time is known; all signals that are
    made from it are scored. What is finished is not done again. Writes `bench.csv` and
    `bench.json`.

    Args:
        out: folder for targets, runs and results.
        recipes: see `lab.build`; those that are audited record by record.
        seeds: one target each.
        signals: names; none stands for all that take no forwards of their own. Each recipe is
            measured by those that fit its kind of target.
        members, nonmembers, epochs: of each target, else the recipe's own.
        references: how many are trained, as the target was, for signals that compare with them;
            of recipes whose target was tuned from a base.
        workers: processes of an audit.
        progress: shows how far it is.

    Returns:
        A row a recipe, seed and signal.

    Raises:
        UserError: an unknown recipe or signal, or a folder that holds something else.
    """
    folder, progress = Path(out), progress or Silent()
    plans = {
        recipe: _audits(kind_of(recipe), signals, tuned=recipe in TUNED, references=references)
        for recipe in recipes
    }
    for name in signals:
        if not any(name in asked.signals for plan in plans.values() for asked in plan):
            raise UserError(
                "no target here can be measured by it",
                name,
                f"Choose recipes of its kind; of those with a base ({', '.join(TUNED)}) one that "
                "compares models, with --references where it takes them.",
            )
    rows = []
    for recipe, plan in plans.items():
        for seed in seeds:
            place = folder / f"{recipe}-{seed}"
            made = build(
                recipe,
                place / "lab",
                seed=seed,
                members=members,
                nonmembers=nonmembers,
                epochs=epochs,
                progress=progress,
            )
            for asked in plan:
                found = _measured(made, place, asked, workers, progress)
                rows += [
                    BenchRow(recipe, seed, references=asked.references, **row)
                    for row in found
                    if not signals or row["signal"] in signals
                ]
    _write(folder, rows)
    return rows


def _audits(kind: str, wanted: Sequence[str], *, tuned: bool, references: int) -> list[_Asked]:
    """One for each kind of evidence that a kind of target has signals for.

    All signals of a kind of evidence stand together even if one of them is wanted, so that a run
    serves whoever wants another one later. A target that was not tuned from a base has nothing to
    be compared with.
    """
    for name in wanted:
        registry.get(name)
    plan = defaultdict(list)
    for name in registry.names(kind):
        plan[registry.get(name).needs].append(name)
    chosen = {
        needs: names
        for needs, names in plan.items()
        if (set(names) & set(wanted) if wanted else needs not in EXTRA)
    }
    alone = {ReferenceLosses} if tuned else {ReferenceLosses, OtherLosses}
    without = [_Asked(needs, names) for needs, names in chosen.items() if needs not in alone]
    return without + [
        _Asked(needs, names, references)
        for needs, names in chosen.items()
        if tuned and references and needs in ACROSS
    ]


def _measured(
    made: LabTarget, place: Path, asked: _Asked, workers: int | None, progress: Progress
) -> list[dict[str, Any]]:
    """Rows of an audit by some signals, made unless they are there."""
    run, names = place / asked.name, asked.signals
    file = place / f"{asked.name}.json"
    if file.is_file():
        stored = read_json(file)
        if stored["signals"] == names:
            return list(stored["rows"])
        shutil.rmtree(run)  # There is a signal that was not there then.
    if asked.references:
        _train(made, place / "references", asked.references, workers, progress)
    clock = None if run.is_dir() else _Clock(progress)
    audit(
        target=made.target,
        adapter=made.adapter,
        base=made.base if made.adapter is None else None,
        references=place / "references" if asked.references else None,
        suspect=made.members,
        control=made.nonmembers,
        out=run,
        signals=tuple(names),
        primary=names[0],
        design="randomised",
        negative_controls=False,
        workers=workers,
        progress=clock or progress,
        command="lightleak lab bench",
    )
    scores = read_table(Run(run).scores_file).to_pylist()
    seconds = clock and clock.seconds / len({(row["set"], row["id"]) for row in scores})
    rows = [
        _row(name, [row for row in scores if row["signal"] == name])
        | {"seconds_per_record": seconds}
        for name in names
    ]
    write_json(file, {"signals": names, "rows": rows})
    return rows


def _train(made: LabTarget, out: Path, count: int, workers: int | None, progress: Progress) -> None:
    """References of the target's own recipe, each on half of members and non-members together."""
    assert made.base is not None
    how = json.loads(made.truth.read_text(encoding="utf-8"))["settings"]
    rate, batch = TUNED[how["recipe"]]
    train_references(
        base=made.base,
        suspect=made.members,
        control=made.nonmembers,
        out=out,
        count=count,
        epochs=how["epochs"],
        train_batch=batch,
        learning_rate=rate,
        weight_decay=0.01,
        warmup=0.0,
        workers=workers,
        progress=progress,
        **({"like": made.adapter} if made.adapter else {"method": "full", "vision": True}),
    )


def _row(name: str, scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One signal by its scores and the truth."""
    scored = [row for row in scores if row["score"] is not None]
    values = np.array([row["score"] for row in scored], float)
    member = np.array([row["set"] == "suspect" for row in scored], bool)
    fold = np.array([row["fold"] if registry.get(name).fitted else 0 for row in scored], int)
    sides = [(member & (fold == k), ~member & (fold == k)) for k in np.unique(fold)]
    row: dict[str, Any] = dict.fromkeys(_NUMBERS) | {"signal": name}
    if not sides or not all(side.any() for both in sides for side in both):
        return row
    area = st.auc_across_folds(values[member], values[~member], fold[member], fold[~member])
    row |= {"auc": area.value, "auc_low": area.low, "auc_high": area.high}
    for percent in (1, 5):
        points = [st.tpr_at_fpr(values[m], values[n], percent / 100) for m, n in sides]
        found = [point.tpr.value for point in points if isinstance(point, st.RocPoint)]
        if len(found) == len(points):
            row[f"tpr_at_{percent}_percent"] = float(np.mean(found))
    if area.value > 0.5:
        row["set_size"] = st.minimum_set_size(area.value, alpha=ALPHA, power=POWER)
    return row


class _Clock:
    """Shows stages as another does, and adds up how long records were in the model."""

    def __init__(self, shown: Progress) -> None:
        self._shown, self.seconds = shown, 0.0
        self.note = shown.note

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        started = time.monotonic()
        with self._shown.stage(name, total) as advance:
            yield advance
        if name.startswith(_TIMED):
            self.seconds += time.monotonic() - started


def _write(folder: Path, rows: Sequence[BenchRow]) -> None:
    write_json(folder / "bench.json", {"rows": [asdict(row) for row in rows]})
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(BenchRow)])
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    with replacing(folder / "bench.csv") as stream:
        stream.write(text.getvalue().encode())
