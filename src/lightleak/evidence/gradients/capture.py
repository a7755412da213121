"""Take what a parameter's gradient is made of, without forming it.

For y = x Wᵀ the gradient of a record's loss is G_i = B_iᵀ A_i, with A_i the layer's inputs
(tokens × in) and B_i the gradients of its outputs (tokens × out); `uses` says what A and B are for
other layers. `capture` hands them to a consumer during the backward pass; weights stay frozen and
no weight gradient exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightleak.evidence.gradients.uses import Use, linear_weight

Pieces = list[tuple[Tensor, Tensor]]
Consumer = Callable[[str, Pieces], None]
Deal = Callable[[str, Tensor], Tensor]

# Multiply-adds that an accelerator must be spared before it is worth waiting for one number.
_WORTH_WAITING = 1 << 34
# Share of the tokens that may be left, for the rest to be cut off.
_WORTH_TRIMMING = 7 / 8


class _CapturedLinear(torch.autograd.Function):
    """x Wᵀ + b, whose backward shows (x, ∂loss/∂y) and the tokens where the latter is not zero.

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
        y = nn.functional.linear(x, weight, bias)
        # A view could not be changed in place, as some models do.
        return y if y._base is None else y.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        (grad,) = grad_outputs
        live = _live(grad, weight)
        ctx.seen(x, grad, live)
        result = None
        if ctx.needs_input_grad[0]:
            if live is None:
                result = _times(grad, weight)
            else:
                result = x.new_zeros(x.shape)
                result[:, live] = _times(grad[:, live], weight)
        return result, None, None, None, None


class _Captured(torch.autograd.Function):
    """The outputs of any other layer, whose backward shows (x, ∂loss/∂y)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, tap: Tensor, seen: Callable[..., None]) -> Tensor:
        del tap
        ctx.save_for_backward(x)
        ctx.seen = seen
        return y.clone()  # A view could not be changed in place, as some models do.

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grad_outputs
        ctx.seen(*ctx.saved_tensors, grad)
        return grad, None, None, None


def _times(grad: Tensor, weight: Tensor) -> Tensor:
    # Told apart by record, it would be many small products.
    return (grad.flatten(0, -2) @ weight).reshape(*grad.shape[:-1], weight.shape[1])


def _live(grad: Tensor, weight: Tensor) -> slice | None:
    """The span of tokens of (n, tokens, out) outside of which all is zero; None for (nearly) all.

    Padding has no gradient, nor have images and prompts in the last language layer.
    """
    if grad.ndim != 3 or grad.numel() == 0:
        return None
    work = grad.shape[:-1].numel() * weight.numel()
    if grad.device.type != "cpu" and work < _WORTH_WAITING:
        return None
    edge = max(1, grad.shape[1] // 16)
    if bool(grad[:, :edge].any()) and bool(grad[:, -edge:].any()):
        return None  # Most often; the whole need not be looked through.
    tokens = (grad.amax((0, 2)) != 0).logical_or_(grad.amin((0, 2)) != 0)
    at = tokens.nonzero().flatten().tolist() or [0, -1]
    live = slice(at[0], at[-1] + 1)
    return live if live.stop - live.start <= _WORTH_TRIMMING * len(tokens) else None


class Collector:
    """Passes each parameter's (A, B) on by record; all uses of a parameter go together.

    Args:
        consumer: takes a parameter's name and, for each use, A (n, T, in) and B (n, T, out).
        deal: takes a module's name and its rows (…, features) to (n, T, features).
    """

    def __init__(self, consumer: Consumer, deal: Deal) -> None:
        self._consumer = consumer
        self._deal = deal
        self._calls: dict[str, int] = {}
        self._waiting: dict[str, Pieces] = {}
        self._backward = False

    def called(self, parameters: Sequence[str]) -> None:
        """The forward pass went through a module; what is run again by checkpointing is not."""
        if not self._backward:
            for parameter in parameters:
                self._calls[parameter] = self._calls.get(parameter, 0) + 1

    def seen(
        self, parameter: str, use: Use, inputs: Tensor, grad: Tensor, live: slice | None = None
    ) -> None:
        """The backward pass came through the module."""
        factors = use.factors(use.module, inputs, grad)
        # Heads have an axis of their own: a record's rows are those of all.
        rows = [each.flatten(1, -2) if each.ndim > 3 else each for each in factors]
        dealt = [self._deal(use.name, each) for each in rows]
        if live is not None and dealt[1].shape == rows[1].shape:
            dealt = [each[:, live] for each in dealt]
        pieces = self._waiting.setdefault(parameter, [])
        pieces.append((dealt[0], dealt[1]))
        if len(pieces) == self._calls[parameter]:
            self._consumer(parameter, self._waiting.pop(parameter))

    def backward(self, loss: Tensor) -> None:
        """Take the loss backward; hands over every parameter that its gradient reaches."""
        self._backward = True
        torch.autograd.backward(loss)
        while self._waiting:  # Not every use of these had a gradient.
            self._consumer(*self._waiting.popitem())


@contextmanager
def capture(
    uses: Mapping[str, Sequence[Use]],
    consumer: Consumer,
    deal: Deal,
    records: int,
    device: torch.device,
) -> Iterator[Collector]:
    """Route the forward of the parameters' modules through capture, for one forward and backward.

    Every module is restored on the way out. Arguments are those of `Collector`, and:

    Args:
        uses: by parameter.
        records: in the batch.
        device: of the model.
    """
    collector = Collector(consumer, deal)
    tap = torch.zeros((), device=device, requires_grad=True)
    owned: dict[nn.Module, list[tuple[str, Use]]] = {}
    for parameter, each in uses.items():
        for use in each:
            owned.setdefault(use.module, []).append((parameter, use))

    def routed(module: Any, own: Sequence[tuple[str, Use]]) -> Callable[[Tensor], Tensor]:
        plain = type(module).forward
        linear = any(use.factors is linear_weight for _, use in own)
        names = [parameter for parameter, _ in own]

        def seen(inputs: Tensor, grad: Tensor, live: slice | None = None) -> None:
            for parameter, use in own:
                collector.seen(parameter, use, inputs, grad, live)

        def forward(*given: Tensor, **named: Tensor) -> Tensor:
            (x,) = (*given, *named.values())
            collector.called(names)
            result: Tensor
            if not torch.is_grad_enabled():
                result = plain(module, x)
            elif linear:
                result = _CapturedLinear.apply(x, module.weight, module.bias, tap, seen)  # type: ignore[no-untyped-call]
            else:
                if isinstance(module, nn.Embedding) and x.ndim > 1 and len(x) == 1:
                    # Positions that all records share would share their gradient, too.
                    x = x.expand(records, *x.shape[1:])
                result = _Captured.apply(plain(module, x), x, tap, seen)  # type: ignore[no-untyped-call]
            return result

        return forward

    try:
        for module, own in owned.items():
            # The instance attribute shadows the class's forward; module, hooks, names all stay.
            module.__dict__["forward"] = routed(module, own)
        yield collector
    finally:
        for module in owned:
            module.__dict__.pop("forward", None)
