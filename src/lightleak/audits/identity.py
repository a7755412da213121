"""The identity audit, from photos, names and a model to a verdict: are these people known?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightleak.audits.gather_identity import (
    choose_names,
    gather,
    read_people,
    read_templates,
)
from lightleak.audits.judge_identity import judge_identity
from lightleak.audits.manifest import recorded
from lightleak.audits.settings import DECOYS, IdentitySettings
from lightleak.errors import UserError
from lightleak.runs import Progress, Run, Silent, make_folder
from lightleak.targets import Target
from lightleak.validity import IdentityVerdict

# What may not change once the run has been looked at; the device may.
_REGISTERED = (
    *("design", "cutoffs", "decoys", "decoy_count", "candidates", "templates", "seed"),
    *("controls", "known", "control_target"),
)


def identify(
    *,
    target: str | Path,
    people: str | Path,
    out: str | Path,
    progress: Progress | None = None,
    command: str | None = None,
    credit: str | None = None,
    **settings: Any,
) -> IdentityVerdict:
    """Does the target know these people by name?

    Stops and resumes: the same call on the same folder goes on where it was.

    Args:
        target: a model folder or hub id: a dual encoder, or a generative model.
        people: a folder that holds one folder of photos for each person.
        out: the run folder.
        progress: shows how far it is.
        command: what the manifest says was run.
        credit: whom the report names for the photos, where their licence asks for it.
        settings: any other attribute of `IdentitySettings`.

    Returns:
        The verdict, which is also in the run folder.

    Raises:
        UserError: input that cannot be used, with what to do about it.
    """
    chosen = IdentitySettings.read(target=target, people=people, **settings)
    progress = progress or Silent()
    run = Run.create(out)
    with progress.stage("Reading people", 1) as advance:
        asked = read_people(chosen)
        advance(1)
    with progress.stage("Loading the model", 1) as advance:
        model = chosen.load()
        other = _other_model(chosen, model)
        advance(1)
    count = chosen.decoy_count or DECOYS[model.kind]
    chosen = chosen.model_copy(update={"decoy_count": count})
    templates = read_templates(chosen, model.kind)
    names = choose_names(chosen, asked, count)
    with recorded(
        run,
        kind="identity",
        settings=chosen,
        fixed=_REGISTERED,
        target=model,
        hashes=asked.hashes,
        command=command or "lightleak.identify(…)",
        credit=credit,
    ):
        gather(run.evidence, chosen, model, asked, names, templates, progress)
        if other is not None:
            folder = run.evidence / "control-target"
            make_folder(folder)
            gather(folder, chosen, other, asked, names, templates, progress)
        return judge_identity(run, progress)


def _other_model(settings: IdentitySettings, model: Target) -> Target | None:
    """The model that cannot know the people; a wrong one is refused before anything is spent."""
    if settings.control_target is None:
        return None
    other = settings.load(settings.control_target)
    where = f"--control-target {settings.control_target}"
    if other.kind != model.kind:
        raise UserError(
            f"it is a {other.kind} model and the target a {model.kind} one",
            where,
            "Give one of the same kind, which is asked in the same way.",
        )
    if other.hashes == model.hashes:
        raise UserError(
            "it is the target itself", where, "Give a model that cannot have seen these people."
        )
    return other
