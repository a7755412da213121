"""The membership audit, from records and a model to a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightleak.audits.gather import gather
from lightleak.audits.gather_controls import (
    gather_control_models,
    gather_shuffled,
    plan_controls,
)
from lightleak.audits.gather_references import gather_compared, references_of
from lightleak.audits.judge import judge
from lightleak.audits.manifest import recorded
from lightleak.audits.measure import claim
from lightleak.audits.models import release, released
from lightleak.audits.passes import begin
from lightleak.audits.reference_models import FILE
from lightleak.audits.settings import AuditSettings
from lightleak.audits.sides import read_sides
from lightleak.runs import Progress, Run, Silent
from lightleak.runs.folder import alone, sha256
from lightleak.targets import Function
from lightleak.validity import Verdict

# What may not change once the run has been looked at; paths and devices may.
_REGISTERED = (
    *("primary", "design", "cutoffs", "signals", "options", "protocol", "folds", "seed"),
    *("base", "control_target", "negative_controls", "blind_fields", "embeddings"),
    *("documentation", "bank_size", "drop_duplicates", "reference_epoch"),
)


def audit(
    *,
    target: str | Path | Function,
    suspect: str | Path,
    control: str | Path,
    out: str | Path,
    options: Mapping[str, Mapping[str, Any]] | Iterable[str] = (),
    progress: Progress | None = None,
    command: str | None = None,
    credit: str | None = None,
    **settings: Any,
) -> Verdict:
    """Was the target trained on the suspects?

    Stops and resumes: the same call on the same folder goes on where it was.

    Args:
        target: a model folder, a hub id, an endpoint's address, or a function that answers
            `(image, prompt, temperature, seed) -> str` in this process.
        suspect: records that may have been trained on; see the file contract in the docs.
        control: records of the same kind that were not.
        out: the run folder.
        options: of signals, {"mink": {"k": 0.1}} or ["mink.k=0.1"].
        progress: shows how far it is.
        command: what the manifest says was run.
        credit: whom the report names for the records, where their licence asks for it.
        settings: any other attribute of `AuditSettings`.

    Returns:
        The verdict, which is also in the run folder.

    Raises:
        UserError: input that cannot be used, with what to do about it.
    """
    chosen = AuditSettings.read(
        target=target, suspect=suspect, control=control, options=options, **settings
    )
    progress = progress or Silent()
    # What is not there is better missed now than after hours.
    others, references = chosen.control_models(), references_of(chosen, progress)
    run = Run.create(out)
    sides = read_sides(chosen, progress)
    with alone(run.folder), chosen.executor_of() as executor, released():
        of = begin(run.evidence, chosen, sides, progress, executor)
        chosen = of.settings
        claim(of, sides)
        told = Path(chosen.references or "") / FILE
        files = {"documentation": chosen.documentation, "embeddings": chosen.embeddings}
        with recorded(
            run,
            kind="membership",
            settings=chosen,
            fixed=_REGISTERED,
            target=of.description,
            hashes={
                **{f"{side} records": value for side, value in sides.hashes.items()},
                **{name: sha256(Path(file)) for name, file in files.items() if file is not None},
                **({"references": sha256(told)} if references else {}),
            },
            command=command or "lightleak.audit(…)",
            credit=credit,
        ):
            plan_controls(run, others)
            sides = gather(run, of, sides, progress, executor)
            if chosen.negative_controls:
                gather_shuffled(run, of, sides, progress, executor, "")
            gather_control_models(run, of, others, sides, progress, executor)
            gather_compared(run, of, others, references, sides, progress, executor)
            release()  # No model is needed from here on.
            return judge(run, progress)
