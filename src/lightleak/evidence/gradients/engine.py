"""One forward and one backward a batch; the gradients are read on the way.

Three sinks share the step: `add_gradients` (the sum that a reference is made of), `read` (norms
and inner products of every slice) and `score` (cosines of the kept slices only).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from lightleak.evidence.gradients.capture import Pieces, capture
from lightleak.evidence.gradients.forms import Gradients, Whole, of_pieces
from lightleak.evidence.gradients.kernels import MaskedReference, SliceReadings
from lightleak.evidence.gradients.rows import UnevenRows, by_record
from lightleak.evidence.gradients.select import Selection
from lightleak.targets import Batch, Outputs, Target

Consumer = Callable[[str, Gradients], None]

# Largest difference of a captured gradient from autograd's, relative to its norm.
_DIFFERENCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_DIFFERENCE = 0.1


@dataclass(frozen=True)
class BatchReadings:
    """What one step yields for the n records of a batch.

    Attributes:
        outputs: what the model said, without its graph.
        matrix_norms: (n, m) gradient norms by parameter.
        norms2: (n, s) squared norms of all slices, as `slice_axes` lays them out.
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
    _rows: dict[tuple[object, str], Fraction] = field(default_factory=dict)

    @property
    def one_by_one(self) -> bool:
        """Whether some selected parameter can only be read from a batch of one."""
        return bool(self.selection.dense)

    def step(self, batch: Batch, consume: Consumer) -> Outputs:
        """Forward and backward.

        Args:
            batch: the records.
            consume: takes each selected parameter's name and the records' gradients at it.

        Returns:
            What the model said, without its graph.

        Raises:
            UnevenRows: call again with one record at a time.
            FloatingPointError: a record's loss is not finite.
        """
        if self.one_by_one and len(batch) > 1:
            raise UnevenRows
        wide = self.target.wide

        def captured(name: str, pieces: Pieces) -> None:
            consume(name, of_pieces(pieces, self._matrix(name)[0], wide))

        def deal(module: str, rows: Tensor) -> Tensor:
            return by_record(module, rows, batch, self._rows)

        uses = self.selection.uses
        parameters = dict(self.target.model.named_parameters())
        dense = {name: parameters[name] for name in self.selection.dense}
        try:
            for parameter in dense.values():
                parameter.requires_grad_(True)
            with (
                torch.enable_grad(),
                capture(uses, captured, deal, len(batch), self.target.device) as collector,
            ):
                outputs = self.target.outputs(batch)
                losses = outputs.losses
                if not bool(torch.isfinite(losses).all()):
                    raise FloatingPointError("its loss is not finite")
                collector.backward(losses.sum())
            for name, parameter in dense.items():
                if parameter.grad is not None:
                    whole = parameter.grad.reshape(1, *self._matrix(name))
                    consume(name, Whole(whole.to(wide)))
        finally:
            for parameter in dense.values():
                parameter.requires_grad_(False)
                parameter.grad = None
        return outputs.detach()

    def add_gradients(self, batch: Batch, sums: dict[str, Tensor]) -> None:
        """Add the records' gradients to `sums` (name → shape), wholly or not at all."""
        found: dict[str, Tensor] = {}

        def consume(name: str, gradients: Gradients) -> None:
            found[name] = gradients.total().reshape(self.selection.shapes[name])

        self.step(batch, consume)
        if not all(bool(torch.isfinite(value).all()) for value in found.values()):
            raise FloatingPointError("its gradient is not finite")
        for name, value in found.items():
            if name in sums:
                sums[name] += value
            else:
                sums[name] = value

    def read(self, batch: Batch, references: Mapping[str, Tensor]) -> BatchReadings:
        """Norms of every slice, and inner products with `references` (name → (k, *shape))."""
        found: dict[str, SliceReadings] = {}
        k = len(next(iter(references.values()))) if references else 0
        like = torch.empty(0, dtype=self.target.wide, device=self.target.device)

        def consume(name: str, gradients: Gradients) -> None:
            given = references[name] if references else like
            found[name] = gradients.read(given.reshape(k, *self._matrix(name)))

        outputs = self.step(batch, consume)
        norms, dots, totals = [], [], []
        for name, shape in self.selection.shapes.items():
            one = found.get(name) or SliceReadings.empty(len(batch), k, *self._matrix(name), like)
            norms += [one.row_norms2, one.column_norms2][: len(shape)]
            dots += [one.row_dots, one.column_dots][: len(shape)]
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
        count = sum(map(len, kept.values()))

        def consume(name: str, gradients: Gradients) -> None:
            if name in kept:
                total.add_(gradients.cosine_sum(kept[name]))

        self.step(batch, consume)
        return total / count if count else total.fill_(torch.nan)

    def unseen(self, batch: Batch) -> set[str]:
        """Parameters whose gradient capture does not see whole, found on one record.

        A weight may be used past the module that owns it; autograd tells.
        """
        captured: dict[str, Tensor] = {}
        plain: dict[str, Tensor] = {}
        self.add_gradients(batch, captured)
        whole = self.selection.whole(self.selection.shapes)
        GradientEngine(self.target, whole).add_gradients(batch, plain)
        largest = max((float(each.norm()) for each in plain.values()), default=0.0)
        tolerance = _DIFFERENCE.get(self.target.dtype, _HALF_DIFFERENCE)
        found = set()
        for name, expected in plain.items():
            difference = float((captured.get(name, torch.zeros_like(expected)) - expected).norm())
            # Some gradients are zero but for rounding, a bias' of keys for one.
            if difference > tolerance * max(float(expected.norm()), 1e-3 * largest):
                found.add(name)
        return found

    def unreached(self, batches: Sequence[Batch]) -> set[str]:
        """Selected parameters that no record of these batches sends a gradient to."""
        reached: set[str] = set()
        for batch in batches:
            self.step(batch, lambda name, _: reached.add(name))
        return set(self.selection.shapes) - reached

    def _matrix(self, name: str) -> tuple[int, int]:
        """(out, in) of a parameter; a vector is one row."""
        *out, size = self.selection.shapes[name]
        return (out[0] if out else 1), size
