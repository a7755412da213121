"""The forms in which the gradients of a batch's records come, by parameter, and their readings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightleak.evidence.gradients import kernels
from lightleak.evidence.gradients.capture import Pieces
from lightleak.evidence.gradients.kernels import MaskedReference, SliceReadings


class Gradients(Protocol):
    """Gradients G_i of n records at one matrix (out, in)."""

    def total(self) -> Tensor:
        """Σ_i G_i, (out, in)."""
        ...

    def read(self, references: Tensor) -> SliceReadings:
        """Norms of every slice, and inner products with references (k, out, in)."""
        ...

    def cosine_sum(self, reference: MaskedReference) -> Tensor:
        """Sum of each record's cosines over the kept slices, (n,)."""
        ...


def of_pieces(pieces: Pieces, out: int, wide: torch.dtype) -> Gradients:
    """The gradients of a parameter from the factors of all its uses.

    Args:
        pieces: A (n, T, in) and B (n, T, out), or token ids (n, T, 1) in the place of B.
        out: rows of the matrix.
        wide: what is computed in.
    """
    if all(grads.is_floating_point() for _, grads in pieces):
        return Products(*_joined(pieces), wide)
    if not any(grads.is_floating_point() for _, grads in pieces):
        values, ids = _joined(pieces)
        return Lookups(values.to(wide), ids[..., 0], out)
    # An embedding that is tied to the head: a token's gradient is added to the token's row.
    rows = torch.arange(out, device=pieces[0][0].device)
    both = [
        (inputs.to(wide), (grads if grads.is_floating_point() else grads == rows).to(wide))
        for inputs, grads in pieces
    ]
    return Products(*_joined(both), wide)


def _joined(pieces: Pieces) -> tuple[Tensor, Tensor]:
    """The factors of several uses as those of one, end to end along T."""
    if len(pieces) == 1:
        return pieces[0]
    inputs, grads = (torch.cat(each, dim=1) for each in zip(*pieces, strict=True))
    return inputs, grads


@dataclass(frozen=True)
class Products:
    """G_i = B_iᵀA_i of inputs A (n, T, in) and grads B (n, T, out), read in the dtype `wide`."""

    inputs: Tensor
    grads: Tensor
    wide: torch.dtype

    def total(self) -> Tensor:
        """Σ_i G_i, (out, in)."""
        inputs, grads = (each.flatten(0, 1).to(self.wide) for each in (self.inputs, self.grads))
        return grads.T @ inputs

    def read(self, references: Tensor) -> SliceReadings:
        """Norms of every slice, and inner products with references (k, out, in)."""
        return kernels.read(self.inputs, self.grads, references)

    def cosine_sum(self, reference: MaskedReference) -> Tensor:
        """Sum of each record's cosines over the kept slices, (n,)."""
        return kernels.masked_cosine_sum(self.inputs, self.grads, reference)


@dataclass(frozen=True)
class Lookups:
    """Row v of G_i is the sum of values (n, T, in) where ids (n, T) are v; few rows are not 0."""

    values: Tensor
    ids: Tensor
    out: int

    def total(self) -> Tensor:
        """Σ_i G_i, (out, in)."""
        zeros = self.values.new_zeros(self.out, self.values.shape[2])
        return _add(zeros, self.ids.flatten(), self.values.flatten(0, 1))

    def read(self, references: Tensor) -> SliceReadings:
        """Norms of every slice, and inner products with references (k, out, in)."""
        records, tokens, rows = self._rows()
        n, k = len(self.values), len(references)
        result = SliceReadings.empty(n, k, self.out, rows.shape[1], rows)

        def sum_up(products: Tensor, by_row: Tensor, by_column: Tensor) -> None:
            by_row[records, tokens] = products.sum(1)
            _add(by_column, records, products)

        sum_up(rows.square(), result.row_norms2, result.column_norms2)
        for j, reference in enumerate(references):
            products = rows * reference[tokens]
            sum_up(products, result.row_dots[:, j], result.column_dots[:, j])
        return result

    def cosine_sum(self, reference: MaskedReference) -> Tensor:
        """Sum of each record's cosines over the kept slices, (n,)."""
        records, tokens, rows = self._rows()
        place = tokens.new_full((self.out,), -1)
        place[reference.rows] = torch.arange(len(reference.rows), device=place.device)
        kept = place[tokens] >= 0
        cosines = kernels.cosines(rows[kept], reference.unit_rows[place[tokens[kept]]])
        total = _add(rows.new_zeros(len(self.values)), records[kept], cosines)
        columns = rows[:, reference.columns]
        zeros = rows.new_zeros(len(self.values), len(reference.columns))
        dots = _add(zeros.clone(), records, columns * reference.unit_columns[:, tokens].T)
        norms2 = _add(zeros, records, columns.square())
        return total + kernels.cosines_of(dots, norms2).sum(1)

    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Record, token and row of each pair of record and token that there is."""
        n = len(self.values)
        first = torch.arange(n, device=self.ids.device)[:, None] * self.out
        pairs, place = torch.unique(first + self.ids, return_inverse=True)
        zeros = self.values.new_zeros(len(pairs), self.values.shape[2])
        rows = _add(zeros, place.flatten(), self.values.flatten(0, 1))
        return pairs // self.out, pairs % self.out, rows


@dataclass(frozen=True)
class Whole:
    """Gradients that autograd formed, (n, out, in)."""

    gradients: Tensor

    def total(self) -> Tensor:
        """Σ_i G_i, (out, in)."""
        return self.gradients.sum(0)

    def read(self, references: Tensor) -> SliceReadings:
        """Norms of every slice, and inner products with references (k, out, in)."""
        return kernels.of_gradients(self.gradients, references)

    def cosine_sum(self, reference: MaskedReference) -> Tensor:
        """Sum of each record's cosines over the kept slices, (n,)."""
        rows, columns = self.gradients[:, reference.rows], self.gradients[:, :, reference.columns]
        return kernels.cosines(rows, reference.unit_rows).sum(1) + kernels.cosines(
            columns.mT, reference.unit_columns
        ).sum(1)


def _add(sums: Tensor, places: Tensor, values: Tensor) -> Tensor:
    # Unlike index_add_, in one order on every device.
    return sums.index_put_((places,), values, accumulate=True)
