"""Which parameters the gradient is read at (arXiv 2606.24774, section on selected layers)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from lightleak.errors import UserError
from lightleak.evidence.gradients.uses import Use, use_of
from lightleak.targets import Target

STRATEGIES = ("auto", "last3", "all", "everything", "lora", "lora_last3")


@dataclass(frozen=True)
class Selection:
    """Selected parameters.

    Attributes:
        strategy: last3, all, everything, lora or lora_last3; never auto.
        shapes: name → (out, in), in the model's own order; further dimensions count as in. What
            has fewer than two dimensions is one vector: (size,).
        uses: name → the modules that use it, where all of them are read by capture.
        dense: names that only a whole gradient can be read from (parameters used in ways that
            capture does not know); they force a batch of one.
    """

    strategy: str
    shapes: dict[str, tuple[int, ...]]
    uses: dict[str, tuple[Use, ...]]
    dense: tuple[str, ...]

    def without(self, names: set[str]) -> Selection:
        """The same selection less `names`."""
        return Selection(
            self.strategy,
            {name: shape for name, shape in self.shapes.items() if name not in names},
            {name: uses for name, uses in self.uses.items() if name not in names},
            tuple(name for name in self.dense if name not in names),
        )

    def whole(self, names: Collection[str]) -> Selection:
        """The same selection with `names` read from whole gradients."""
        apart = tuple(name for name in self.shapes if name in names or name in self.dense)
        return Selection(self.strategy, self.shapes, self.without(set(names)).uses, apart)


def select(target: Target, strategy: str = "auto") -> Selection:
    """Choose the parameters that a strategy names.

    `last3`: the last three text layers, the last three vision blocks, the projector (the default
    for full weights). `all`: every text and vision block and the projector. `lora`: every
    adapter matrix (the default with an adapter). `lora_last3`: adapter matrices within `last3`.
    These take parameters of two or more dimensions, as published. `everything`: all that full
    fine-tuning trains, embeddings, norms and biases too; with an adapter, the base's under it.

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
    owners = _owners(target.model)
    shapes: dict[str, tuple[int, ...]] = {}
    captured: dict[str, tuple[Use, ...]] = {}
    dense: list[str] = []
    for name, parameter in target.model.named_parameters():
        if not _selected(name, parameter, strategy, target):
            continue
        matrix = parameter.ndim > 1
        shapes[name] = (len(parameter), parameter[0].numel()) if matrix else (parameter.numel(),)
        uses = [use_of(*owner) for owner in owners[parameter]]
        known = tuple(use for use in uses if use is not None)
        if len(known) == len(uses):
            captured[name] = known
        else:
            dense.append(name)
    if not shapes:
        raise UserError(
            "no matrix of this model is selected: its layers were not found",
            f"matrices={strategy}",
            "Try another choice, or leave gradient signals out.",
        )
    return Selection(strategy, shapes, captured, tuple(dense))


def _owners(model: nn.Module) -> dict[nn.Parameter, list[tuple[str, nn.Module, str]]]:
    """Which modules hold a parameter, and under what name: two hold what is tied."""
    owners: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((name, module, leaf))
    return owners


def _selected(name: str, parameter: nn.Parameter, strategy: str, target: Target) -> bool:
    if ("lora_" in name) != strategy.startswith("lora"):
        return False
    if strategy == "everything":
        return True
    last = 3 if strategy.endswith("last3") else None
    parts = target.parts
    prefixes = (
        *_last(parts.text_blocks, last),
        *_last(parts.vision_blocks, last),
        *parts.projector,
    )
    inside = any(name.startswith(f"{prefix}.") for prefix in prefixes)
    return parameter.ndim > 1 and (inside or strategy == "lora")


def _last(blocks: Sequence[str], count: int | None) -> Sequence[str]:
    return blocks if count is None else blocks[-count:]
