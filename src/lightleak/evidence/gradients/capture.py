"""Take what a linear layer's weight gradient is made of, without forming it.

For y = x Wᵀ the gradient of a record's loss is G_i = B_iᵀ A_i, with A_i the layer's inputs
(tokens × in) and B_i the gradients of its outputs (tokens × out). `capture` hands A and B to a
consumer during the backward pass; weights stay frozen and no weight gradient exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Consumer = Callable[[str, Tensor, Tensor], None]


class _CapturedLinear(torch.autograd.Function):
    """x Wᵀ + b, whose backward shows (x, ∂loss/∂y) to a collector.

    `tap` is a scalar that requires a gradient: it makes the backward pass reach the first
    selected layer, and stop there, though every weight is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tap: Tensor,
        seen: Callable[..., None],
    ) -> Tensor:
        del tap
        ctx.save_for_backward(x, weight)
        ctx.seen = seen
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        (grad,) = grad_outputs
        ctx.seen(x, grad)
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


class Collector:
    """Passes each module's (A, B) on; a module used more than once is joined along its tokens."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._calls: dict[str, int] = {}
        self._waiting: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def called(self, name: str) -> None:
        """A forward pass went through the module."""
        self._calls[name] = self._calls.get(name, 0) + 1

    def seen(self, name: str, inputs: Tensor, grad: Tensor) -> None:
        """The backward pass came through the module."""
        if self._calls[name] == 1:
            self._consumer(name, inputs, grad)
        else:
            # Used twice, or run again by gradient checkpointing: known only at the end.
            self._waiting.setdefault(name, []).append((inputs, grad))

    def flush(self) -> None:
        """Hand over what was waiting; call after each backward pass."""
        for name, pairs in self._waiting.items():
            if len(pairs) == 1:
                self._consumer(name, *pairs[0])
            else:
                inputs, grads = zip(*pairs, strict=True)
                self._consumer(name, torch.cat(inputs, dim=-2), torch.cat(grads, dim=-2))
        self.clear()

    def clear(self) -> None:
        """Forget the step in hand."""
        self._calls.clear()
        self._waiting.clear()


@contextmanager
def capture(
    modules: Mapping[str, nn.Linear], consumer: Consumer, device: torch.device
) -> Iterator[Collector]:
    """Route the forward of `modules` through capture; every module is restored on the way out."""
    collector = Collector(consumer)
    tap = torch.zeros((), device=device, requires_grad=True)

    def routed(name: str, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        def seen(inputs: Tensor, grad: Tensor) -> None:
            collector.seen(name, inputs, grad)

        def forward(x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return nn.functional.linear(x, module.weight, module.bias)
            collector.called(name)
            result: Tensor = _CapturedLinear.apply(x, module.weight, module.bias, tap, seen)  # type: ignore[no-untyped-call]
            return result

        return forward

    try:
        for name, module in modules.items():
            # The instance attribute shadows the class's forward; module, hooks, names all stay.
            module.__dict__["forward"] = routed(name, module)
        yield collector
    finally:
        for module in modules.values():
            module.__dict__.pop("forward", None)
