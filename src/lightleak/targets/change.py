"""What fine-tuning changed, Δ = θ_target − θ_base, and the model part of the way there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightleak.errors import UserError
from lightleak.targets.target import Target

# B of an adapter's BA.
_OUTER = ".lora_B."


@dataclass(frozen=True)
class Change:
    """One model and what it was fine-tuned from.

    Where an adapter does no more than add s·BA to the weights under it, the change is told in its
    own coordinates: B, which began at nought, with A as it ended.

    Attributes:
        tuned: the model.
        base: its base, with the same parameters; None with such an adapter.
    """

    tuned: Target
    base: Target | None

    @staticmethod
    def between(tuned: Target, base: Callable[[], Target]) -> Change:
        """The change of a model; its base is loaded only where an adapter does not hold it.

        Raises:
            UserError: it has other parameters than its base.
        """
        if tuned.has_adapter:
            if _adds(tuned):
                return Change(tuned, None)
            tuned = replace(tuned, model=tuned.model.merge_and_unload())
        begun = base()
        own, under = (
            {name: each.shape for name, each in target.model.named_parameters()}
            for target in (tuned, begun)
        )
        if own != under:
            raise UserError("its parameters are not those of its base", tuned.name)
        return Change(tuned, begun)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of the matrices that changed."""
        if self.base is None:
            return tuple(name for name, _ in self.tuned.model.named_parameters() if _OUTER in name)
        under = dict(self.base.model.named_parameters())
        return tuple(
            name
            for name, own in self.tuned.model.named_parameters()
            if own.ndim > 1 and not torch.equal(own, under[name])
        )

    @torch.no_grad()
    def delta(self, name: str) -> Tensor:
        """Δ of one of the matrices, float32 or wider."""
        wide = self.tuned.wide
        own: Tensor = self.tuned.model.get_parameter(name).to(wide)
        return (
            own.clone() if self.base is None else own - self.base.model.get_parameter(name).to(wide)
        )

    @torch.no_grad()
    def at(self, share: float) -> Target:
        """The model at θ_base + share · Δ; both models are used up."""
        if self.base is None:
            for name in self.matrices:
                self.tuned.model.get_parameter(name).mul_(share)
            return self.tuned
        tuned = dict(self.tuned.model.named_parameters())
        for name, parameter in self.base.model.named_parameters():
            parameter.copy_(
                parameter.to(self.base.wide).lerp(tuned[name].to(self.base.wide), share)
            )
        return self.base


def _adds(target: Target) -> bool:
    """Whether the adapter holds low-rank matrices alone, which add to weights left as they were."""
    from peft import get_peft_model_state_dict

    # A copy of what lies under an adapted head is saved with it, untrained.
    own = (".lora_A.", ".lora_B.", ".base_layer.")
    return all(
        any(part in key for part in own) for key in get_peft_model_state_dict(target.model)
    ) and all(
        str(getattr(each, "init_lora_weights", None)) in {"True", "False", "gaussian"}
        and not each.use_dora
        and not each.lora_bias
        for each in target.model.peft_config.values()
    )
