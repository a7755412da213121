"""The membership audit, from records and a model to a verdict."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lightleak import signals
from lightleak.audits.gather import claim, gather, load_target, read_sides
from lightleak.audits.judge import judge
from lightleak.audits.settings import AuditSettings
from lightleak.errors import UserError
from lightleak.runs import Progress, Run, Silent, write_json
from lightleak.validity import Verdict

# What may not change once the run has been looked at; paths and devices may.
_REGISTERED = ("primary", "design", "cutoffs", "signals", "options", "protocol", "folds", "seed")


def audit(
    *,
    target: str | Path,
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
        target: a model folder or hub id.
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
    if not isinstance(options, Mapping):
        options = signals.parse_options(options)
    for name in ("adapter", "base", "calibration_members", "calibration_nonmembers"):
        if settings.get(name) is not None:
            settings[name] = str(settings[name])
    chosen = AuditSettings.read(
        target=str(target), suspect=str(suspect), control=str(control), options=options, **settings
    )
    progress = progress or Silent()
    run = Run.create(out)
    sides = read_sides(chosen, progress)
    with progress.stage("Loading the model", 1) as advance:
        model = load_target(chosen)
        advance(1)
    claim(run, chosen, model, sides)
    started = _registered(run, chosen)
    manifest = {
        "command": command or "lightleak.audit(…)",
        "settings": chosen.model_dump(mode="json"),
        "pre_registered_primary_signal": chosen.primary,
        "target": {"name": model.name, "dtype": str(model.dtype), "device": str(model.device)},
        "hashes": {**model.hashes, **{f"{k} records": v for k, v in sides.hashes.items()}},
        "versions": _versions(),
        "credit": credit,
        "host": {"system": platform.platform(), "processor": platform.machine()},
        "started": started,
        "finished": None,
    }
    write_json(run.manifest_file, manifest)
    gather(run, chosen, model, sides, progress)
    verdict = judge(run, progress)
    write_json(run.manifest_file, {**manifest, "finished": _now()})
    return verdict


def _registered(run: Run, chosen: AuditSettings) -> str:
    """When this run was first started; its settings stand from then on.

    Raises:
        UserError: the run was registered with other settings. Changing them after a look at the
            result would make the pre-registration worth nothing.
    """
    if not run.manifest_file.is_file():
        return _now()
    manifest = run.manifest()
    before, now = manifest.get("settings", {}), chosen.model_dump(mode="json")
    changed = sorted(key for key in _REGISTERED if before.get(key) != now[key])
    if changed:
        raise UserError(
            f"this run was registered with another {', '.join(changed).replace('_', ' ')}",
            str(run.folder),
            "Give --out another folder; this one keeps what was decided beforehand.",
        )
    return str(manifest["started"])


def _versions() -> dict[str, str]:
    packages = ("lightleak", "torch", "transformers", "peft", "numpy", "scipy", "scikit-learn")
    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    for name in packages:
        try:
            found.setdefault(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            found.setdefault(name, "not installed as a package")
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
