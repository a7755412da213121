"""How each kind of layer uses a parameter: two factors whose product is its gradient.

With a row t for each place that a layer is applied at, its inputs x and output gradients y,

- weight of a linear layer, or of a convolution (x a patch): G = Σ_t y_t ⊗ x_t;
- bias: G = Σ_t y_t;
- weight of a norm, out = x̂ ∘ w + b: G = Σ_t x̂_t ∘ y_t;
- embedding: row v of G is Σ y_t over the places t of token v.

A vector is a matrix of one row, whose factor B is 1 in every row t.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

Factors = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]

_CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
# Largest difference from x̂ ∘ w + b, relative to 1, in half precision and in others.
_HALF_TOLERANCE, _TOLERANCE = 5e-2, 1e-5


@dataclass(frozen=True)
class Use:
    """A module's use of one of its parameters.

    Attributes:
        name: of the module.
        module: what is captured.
        factors: takes module, inputs and output gradients to A (…, in) and B (…, out); an
            embedding has token ids (…, 1) in the place of B.
    """

    name: str
    module: nn.Module
    factors: Factors


def use_of(name: str, module: nn.Module, leaf: str) -> Use | None:
    """A module's use of its parameter `leaf`; None where it is none of these."""
    factors = _kinds(module).get(leaf)
    return factors and Use(name, module, factors)


def linear_weight(module: nn.Module, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Of y = x Wᵀ + b."""
    del module
    return inputs, grads


def _kinds(module: nn.Module) -> Mapping[str, Factors]:
    forward = type(module).forward
    if forward is nn.Linear.forward:
        # nn.MultiheadAttention takes this one's weight and never calls it.
        called = not isinstance(module, NonDynamicallyQuantizableLinear)
        return {"weight": linear_weight, "bias": _bias} if called else {}
    if forward in _CONVOLUTIONS:
        return {"weight": _convolution_weight, "bias": _channel_bias} if _plain(module) else {}
    if isinstance(module, nn.Embedding):
        looked_up = forward is nn.Embedding.forward and module.max_norm is None
        return {"weight": _embedding} if looked_up and not module.scale_grad_by_freq else {}
    return {"weight": _scale, "bias": _bias} if _scales(module) else {}


def _plain(module: Any) -> bool:
    return bool(
        module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and set(module.dilation) == {1}
    )


def _convolution_weight(module: Any, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    size: tuple[int, ...] = module.kernel_size
    around = [each for amount in reversed(module.padding) for each in (amount, amount)]
    patches = nn.functional.pad(inputs, around)
    for axis, (length, step) in enumerate(zip(size, module.stride, strict=True)):
        patches = patches.unfold(2 + axis, length, step)
    # (n, channels, places …, kernel …): the channels belong with the kernel.
    patches = patches.movedim(1, 1 + len(size)).flatten(1 + len(size)).flatten(1, len(size))
    return patches, grads.flatten(2).mT


def _channel_bias(module: nn.Module, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    return _bias(module, inputs, grads.flatten(2).mT)


def _bias(module: nn.Module, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    del module, inputs
    return grads, grads.new_ones(1).expand(*grads.shape[:-1], 1)


def _scale(module: nn.Module, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(grads.dtype, torch.float32)
    return _bias(module, inputs, _unscaled(module, inputs).to(wide) * grads)


def _embedding(module: Any, ids: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    if module.padding_idx is not None:
        grads = grads.masked_fill((ids == module.padding_idx)[..., None], 0)
    return grads, ids[..., None]


def _unscaled(module: nn.Module, inputs: Tensor) -> Tensor:
    """x̂: what the weight multiplies, whatever is done to the weight before."""
    return _with(module, inputs, 1) - _with(module, inputs, 0)


def _with(
    module: nn.Module, inputs: Tensor, weight: Tensor | int, bias: Tensor | int = 0
) -> Tensor:
    given = {"weight": weight, "bias": bias}
    # A weight of another dtype than the module's own would widen what the module computes in.
    parameters = {
        name: torch.zeros_like(parameter) + given[name]
        for name, parameter in module.named_parameters(recurse=False)
    }
    result: Tensor = functional_call(module, parameters, (inputs,))
    return result


@torch.no_grad()
def _scales(module: nn.Module) -> bool:
    """Whether a module computes x̂ ∘ w + b over its last dimension, tried on some numbers."""
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.get("weight")
    if not parameters.keys() <= {"weight", "bias"} or weight is None or weight.ndim != 1:
        return False
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return False  # It takes more than its inputs: a gate, say.
    size = len(weight)
    numbers = torch.arange(2 * (size + 1) * size, device=weight.device).reshape(2, size + 1, size)
    inputs = (1.7 * numbers).sin().to(weight.dtype)
    factor, offset = (2.3 * inputs[0, 0]).cos(), (3.1 * inputs[0, 0]).sin()
    try:
        found = _with(module, inputs, factor, offset)
        expected = _unscaled(module, inputs) * factor + _with(module, inputs, 0)
    except Exception:
        return False  # It takes something else.
    if "bias" in parameters:
        expected = expected + offset
    tolerance = _HALF_TOLERANCE if weight.itemsize < 4 else _TOLERANCE
    return (
        size > 1
        and found.shape == inputs.shape
        and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
    )
