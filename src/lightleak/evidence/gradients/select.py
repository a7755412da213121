"""Which matrices the gradient is read at (arXiv 2606.24774, section on selected layers)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightleak.errors import UserError
from lightleak.targets import Target

STRATEGIES = ("auto", "last3", "all", "lora", "lora_last3")


@dataclass(frozen=True)
class Selection:
    """Selected parameters.

    Attributes:
        strategy: last3, all, lora or lora_last3; never auto.
        shapes: name → (out, in), in the model's own order; further dimensions count as in.
        modules: name → the `nn.Linear` that owns it and is read by capture.
        dense: names that only a whole gradient can be read from (parameters used outside a
            plain linear layer); they force a batch of one.
    """

    strategy: str
    shapes: dict[str, tuple[int, int]]
    modules: dict[str, nn.Linear]
    dense: tuple[str, ...]

    def without(self, names: set[str]) -> Selection:
        """The same selection less `names`."""
        return Selection(
            self.strategy,
            {name: shape for name, shape in self.shapes.items() if name not in names},
            {name: module for name, module in self.modules.items() if name not in names},
            tuple(name for name in self.dense if name not in names),
        )


def select(target: Target, strategy: str = "auto") -> Selection:
    """Choose the parameters with two or more dimensions that a strategy names.

    `last3`: the last three text layers, the last three vision blocks, the projector (the default
    for full weights). `all`: every text and vision block and the projector. `lora`: every
    adapter matrix (the default with an adapter). `lora_last3`: adapter matrices within `last3`.

    Raises:
        UserError: an unknown strategy, adapter matrices asked of a target without an adapter, or
            a model whose layers are not found.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"choose one of {', '.join(STRATEGIES)}", f"matrices={strategy}")
    if strategy == "auto":
        strategy = "lora" if target.has_adapter else "last3"
    if strategy.startswith("lora") and not target.has_adapter:
        raise UserError(
            "the target has no adapter", f"matrices={strategy}", "Give --adapter, or use last3."
        )
    last = 3 if strategy.endswith("last3") else None
    parts = target.parts
    prefixes = (
        *_last(parts.text_blocks, last),
        *_last(parts.vision_blocks, last),
        *parts.projector,
    )
    modules = dict(target.model.named_modules())
    shapes: dict[str, tuple[int, int]] = {}
    linear: dict[str, nn.Linear] = {}
    dense: list[str] = []
    for name, parameter in target.model.named_parameters():
        adapter = "lora_" in name
        inside = any(name.startswith(f"{prefix}.") for prefix in prefixes)
        if parameter.ndim < 2 or adapter != strategy.startswith("lora"):
            continue
        if not inside and strategy != "lora":
            continue
        shapes[name] = (parameter.shape[0], parameter[0].numel())
        owner_name, _, leaf = name.rpartition(".")
        owner = modules[owner_name]
        # nn.MultiheadAttention takes this one's weight and never calls it.
        called = not isinstance(owner, NonDynamicallyQuantizableLinear)
        if leaf == "weight" and called and type(owner).forward is nn.Linear.forward:
            linear[name] = owner
        else:
            dense.append(name)
    if not shapes:
        raise UserError(
            "no matrix of this model is selected: its layers were not found",
            f"matrices={strategy}",
            "Try another choice, or leave gradient signals out.",
        )
    return Selection(strategy, shapes, linear, tuple(dense))


def _last(blocks: tuple[str, ...], count: int | None) -> tuple[str, ...]:
    return blocks if count is None else blocks[-count:]
