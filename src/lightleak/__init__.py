"""lightleak: was a vision-language model trained on your images and texts?

The Python functions mirror the commands and return the same verdict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Verdict",
    "__version__",
    "audit",
    "compare",
    "identify",
    "judge",
    "plan",
    "probe",
    "train_references",
    "write_report",
]

if TYPE_CHECKING:
    from lightleak.audits.identity import identify
    from lightleak.audits.judge import judge
    from lightleak.audits.membership import audit
    from lightleak.audits.planning import plan
    from lightleak.audits.probing import probe
    from lightleak.audits.reference_training import train_references
    from lightleak.report import report as write_report
    from lightleak.report.comparison import compare
    from lightleak.validity import Verdict

_ROOMS = {
    "audit": ("lightleak.audits.membership", "audit"),
    "compare": ("lightleak.report.comparison", "compare"),
    "identify": ("lightleak.audits.identity", "identify"),
    "judge": ("lightleak.audits.judge", "judge"),
    "plan": ("lightleak.audits.planning", "plan"),
    "probe": ("lightleak.audits.probing", "probe"),
    "train_references": ("lightleak.audits.reference_training", "train_references"),
    # Not `report`: that is the room itself, once it is imported.
    "write_report": ("lightleak.report", "report"),
    "Verdict": ("lightleak.validity", "Verdict"),
}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `lightleak --help` must not.
    if name not in _ROOMS:
        raise AttributeError(f"module 'lightleak' has no attribute {name!r}")
    from importlib import import_module

    room, function = _ROOMS[name]
    return getattr(import_module(room), function)
