"""Signals: cheap functions from evidence to one number a record; higher = more member-like."""

from lightleak.signals import (
    contrast_loss,
    cosine,
    cosine_aug,
    dropout,
    grad_norm,
    gradaudit,
    loss,
    mink,
    minkpp,
    weak,
    zlib,
)
from lightleak.signals.registry import Fit, Signal, cross, get, names, parse_options

__all__ = [
    "Fit",
    "Signal",
    "contrast_loss",
    "cosine",
    "cosine_aug",
    "cross",
    "dropout",
    "get",
    "grad_norm",
    "gradaudit",
    "loss",
    "mink",
    "minkpp",
    "names",
    "parse_options",
    "weak",
    "zlib",
]
