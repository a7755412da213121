"""Validity: when a number means something, and the verdict that obeys it."""

from lightleak.validity.identity import IdentityCutoffs, IdentityVerdict
from lightleak.validity.probing import ProbingCutoffs, ProbingVerdict
from lightleak.validity.verdict import Cutoffs, Design, Verdict

__all__ = [
    "Cutoffs",
    "Design",
    "IdentityCutoffs",
    "IdentityVerdict",
    "ProbingCutoffs",
    "ProbingVerdict",
    "Verdict",
]
