"""What the base, and references of known membership, say of the same records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightleak import records
from lightleak.audits.gather_shares import gather_shares
from lightleak.audits.measure import measure
from lightleak.audits.models import Model, describe_other
from lightleak.audits.passes import Pass
from lightleak.audits.reference_models import Reference, read_references
from lightleak.audits.settings import AuditSettings
from lightleak.audits.sides import Sides
from lightleak.errors import UserError
from lightleak.runs import Progress, Run, read_json, write_json
from lightleak.runs.executors import Executor

# Which references a run was to ask, and what each was trained on.
ASKED = "references.json"
# One is the pretended target; the others must hold the record and lack it.
_FEWEST = 4


def references_of(settings: AuditSettings, progress: Progress) -> list[Reference]:
    """The references that the audit was given.

    Raises:
        UserError: they cannot be read.
    """
    if settings.references is None:
        return []
    return read_references(settings.references, settings.reference_epoch, progress=progress)


def gather_compared(
    run: Run,
    target: Pass,
    others: Mapping[str, str],
    references: Sequence[Reference],
    sides: Sides,
    progress: Progress,
    executor: Executor,
) -> None:
    """Take every record through the base, unless it is among `others`, and through each reference.

    Raises:
        UserError: a model cannot be loaded, is of another kind, or is the target; or the run was
            judged with other references.
    """
    if not target.settings.across:
        return
    settings = target.settings.only(target.settings.across)
    asked: dict[str, list[str]] = {}
    if references:
        keys = {record.id: records.content_key(record) for record in sides.records}
        asked = {
            each.name: sorted(key for key, content in keys.items() if content in each.members)
            for each in references
        }
    base = settings.known_base()
    file = run.evidence / ASKED
    content: dict[str, object] = {"trained on": asked, "base": base}
    if references:
        content |= {"epoch": references[0].epoch, "recipe": dict(references[0].recipe)}
    before = read_json(file)["trained on"] if file.is_file() else asked
    if run.verdict_file.is_file() and before != asked:
        raise UserError(
            "this run was registered with other references",
            str(run.folder),
            "Give --out another folder; this one keeps what was decided beforehand.",
        )
    if not file.is_file() or before != asked:
        write_json(file, content)
    _note_coverage(asked, sides, progress)
    if base is not None and "base" not in others:
        _gather(run, target, "base", Model(settings, base), sides, progress, executor)
    models: dict[str, Model] = {}
    for each in references:
        models[each.name] = _model(settings, each)
        base_hashes = each.base_hashes if each.adapter else None
        _gather(run, target, each.name, models[each.name], sides, progress, executor, base_hashes)
    why_not = gather_shares(run, target, models, sides, progress, executor)
    write_json(file, {**content, "shares": why_not or "made"})


def _note_coverage(asked: Mapping[str, list[str]], sides: Sides, progress: Progress) -> None:
    """Say what the references cannot tell."""
    if not asked:
        return
    if len(asked) < _FEWEST:
        progress.note(f"lira and signature take {_FEWEST} references at least: they score nothing.")
    known = {key for ids in asked.values() for key in ids}
    outside = sum(record.id not in known for record in sides.records)
    if known and outside:
        progress.note(
            f"{outside} of {len(sides.records)} records are in no reference: they have no "
            "signature, and lira and rmia compare every record with those that lack it alone."
        )


def _model(settings: AuditSettings, reference: Reference) -> Model:
    """A reference as it is loaded; an adapter on the audit's own base.

    Raises:
        UserError: its base is not known here, or another one: a name that somebody wrote down is
            not fetched.
    """
    given = {"target": str(reference.folder), "adapter": None, "base": None}
    if reference.adapter:
        base = settings.known_base() or reference.base or ""
        if base == reference.base and not Path(base).is_dir():
            raise UserError(
                f"the base of the references is not here: {base}",
                str(reference.folder),
                "Give --base.",
            )
        given |= {"target": base, "adapter": str(reference.folder)}
    return Model(settings.model_copy(update=given))


def _gather(
    run: Run,
    target: Pass,
    name: str,
    model: Model,
    sides: Sides,
    progress: Progress,
    executor: Executor,
    base_hashes: Mapping[str, str] | None = None,
) -> None:
    other = describe_other(target.description, name, model, progress, executor)
    settings = target.settings
    beneath = {key: value for key, value in other.hashes.items() if key != "adapter"}
    if base_hashes is not None and beneath != base_hashes:
        raise UserError(f"the {name} was trained on another base", model.name, "Give its --base.")
    folder = run.evidence / name
    folder.mkdir(exist_ok=True)
    of = Pass(folder, settings.only(settings.across), model, other, f"the {name}")
    measure(of, sides, progress, executor)
