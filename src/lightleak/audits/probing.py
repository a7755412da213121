"""The probe, from records and a model to a verdict: what did fine-tuning leave inside it?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightleak.audits.gather_probing import gather
from lightleak.audits.judge_probing import judge_probing
from lightleak.audits.manifest import recorded, registered
from lightleak.audits.probing_inputs import hashes
from lightleak.audits.settings import ProbingSettings
from lightleak.errors import UserError
from lightleak.runs import EvidenceStore, Progress, Run, Silent
from lightleak.targets import Target
from lightleak.validity import ProbingVerdict

# How fast it runs is no part of what is asked.
_FREE = {"device", "batch_size", "workers", "executor", "ray_address"}


def probe(
    *,
    target: str | Path,
    out: str | Path,
    progress: Progress | None = None,
    command: str | None = None,
    credit: str | None = None,
    **settings: Any,
) -> ProbingVerdict:
    """Did fine-tuning leave personal details in the model that have nothing to do with its task?

    With `data` the whole experiment: mark images with made-up personas at each rate, fine-tune
    the target on each copy, and probe every layer of every model for who was seen. With `seen`
    and `unseen` a model that somebody else fine-tuned. Stops and resumes: the same call on the
    same folder goes on where it was.

    Args:
        target: a model folder or hub id of an image-text-to-text model; with `data` the base.
        out: the run folder.
        progress: shows how far it is.
        command: what the manifest says was run.
        credit: whom the report names for the records, where their licence asks for it.
        settings: any other attribute of `ProbingSettings`.

    Returns:
        The verdict, which is also in the run folder.

    Raises:
        UserError: input that cannot be used, with what to do about it.
    """
    chosen = ProbingSettings.read(target=target, **settings)
    progress = progress or Silent()
    run = Run.create(out)
    with progress.stage("Reading records", 1) as advance:
        given = hashes(chosen)
        advance(1)
    with progress.stage("Loading the model", 1) as advance:
        model = chosen.load()
        advance(1)
    chosen = _settled(chosen, model)
    fixed = sorted(set(type(chosen).model_fields) - _FREE)
    decides = {
        "evidence version": 1,
        **{f"target {key}": value for key, value in sorted(model.hashes.items())},
        **given,
        "dtype": str(model.dtype),
        "device kind": model.device.type,
        "settings": chosen.model_dump(mode="json", include=set(fixed)),
    }
    registered(run, "probing", chosen, fixed)
    # Before the manifest is written anew: what is refused must leave it as it is.
    EvidenceStore.claim(run.evidence, decides)
    with recorded(
        run,
        kind="probing",
        settings=chosen,
        fixed=fixed,
        target=model,
        hashes=given,
        command=command or "lightleak.probe(…)",
        credit=credit,
    ):
        gather(run, chosen, model, progress)
        return judge_probing(run, progress)


def _settled(settings: ProbingSettings, model: Target) -> ProbingSettings:
    """The same with nothing left open.

    Design: of a whole experiment lots decide who is seen. Base: an adapter's is the target below
    it.

    Raises:
        UserError: the base is the target itself.
    """
    chosen: dict[str, Any] = {}
    if settings.data is not None:
        chosen["design"] = "randomised"
    elif settings.base is not None and settings.load(settings.base).hashes == model.hashes:
        raise UserError(
            "the base is the target itself: nothing can have been gained",
            settings.base,
            "Give the model from before the fine-tuning.",
        )
    return settings.model_copy(update=chosen)
