"""Negative controls that need a model: the same records through one that cannot have seen them,
and pairs whose texts were shuffled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lightleak import signals
from lightleak.audits.measure import measure
from lightleak.audits.models import Model, describe_other
from lightleak.audits.passes import Pass
from lightleak.audits.sides import Sides, failures_table
from lightleak.records import Failure
from lightleak.runs import Progress, Run, write_json, write_table
from lightleak.runs.executors import Executor

# Which control models a run was to ask: judging without one that is missing would hide it.
PLANNED = "controls.json"


def plan_controls(run: Run, models: Mapping[str, str]) -> None:
    """Write down which control models there will be, before anything is measured."""
    write_json(run.evidence / PLANNED, {"models": list(models)})


def gather_shuffled(
    run: Run, of: Pass, sides: Sides, progress: Progress, executor: Executor, name: str
) -> None:
    """Take every image through the model with the text of another record of its side.

    Only for signals that are neither fitted (a fit on wrong pairs is another signal) nor compare
    models (the others were not asked about wrong pairs) nor ask for answers (which cost most).

    Args:
        run: the run.
        of: the pass with the right texts.
        sides: the records.
        progress: shows how far it is.
        executor: does the jobs.
        name: what the control model is called; "" for the target.
    """
    settings = of.settings.only([of.settings.primary])
    if signals.get(settings.primary).fitted or settings.across or settings.asks:
        return
    mixed = shuffled(sides, settings.seed)
    if not len(mixed.records):
        return
    folder = run.evidence / shuffled_folder(name)
    folder.mkdir(exist_ok=True)
    left_out = {r.id for r in sides.records} - {r.id for r in mixed.records}
    why = "no other record of its side has another text"
    failures = [Failure(key, "shuffle", why) for key in sorted(left_out)]
    write_table(folder / "failed-left-out.parquet", failures_table(failures))
    what = "texts shuffled" if name == "" else f"the {name}, texts shuffled"
    again = replace(of, folder=folder, settings=settings, of=what)
    measure(again, mixed, progress, executor)


def shuffled_folder(name: str) -> str:
    """Where the evidence of shuffled pairs lies: of the target ("") or of a control model."""
    return f"{name} shuffled".strip().replace(" ", "-")


def gather_control_models(
    run: Run,
    target: Pass,
    models: Mapping[str, str],
    sides: Sides,
    progress: Progress,
    executor: Executor,
) -> None:
    """Take every record through each model that cannot have seen the suspects.

    Raises:
        UserError: a control model cannot be loaded, is of another kind, or is the target.
    """
    chosen = target.settings
    settings = chosen.only([chosen.primary, *chosen.across])
    for name, where in models.items():
        model = Model(settings, where)
        other = describe_other(target.description, name, model, progress, executor)
        folder = run.evidence / name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        of = Pass(folder, settings, model, other, f"the {name}")
        measure(of, sides, progress, executor)
        if name == "base":
            gather_shuffled(run, of, sides, progress, executor, name)


def shuffled(sides: Sides, seed: int) -> Sides:
    """Each audited image with prompt and text of another record of the same side.

    Records are put in random order with equal texts together and partnered half a side away, so
    that only a text which more than half of the side share meets itself; such a record is left out.
    """
    random = np.random.default_rng([seed, 4])
    kept: list[int] = []
    records = list(sides.records)
    for side in ("suspect", "control"):
        places = random.permutation(np.flatnonzero(sides.side == side))
        by_text: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
        for place in places:
            record = sides.records[place]
            by_text[record.prompt, record.text].append(int(place))
        ordered = [place for alike in by_text.values() for place in alike]
        away = len(ordered) // 2
        for i, place in enumerate(ordered):
            partner = sides.records[ordered[(i + away) % len(ordered)]]
            own = sides.records[place]
            if (partner.prompt, partner.text) != (own.prompt, own.text):
                records[place] = replace(own, prompt=partner.prompt, text=partner.text)
                kept.append(place)
    chosen = sorted(kept)
    return replace(
        sides,
        records=tuple(records[i] for i in chosen),
        side=sides.side[chosen],
        folds=sides.folds[chosen],
    )
