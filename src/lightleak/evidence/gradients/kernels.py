"""Squared norms and inner products of the rows and columns of G_i = B_iᵀA_i.

Three ways to the same numbers, chosen by shape. With i inputs, o outputs and T tokens:

- `batched` forms G for some records at once: best where G is small (LoRA).
- `ghost` never forms G: ‖row‖² = Σ_t B∘((AAᵀ)B), row·R = Σ_t B∘(ARᵀ), and likewise for columns.
  2Tio + 2T²(i+o) multiply-adds; best for few tokens.
- `tiles` forms G a block of rows at a time in a buffer that stays in cache: Tio multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_SMALL_MATRIX = 64 * 1024
_FEW_TOKENS = 32
_TILE_ELEMENTS = 256 * 1024
_BATCHED_ELEMENTS = _TILE_ELEMENTS


@dataclass(frozen=True)
class SliceReadings:
    """Readings of n records at one matrix against k references.

    Attributes:
        row_norms2, column_norms2: (n, out) and (n, in).
        row_dots, column_dots: (n, k, out) and (n, k, in).
    """

    row_norms2: Tensor
    column_norms2: Tensor
    row_dots: Tensor
    column_dots: Tensor

    @staticmethod
    def empty(n: int, k: int, out: int, inp: int, like: Tensor) -> SliceReadings:
        """Zeros of the right shapes, on the device and in the dtype of `like`."""
        return SliceReadings(
            like.new_zeros(n, out),
            like.new_zeros(n, inp),
            like.new_zeros(n, k, out),
            like.new_zeros(n, k, inp),
        )


def read(inputs: Tensor, grads: Tensor, references: Tensor) -> SliceReadings:
    """Read every record's gradient at one matrix.

    Args:
        inputs: A, (n, T, in), float32 or float64.
        grads: B, (n, T, out), the same dtype.
        references: R, (k, out, in), the same dtype; k may be 0.
    """
    return choose(inputs.shape[1], inputs.shape[2], grads.shape[2])(inputs, grads, references)


def choose(tokens: int, inp: int, out: int) -> Callable[[Tensor, Tensor, Tensor], SliceReadings]:
    """The kernel for a shape."""
    if inp * out <= _SMALL_MATRIX:
        return batched
    return ghost if tokens <= _FEW_TOKENS else tiles


def of_gradients(gradients: Tensor, references: Tensor) -> SliceReadings:
    """Read gradients that exist whole: (n, out, in) against (k, out, in)."""
    n, out, inp = gradients.shape
    result = SliceReadings.empty(n, len(references), out, inp, gradients)
    product = torch.empty_like(gradients)
    for k, reference in enumerate(references):
        torch.mul(gradients, reference, out=product)
        torch.sum(product, 2, out=result.row_dots[:, k])
        torch.sum(product, 1, out=result.column_dots[:, k])
    torch.square(gradients, out=product)
    torch.sum(product, 2, out=result.row_norms2)
    torch.sum(product, 1, out=result.column_norms2)
    return result


def batched(inputs: Tensor, grads: Tensor, references: Tensor) -> SliceReadings:
    """Form G for as many records at once as stay small."""
    n, _, inp = inputs.shape
    out = grads.shape[2]
    result = SliceReadings.empty(n, len(references), out, inp, inputs)
    step = max(1, _BATCHED_ELEMENTS // (inp * out))
    for start in range(0, n, step):
        part = slice(start, start + step)
        piece = of_gradients(torch.bmm(grads[part].mT, inputs[part]), references)
        result.row_norms2[part] = piece.row_norms2
        result.column_norms2[part] = piece.column_norms2
        result.row_dots[part] = piece.row_dots
        result.column_dots[part] = piece.column_dots
    return result


def ghost(inputs: Tensor, grads: Tensor, references: Tensor) -> SliceReadings:
    """Never form G; the differences that rounding leaves below zero are cut at zero."""
    among_inputs = torch.bmm(inputs, inputs.mT)
    among_grads = torch.bmm(grads, grads.mT)
    through_rows = torch.einsum("nti,koi->nkto", inputs, references)
    through_columns = torch.einsum("nto,koi->nkti", grads, references)
    return SliceReadings(
        (grads * torch.bmm(among_inputs, grads)).sum(1).clamp_min_(0),
        (inputs * torch.bmm(among_grads, inputs)).sum(1).clamp_min_(0),
        (grads.unsqueeze(1) * through_rows).sum(2),
        (inputs.unsqueeze(1) * through_columns).sum(2),
    )


def tiles(inputs: Tensor, grads: Tensor, references: Tensor) -> SliceReadings:
    """Form G a block of rows at a time in one reused buffer."""
    n, _, inp = inputs.shape
    out = grads.shape[2]
    result = SliceReadings.empty(n, len(references), out, inp, inputs)
    height = min(out, max(1, _TILE_ELEMENTS // inp))
    tile_buffer = inputs.new_empty(height, inp)
    product_buffer = inputs.new_empty(height, inp)
    for i in range(n):
        for start in range(0, out, height):
            rows = slice(start, min(start + height, out))
            size = rows.stop - rows.start
            tile, product = tile_buffer[:size], product_buffer[:size]
            torch.mm(grads[i, :, rows].T, inputs[i], out=tile)
            for k, reference in enumerate(references):
                torch.mul(tile, reference[rows], out=product)
                result.row_dots[i, k, rows] = product.sum(1)
                result.column_dots[i, k] += product.sum(0)
            tile.square_()
            result.row_norms2[i, rows] = tile.sum(1)
            result.column_norms2[i] += tile.sum(0)
    return result


@dataclass(frozen=True)
class MaskedReference:
    """The kept slices of one reference at one matrix, each of unit length.

    Attributes:
        rows, columns: indices of the kept rows (of out) and columns (of in).
        unit_rows: (|rows|, in); unit_columns: (out, |columns|); a zero slice stays zero.
    """

    rows: Tensor
    columns: Tensor
    unit_rows: Tensor
    unit_columns: Tensor

    @staticmethod
    def keep(reference: Tensor, rows: Tensor, columns: Tensor) -> MaskedReference:
        """Cut the kept slices out of a reference (out, in)."""
        return MaskedReference(
            rows,
            columns,
            torch.nn.functional.normalize(reference[rows], dim=1, eps=0).nan_to_num(),
            torch.nn.functional.normalize(reference[:, columns], dim=0, eps=0).nan_to_num(),
        )


def masked_cosine_sum(inputs: Tensor, grads: Tensor, reference: MaskedReference) -> Tensor:
    """Sum of each record's cosines over the kept slices only, (n,).

    Forms T·in·|rows| + T·out·|columns| multiply-adds' worth of G and nothing else.
    """
    rows = torch.einsum("nto,nti->noi", grads[:, :, reference.rows], inputs)
    columns = torch.einsum("nto,nti->noi", grads, inputs[:, :, reference.columns])
    return _cosines(rows, reference.unit_rows, 2) + _cosines(columns, reference.unit_columns, 1)


def _cosines(slices: Tensor, units: Tensor, along: int) -> Tensor:
    norms = slices.norm(dim=along)
    dots = (slices * units).sum(along)
    return torch.where(norms > 0, dots / norms, 0.0).sum(1)
