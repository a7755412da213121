"""The manifest: what was decided before anything was measured, and by what it was measured."""

from __future__ import annotations

import platform
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata

import torch

from lightleak.audits.models import Description
from lightleak.audits.settings import TargetSettings
from lightleak.errors import UserError
from lightleak.runs import Run, write_json
from lightleak.targets import Target

_PACKAGES = ("lightleak", "transformers", "peft", "numpy", "scipy", "scikit-learn", "Faker")


@contextmanager
def recorded(
    run: Run,
    *,
    kind: str,
    settings: TargetSettings,
    fixed: Collection[str],
    target: Target | Description,
    hashes: Mapping[str, str],
    command: str,
    credit: str | None,
) -> Iterator[None]:
    """Write the manifest before the work, and once more with the time when it is done.

    Args:
        run: the run.
        kind: membership or identity.
        settings: all of them, with nothing left open.
        fixed: which of them may not change once the run has been looked at.
        target: the model.
        hashes: of what it is asked about.
        command, credit: what was run, and whom the report names.

    Raises:
        UserError: the run was registered with other settings.
    """
    manifest = {
        "kind": kind,
        "command": command,
        "settings": settings.model_dump(mode="json"),
        "pre_registered_primary_signal": getattr(settings, "primary", None),
        "target": {
            "name": target.name,
            "kind": target.kind,
            "dtype": str(target.dtype),
            "device": str(target.device),
        },
        "hashes": {**target.hashes, **hashes},
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            **{name: version(name) for name in _PACKAGES},
        },
        "credit": credit,
        "host": {"system": platform.platform(), "processor": platform.machine()},
        "started": registered(run, kind, settings, fixed),
        "finished": None,
    }
    write_json(run.manifest_file, manifest)
    del target  # Else it would stay in memory until the end, beside every other model.
    yield
    write_json(run.manifest_file, {**manifest, "finished": _now()})


def registered(run: Run, kind: str, settings: TargetSettings, fixed: Collection[str]) -> str:
    """When this run was first started; its settings stand from then on.

    Raises:
        UserError: the run was registered with other settings. Changing them after a look at the
            result would make the pre-registration worth nothing.
    """
    if not run.manifest_file.is_file():
        return _now()
    if run.kind != kind:
        raise UserError(
            f"it holds a run of another kind ({run.kind})", str(run.folder), "Give another --out."
        )
    manifest = run.manifest()
    if not run.verdict_file.is_file():
        return str(manifest["started"])  # Nobody has looked yet: a slip may be mended.
    before, now = manifest.get("settings", {}), settings.model_dump(mode="json")
    changed = sorted(key for key in fixed if before.get(key) != now[key])
    if changed:
        raise UserError(
            f"this run was registered with another {', '.join(changed).replace('_', ' ')}",
            str(run.folder),
            "Give --out another folder; this one keeps what was decided beforehand.",
        )
    return str(manifest["started"])


def version(package: str) -> str:
    """Of a package, as it was installed; the program itself may lie there without that."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
