"""What a recipe is asked for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from lightleak.errors import UserError
from lightleak.lab.faces import Exposure

# Raised when a recipe changes what it writes: older caches are then built again.
_VERSION = 1


@dataclass(frozen=True)
class Request:
    """All that decides what a recipe writes; None stands for what a recipe does not know.

    Attributes:
        prevalence: the share of the suspects that are trained on; None for all of them.
        copies: how often each member stands in the training data; None for once.

    Raises:
        UserError: impossible numbers.
    """

    recipe: str
    seed: int
    members: int
    nonmembers: int
    epochs: int
    caption_shift: bool
    exposure: Exposure | None = None
    prevalence: float | None = None
    copies: int | None = None

    def __post_init__(self) -> None:
        if self.members < 1 or self.nonmembers < 1:
            raise UserError("a lab target needs at least one member and one non-member")
        if self.epochs < 1:
            raise UserError("training needs at least one epoch", f"--epochs {self.epochs}")
        if self.prevalence is not None and not 0 <= self.prevalence < 1:
            raise UserError("a share from 0 to 1 is wanted", f"--prevalence {self.prevalence}")
        if self.copies is not None and self.copies < 1:
            raise UserError("a member is trained on at least once", f"--copies {self.copies}")

    @property
    def unused(self) -> int:
        """How many of the suspects are not trained on."""
        return 0 if self.prevalence is None else round((1 - self.prevalence) * self.members)

    def settings(self) -> dict[str, Any]:
        """What decides a folder, as it comes back from JSON."""
        settings = {key: value for key, value in asdict(self).items() if value is not None}
        return dict(json.loads(json.dumps({**settings, "version": _VERSION})))
