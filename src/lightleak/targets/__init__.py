"""Targets: the models under audit, loaded from a local folder or a hub id."""

from lightleak.targets.change import Change
from lightleak.targets.dual_encoder import Bank, DualEncoderTarget, Pairs
from lightleak.targets.endpoint import (
    ANSWER_TOKENS,
    EndpointTarget,
    Function,
    Question,
    Reply,
    connect,
    is_address,
    registered,
)
from lightleak.targets.generative import Answers, GenerativeTarget
from lightleak.targets.loading import base_of, find, load, quiet, untrained, without_adapter
from lightleak.targets.target import Batch, EncodedRecord, Outputs, Target

__all__ = [
    "ANSWER_TOKENS",
    "Answers",
    "Bank",
    "Batch",
    "Change",
    "DualEncoderTarget",
    "EncodedRecord",
    "EndpointTarget",
    "Function",
    "GenerativeTarget",
    "Outputs",
    "Pairs",
    "Question",
    "Reply",
    "Target",
    "base_of",
    "connect",
    "find",
    "is_address",
    "load",
    "quiet",
    "registered",
    "untrained",
    "without_adapter",
]
