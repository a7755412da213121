"""What the page of a comparison shows, read from several run folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lightleak.errors import UserError
from lightleak.report.contents import hashes
from lightleak.runs import Run
from lightleak.validity import Verdict
from lightleak.validity.verdict import SignalFinding


@dataclass(frozen=True)
class Audit:
    """One membership audit among those compared; `files` are SHA-256 by file name."""

    label: str
    folder: Path
    manifest: dict[str, Any]
    verdict: Verdict
    files: dict[str, str]

    @property
    def target(self) -> str:
        """What was audited."""
        return str(self.manifest["target"]["name"])

    @property
    def primary(self) -> SignalFinding:
        """The signal that carries the verdict."""
        return self.verdict.signals[self.verdict.primary.signal]


def read(runs: Sequence[str | Path], labels: Sequence[str]) -> tuple[Audit, ...]:
    """Read finished membership runs.

    Args:
        runs: their folders, two or more, in the order to be shown.
        labels: what to call each; without any each is called by its folder.

    Raises:
        UserError: too few runs, one twice, of another kind, unfinished or damaged, or labels
            that do not tell them apart.
    """
    if len(runs) < 2:
        raise UserError("two runs or more are wanted", "compare")
    folders = [Path(run) for run in runs]
    if labels and len(labels) != len(folders):
        raise UserError(
            f"{len(labels)} label(s) for {len(folders)} runs",
            "--label",
            "Give one for each run, in their order.",
        )
    names = list(labels) or [folder.resolve().name for folder in folders]
    for i, (folder, name) in enumerate(zip(folders, names, strict=True)):
        if folder.resolve() in {other.resolve() for other in folders[:i]}:
            raise UserError("this run is given twice", str(folder))
        if name in names[:i]:
            raise UserError(
                f"two runs are called {name!r}",
                str(folder),
                "Tell them apart by --label, once for each run.",
            )
    return tuple(_audit(*each) for each in zip(folders, names, strict=True))


def _audit(folder: Path, label: str) -> Audit:
    run = Run.open(folder)
    if run.kind != "membership":
        raise UserError(
            f"only membership audits are compared, and this run is of the kind {run.kind!r}",
            str(folder),
        )
    manifest = run.manifest()
    if not manifest.get("finished") or not run.verdict_file.is_file():
        raise UserError(
            "this run is not finished", str(folder), "Run the same audit again to its end."
        )
    return Audit(label, folder, manifest, Verdict.read(run.verdict_file), hashes(run))


def by_signal(audits: Sequence[Audit]) -> Iterator[tuple[str, list[Audit]]]:
    """Each signal with the audits that have it, the primary ones first."""
    primaries = [audit.verdict.primary.signal for audit in audits]
    for name in dict.fromkeys([*primaries, *(n for a in audits for n in a.verdict.signals)]):
        yield name, [audit for audit in audits if name in audit.verdict.signals]


def table(audits: Sequence[Audit]) -> pa.Table:
    """One row a run and signal, for further work; null = not computed or not estimated."""
    return pa.Table.from_pylist(
        [_row(audit, name) for audit in audits for name in audit.verdict.signals], schema=_SCHEMA
    )


_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("run", "target", "verdict", "tier", "signal")),
        ("primary", pa.bool_()),
        ("n_suspect", pa.int64()),
        ("n_control", pa.int64()),
        *((name, pa.float64()) for name in ("auc", "auc_low", "auc_high", "p_value")),
        ("counting_p_value", pa.float64()),
        *((f"prevalence{end}", pa.float64()) for end in ("", "_low", "_high")),
        ("prevalence_method", pa.string()),
        *((f"blind_auc{end}", pa.float64()) for end in ("", "_low", "_high")),
    ]
)


def _row(audit: Audit, name: str) -> dict[str, Any]:
    verdict, finding = audit.verdict, audit.verdict.signals[name]
    share, validity = finding.prevalence, verdict.validity
    auc_low, auc_high = finding.auc_ci95 or (None, None)
    share_low, share_high = share.ci95 if share else (None, None)
    blind_low, blind_high = validity.blind_auc_ci95 or (None, None)
    is_primary = name == verdict.primary.signal
    return {
        "run": audit.label,
        "target": audit.target,
        "verdict": verdict.verdict,
        "tier": verdict.tier,
        "signal": name,
        "primary": is_primary,
        "n_suspect": verdict.primary.n_suspect,
        "n_control": verdict.primary.n_control,
        "auc": finding.auc,
        "auc_low": auc_low,
        "auc_high": auc_high,
        "p_value": finding.p_value,
        "counting_p_value": audit.verdict.p_that_counts if is_primary else None,
        "prevalence": share.estimate if share else None,
        "prevalence_low": share_low,
        "prevalence_high": share_high,
        "prevalence_method": share.method if share else None,
        "blind_auc": validity.blind_auc,
        "blind_auc_low": blind_low,
        "blind_auc_high": blind_high,
    }
