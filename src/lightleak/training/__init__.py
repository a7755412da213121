"""Training: fine-tune a target as its users would, with transformers and PEFT."""

from lightleak.training.fine_tuning import FineTuning, fine_tune

__all__ = ["FineTuning", "fine_tune"]
