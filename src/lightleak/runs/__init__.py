"""Runs: one audit on disk, resumable at any moment and judged again without the model."""

from lightleak.runs.folder import (
    EvidenceStore,
    Run,
    cache_folder,
    make_folder,
    read_json,
    read_table,
    replacing,
    write_json,
    write_table,
)
from lightleak.runs.progress import Advance, Progress, Silent

__all__ = [
    "Advance",
    "EvidenceStore",
    "Progress",
    "Run",
    "Silent",
    "cache_folder",
    "make_folder",
    "read_json",
    "read_table",
    "replacing",
    "write_json",
    "write_table",
]
