"""Validity: when a number means something, and the verdict that obeys it."""

from lightleak.validity.identity import IdentityCutoffs, IdentityVerdict
from lightleak.validity.verdict import Cutoffs, Design, Verdict

__all__ = ["Cutoffs", "Design", "IdentityCutoffs", "IdentityVerdict", "Verdict"]
