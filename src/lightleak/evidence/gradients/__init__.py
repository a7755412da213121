"""Per-record gradients of selected matrices, read without ever being formed whole."""

from lightleak.evidence.gradients.engine import GradientEngine
from lightleak.evidence.gradients.select import STRATEGIES, Selection, select

__all__ = ["STRATEGIES", "GradientEngine", "Selection", "select"]
