"""Training: fine-tune a target as its users would, with transformers and PEFT."""

from lightleak.training.fine_tuning import (
    TRAINED,
    FineTuning,
    Pace,
    fine_tune,
    fine_tune_epochs,
    measure_pace,
    pair_loss,
    shape_of,
)

__all__ = [
    "TRAINED",
    "FineTuning",
    "Pace",
    "fine_tune",
    "fine_tune_epochs",
    "measure_pace",
    "pair_loss",
    "shape_of",
]
