"""The lab: targets that lightleak trains itself, with membership drawn at random."""

from lightleak.lab.bench import BenchRow, bench
from lightleak.lab.corpora import ATTRIBUTION
from lightleak.lab.recipes import LabTarget, build

__all__ = ["ATTRIBUTION", "BenchRow", "LabTarget", "bench", "build"]
