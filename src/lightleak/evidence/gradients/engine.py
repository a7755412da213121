"""One forward and one backward a batch; the gradients are read on the way.

Three sinks share the step: `add_gradients` (the sum that a reference is made of), `read` (norms
and inner products of every slice) and `score` (cosines of the kept slices only).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightleak.evidence.gradients.capture import Consumer, capture
from lightleak.evidence.gradients.kernels import (
    MaskedReference,
    SliceReadings,
    masked_cosine_sum,
    of_gradients,
    read,
)
from lightleak.evidence.gradients.rows import UnevenRows, by_record
from lightleak.evidence.gradients.select import Selection
from lightleak.targets import Batch, Outputs, Target


@dataclass(frozen=True)
class BatchReadings:
    """What one step yields for the n records of a batch.

    Attributes:
        outputs: what the model said, without its graph.
        matrix_norms: (n, m) gradient norms by matrix.
        norms2: (n, s) squared norms of all slices, rows then columns of each matrix.
        dots: (n, k, s) inner products with the k references.
    """

    outputs: Outputs
    matrix_norms: Tensor
    norms2: Tensor
    dots: Tensor


@dataclass
class GradientEngine:
    """Reads a target's per-record gradients at the selected matrices.

    A batch's loss is the sum of its records' own losses, so that no record's gradient depends on
    its batch.
    """

    target: Target
    selection: Selection
    # Rows a record takes in a layer, by batch shape: learned from batches of one.
    _rows: dict[tuple[object, str], int] = field(default_factory=dict)

    @property
    def one_by_one(self) -> bool:
        """Whether some selected parameter can only be read from a batch of one."""
        return bool(self.selection.dense)

    def step(self, batch: Batch, consume: Consumer, consume_dense: Consumer) -> Outputs:
        """Forward and backward.

        Args:
            batch: the records.
            consume: takes (name, A (n, T, in), B (n, T, out)) for each captured matrix.
            consume_dense: takes (name, G (1, out, in), G) for each other matrix.

        Returns:
            What the model said, without its graph.

        Raises:
            UnevenRows: call again with one record at a time.
            FloatingPointError: a record's loss is not finite.
        """
        if self.one_by_one and len(batch) > 1:
            raise UnevenRows

        def deal(name: str, inputs: Tensor, grads: Tensor) -> None:
            consume(name, self._by_record(name, inputs, batch), self._by_record(name, grads, batch))

        parameters = dict(self.target.model.named_parameters())
        dense = {name: parameters[name] for name in self.selection.dense}
        try:
            for parameter in dense.values():
                parameter.requires_grad_(True)
            with (
                torch.enable_grad(),
                capture(self.selection.modules, deal, self.target.device) as collector,
            ):
                outputs = self.target.outputs(batch)
                losses = outputs.losses
                if not bool(torch.isfinite(losses).all()):
                    raise FloatingPointError("its loss is not finite")
                torch.autograd.backward(losses.sum())
                collector.flush()
            for name, parameter in dense.items():
                if parameter.grad is not None:
                    whole = parameter.grad.reshape(1, parameter.shape[0], -1).to(self.target.wide)
                    consume_dense(name, whole, whole)
        finally:
            for parameter in dense.values():
                parameter.requires_grad_(False)
                parameter.grad = None
        return outputs.detach()

    def add_gradients(self, batch: Batch, sums: dict[str, Tensor]) -> None:
        """Add the records' gradients to `sums` (name → (out, in)), wholly or not at all."""
        found: dict[str, Tensor] = {}

        def consume(name: str, inputs: Tensor, grads: Tensor) -> None:
            found[name] = grads.flatten(0, 1).T @ inputs.flatten(0, 1)

        def consume_dense(name: str, whole: Tensor, _: Tensor) -> None:
            found[name] = whole[0]

        self.step(batch, consume, consume_dense)
        if not all(bool(torch.isfinite(value).all()) for value in found.values()):
            raise FloatingPointError("its gradient is not finite")
        for name, value in found.items():
            if name in sums:
                sums[name] += value
            else:
                sums[name] = value

    def read(self, batch: Batch, references: Mapping[str, Tensor]) -> BatchReadings:
        """Norms of every slice, and inner products with `references` (name → (k, out, in))."""
        found: dict[str, SliceReadings] = {}
        k = len(next(iter(references.values()))) if references else 0

        def reference(name: str, like: Tensor) -> Tensor:
            return (
                references[name] if references else like.new_zeros(0, *self.selection.shapes[name])
            )

        def consume(name: str, inputs: Tensor, grads: Tensor) -> None:
            found[name] = read(inputs, grads, reference(name, inputs))

        def consume_dense(name: str, whole: Tensor, _: Tensor) -> None:
            found[name] = of_gradients(whole, reference(name, whole))

        outputs = self.step(batch, consume, consume_dense)
        n, device = len(batch), self.target.device
        norms, dots, totals = [], [], []
        for name, (out, inp) in self.selection.shapes.items():
            like = torch.empty(0, dtype=self.target.wide, device=device)
            one = found.get(name) or SliceReadings.empty(n, k, out, inp, like)
            norms += [one.row_norms2, one.column_norms2]
            dots += [one.row_dots, one.column_dots]
            totals.append(one.row_norms2.sum(1).sqrt())
        readings = BatchReadings(
            outputs, torch.stack(totals, 1), torch.cat(norms, 1), torch.cat(dots, 2)
        )
        if not bool(torch.isfinite(readings.norms2).all()):
            raise FloatingPointError("its gradient is not finite")
        return readings

    def score(self, batch: Batch, kept: Mapping[str, MaskedReference]) -> Tensor:
        """Mean cosine over the kept slices, (n,); NaN where nothing is kept."""
        total = torch.zeros(len(batch), dtype=self.target.wide, device=self.target.device)
        count = sum(len(each.rows) + len(each.columns) for each in kept.values())

        def consume(name: str, inputs: Tensor, grads: Tensor) -> None:
            if name in kept:
                total.add_(masked_cosine_sum(inputs, grads, kept[name]))

        def consume_dense(name: str, whole: Tensor, _: Tensor) -> None:
            if name in kept:
                eye = torch.eye(whole.shape[1], dtype=whole.dtype, device=whole.device)[None]
                total.add_(masked_cosine_sum(whole, eye, kept[name]))

        self.step(batch, consume, consume_dense)
        return total / count if count else total.fill_(torch.nan)

    def unreached(self, batches: Sequence[Batch]) -> set[str]:
        """Selected matrices that no record of these batches sends a gradient to."""
        reached: set[str] = set()
        for batch in batches:
            self.step(batch, lambda name, *_: reached.add(name), lambda name, *_: reached.add(name))
        return set(self.selection.shapes) - reached

    def _by_record(self, name: str, rows: Tensor, batch: Batch) -> Tensor:
        return by_record(name, rows, batch, self._rows).to(self.target.wide)
