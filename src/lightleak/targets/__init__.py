"""Targets: the models under audit, loaded from a local folder or a hub id."""

from lightleak.targets.generative import Batch, EncodedRecord, GenerativeTarget
from lightleak.targets.loading import load, quiet

__all__ = ["Batch", "EncodedRecord", "GenerativeTarget", "load", "quiet"]
