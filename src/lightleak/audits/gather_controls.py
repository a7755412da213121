"""Negative controls that need a model: the same records through one that cannot have seen them,
and pairs whose texts were shuffled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lightleak import signals
from lightleak.audits.measure import measure
from lightleak.audits.settings import AuditSettings, no_control
from lightleak.audits.sides import Sides, failures_table
from lightleak.errors import UserError
from lightleak.records import Failure
from lightleak.runs import Progress, Run, write_json, write_table
from lightleak.targets import Target

# Which control models a run was to ask: judging without one that is missing would hide it.
PLANNED = "controls.json"


def plan_controls(run: Run, models: Mapping[str, str]) -> None:
    """Write down which control models there will be, before anything is measured."""
    write_json(run.evidence / PLANNED, {"models": list(models)})


def gather_shuffled(
    run: Run, settings: AuditSettings, target: Target, sides: Sides, progress: Progress, name: str
) -> None:
    """Take every image through the model with the text of another record of its side.

    Only for signals that are not fitted: a fit on wrong pairs is another signal.
    """
    if signals.get(settings.primary).fitted:
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
    of = "texts shuffled" if name == "" else f"the {name}, texts shuffled"
    measure(folder, settings.for_controls(), target, mixed, progress, of=of)


def shuffled_folder(name: str) -> str:
    """Where the evidence of shuffled pairs lies: of the target ("") or of a control model."""
    return f"{name} shuffled".strip().replace(" ", "-")


def gather_control_models(
    run: Run,
    settings: AuditSettings,
    models: Mapping[str, str],
    sides: Sides,
    target_hashes: Mapping[str, str],
    kind: str,
    progress: Progress,
) -> None:
    """Take every record through each model that cannot have seen the suspects.

    Raises:
        UserError: a control model cannot be loaded, is of another kind, or is the target.
    """
    for name, model in models.items():
        with progress.stage(f"Loading the {name}", 1) as advance:
            other = settings.load(model)
            advance(1)
        if other.kind != kind:
            raise UserError(f"it is a {other.kind} model, and the target a {kind} one", model)
        if other.hashes == target_hashes:
            raise no_control(name, model)
        folder = run.evidence / name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        measure(folder, settings.for_controls(), other, sides, progress, of=f"the {name}")
        if name == "base":
            gather_shuffled(run, settings, other, sides, progress, name)


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
