"""Targets: the models under audit, loaded from a local folder or a hub id."""

from lightleak.targets.dual_encoder import Bank, DualEncoderTarget, Pairs
from lightleak.targets.generative import Answers, GenerativeTarget
from lightleak.targets.loading import base_of, find, load, quiet, untrained, without_adapter
from lightleak.targets.target import Batch, EncodedRecord, Outputs, Target

__all__ = [
    "Answers",
    "Bank",
    "Batch",
    "DualEncoderTarget",
    "EncodedRecord",
    "GenerativeTarget",
    "Outputs",
    "Pairs",
    "Target",
    "base_of",
    "find",
    "load",
    "quiet",
    "untrained",
    "without_adapter",
]
