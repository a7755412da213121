"""Signals: cheap functions from evidence to one number a record; higher = more member-like."""

from lightleak.signals import grad_norm, gradaudit, loss, mink, minkpp, zlib
from lightleak.signals.registry import Fit, Signal, cross, get, names, parse_options

__all__ = [
    "Fit",
    "Signal",
    "cross",
    "get",
    "grad_norm",
    "gradaudit",
    "loss",
    "mink",
    "minkpp",
    "names",
    "parse_options",
    "zlib",
]
