"""Squared norms and inner products of the rows and columns of G_i = B_iᵀA_i.

Three ways to the same numbers. With i inputs, o outputs and T tokens:

- `batched` forms G for some records at once: best where G is small (LoRA).
- `ghost` never forms G: ‖row‖² = Σ_t B∘((AAᵀ)B), row·R = Σ_t B∘(ARᵀ), and likewise for columns.
  2Tio + 2T²(i+o) multiply-adds; best for few tokens.
- `tiles` forms G a block of rows at a time in a buffer that stays in cache: Tio multiply-adds.

On a CPU the shape decides, so that a run that is taken up again reads the same bits. On an
accelerator they are timed once a shape, and what was chosen can be stored (`choices`, `prefer`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

_SMALL_MATRIX = 64 * 1024
_FEW_TOKENS = 32
# Numbers in a tile: with its product and the reference beside it, 1.2 MB of cache.
_TILE_ELEMENTS = 96 * 1024
# An accelerator keeps nothing in cache that long, but a launch has to be worth its while.
_ACCELERATOR_ELEMENTS = 32 * 1024 * 1024
# Largest difference from `tiles`, relative to the largest number, and how often each is timed.
_AGREES, _TIMED = 1e-3, 3


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


Kernel = Callable[[Tensor, Tensor, Tensor], SliceReadings]


def read(inputs: Tensor, grads: Tensor, references: Tensor) -> SliceReadings:
    """Read every record's gradient at one matrix.

    Args:
        inputs: A, (n, T, in), in any floating dtype.
        grads: B, (n, T, out), in the same.
        references: R, (k, out, in), float32 or float64, which readings are made in; k may be 0.
    """
    kernel = choose(inputs.shape[1], inputs.shape[2], grads.shape[2])
    if inputs.device.type != "cpu" and kernel is not batched:
        kernel = fastest(_CANDIDATES, inputs, grads, references)
    return kernel(inputs, grads, references)


def choose(tokens: int, inp: int, out: int) -> Kernel:
    """The kernel for a shape on a CPU."""
    if inp * out <= _SMALL_MATRIX:
        return batched
    return ghost if tokens <= _FEW_TOKENS else tiles


_chosen: dict[str, str] = {}


def choices() -> dict[str, str]:
    """What was chosen by timing so far: shape → kernel."""
    return dict(_chosen)


def prefer(chosen: Mapping[str, str]) -> None:
    """Choose as another process did (its `choices`), without timing."""
    _chosen.update(chosen)


def fastest(
    candidates: Mapping[str, Kernel], inputs: Tensor, grads: Tensor, references: Tensor
) -> Kernel:
    """The fastest of the kernels that agree with `tiles`; found once for shapes alike.

    Shapes are alike that differ in records and tokens by less than a factor of two.
    """
    n, tokens, inp = inputs.shape
    place = torch.cuda.get_device_name(inputs.device) if inputs.is_cuda else inputs.device.type
    shape = f"{_power(n)} × {_power(tokens)} × {inp} × {grads.shape[2]}, {len(references)}"
    key = f"{place}, {inputs.dtype}, {shape}"
    if key not in _chosen:
        expected = tiles(inputs, grads, references)
        seconds = {"tiles": _seconds(tiles, inputs, grads, references)}
        for name, kernel in candidates.items():
            try:
                if _agree(kernel(inputs, grads, references), expected):
                    seconds[name] = _seconds(kernel, inputs, grads, references)
            except RuntimeError:
                continue  # This torch cannot, or the memory is too small for it.
        _chosen[key] = min(seconds, key=seconds.__getitem__)
    return candidates.get(_chosen[key], tiles)


def _power(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _agree(found: SliceReadings, expected: SliceReadings) -> bool:
    pairs = [(getattr(found, f.name), getattr(expected, f.name)) for f in fields(SliceReadings)]
    return all(bool((a - b).abs().max() <= _AGREES * b.abs().max()) for a, b in pairs if a.numel())


def _seconds(kernel: Kernel, inputs: Tensor, grads: Tensor, references: Tensor) -> float:
    """The shortest of some calls."""
    times = []
    for _ in range(_TIMED):
        start = _now(inputs.device)
        kernel(inputs, grads, references)
        times.append(_now(inputs.device) - start)
    return min(times)


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


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
    return _in_batches(inputs.to(references), grads.to(references), references, torch.bmm)


def batched_from_half(inputs: Tensor, grads: Tensor, references: Tensor) -> SliceReadings:
    """`batched`, with sums in float32 of products of half precision, which float32 holds exactly.

    Raises:
        RuntimeError: torch has no such product on this device, or for these dtypes.
    """
    return _in_batches(
        inputs, grads, references, lambda a, b: torch.bmm(a, b, out_dtype=references.dtype)
    )


def _in_batches(
    inputs: Tensor,
    grads: Tensor,
    references: Tensor,
    product: Callable[[Tensor, Tensor], Tensor],
) -> SliceReadings:
    n, _, inp = inputs.shape
    out = grads.shape[2]
    result = SliceReadings.empty(n, len(references), out, inp, references)
    step = max(1, _elements(inputs.device) // (inp * out))
    for start in range(0, n, step):
        part = slice(start, start + step)
        piece = of_gradients(product(grads[part].mT, inputs[part]), references)
        for field in fields(SliceReadings):
            getattr(result, field.name)[part] = getattr(piece, field.name)
    return result


def ghost(inputs: Tensor, grads: Tensor, references: Tensor) -> SliceReadings:
    """Never form G; the differences that rounding leaves below zero are cut at zero."""
    inputs, grads = inputs.to(references), grads.to(references)
    n, _, inp = inputs.shape
    result = SliceReadings.empty(n, len(references), grads.shape[2], inp, inputs)
    for k, reference in enumerate(references):
        torch.sum((inputs @ reference.T).mul_(grads), 1, out=result.row_dots[:, k])
        torch.sum((grads @ reference).mul_(inputs), 1, out=result.column_dots[:, k])
    torch.sum(_gram_times(inputs, grads).mul_(grads), 1, out=result.row_norms2).clamp_min_(0)
    torch.sum(_gram_times(grads, inputs).mul_(inputs), 1, out=result.column_norms2).clamp_min_(0)
    return result


def _gram_times(inputs: Tensor, grads: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(inputs, inputs.mT), grads)


def tiles(inputs: Tensor, grads: Tensor, references: Tensor) -> SliceReadings:
    """Form G a block of rows at a time in one reused buffer."""
    inputs, grads = inputs.to(references), grads.to(references)
    k, out, inp = references.shape
    result = SliceReadings.empty(len(inputs), k, out, inp, references)
    columns2 = result.column_norms2[:, None].unbind()
    columns = [each.unbind() for each in result.column_dots[:, :, None].unbind()]
    for block, tiles_of, product in _blocks(inputs, grads, inp):
        ones = references.new_ones(1, block.stop - block.start)
        beside = references[:, block].unbind()
        rows2 = result.row_norms2[:, block].unbind()
        rows = [each.unbind() for each in result.row_dots[:, :, block].unbind()]
        for i, tile in enumerate(tiles_of):
            for j, reference in enumerate(beside):
                torch.mul(tile, reference, out=product)
                torch.sum(product, 1, out=rows[i][j])
                columns[i][j].addmm_(ones, product)
            tile.square_()
            torch.sum(tile, 1, out=rows2[i])
            columns2[i].addmm_(ones, tile)
    return result


def _blocks(
    inputs: Tensor, grads: Tensor, inp: int
) -> Iterator[tuple[slice, Iterator[Tensor], Tensor]]:
    """For each block of rows of G: which, each record's tile (rows, in), and room for a product.

    What is yielded is overwritten by the next.
    """
    out = grads.shape[2]
    count = -(-out * inp // _elements(inputs.device))
    height = -(-out // min(out, count)) if out else 1
    tile_room, product_room = inputs.new_empty(2, height, inp)
    for start in range(0, out, height):
        block = slice(start, min(start + height, out))
        tile, product = (each[: block.stop - start] for each in (tile_room, product_room))
        yield block, _of_records(inputs, grads[:, :, block].mT, tile), product


def _of_records(inputs: Tensor, grads: Tensor, tile: Tensor) -> Iterator[Tensor]:
    for a, b in zip(inputs.unbind(), grads.unbind(), strict=True):
        torch.mm(b, a, out=tile)
        yield tile


def _elements(device: torch.device) -> int:
    return _TILE_ELEMENTS if device.type == "cpu" else _ACCELERATOR_ELEMENTS


# What is timed on an accelerator, beside `tiles`. No product there is summed in half precision.
_CANDIDATES: dict[str, Kernel] = {
    "batched": batched,
    "batched_from_half": batched_from_half,
    "ghost": ghost,
}


@dataclass(frozen=True)
class MaskedReference:
    """The kept slices of one reference at one matrix, each of unit length.

    Attributes:
        rows, columns: indices of the kept rows (of out) and columns (of in).
        unit_rows: (|rows|, in); unit_columns: (|columns|, out); a zero slice stays zero.
    """

    rows: Tensor
    columns: Tensor
    unit_rows: Tensor
    unit_columns: Tensor

    @staticmethod
    def keep(reference: Tensor, rows: Tensor, columns: Tensor | None = None) -> MaskedReference:
        """Cut the kept slices out of a reference (out, in); a vector is one row."""
        reference = reference.reshape(-1, reference.shape[-1])
        columns = rows.new_empty(0) if columns is None else columns
        return MaskedReference(
            rows, columns, _unit(reference[rows]), _unit(reference[:, columns].T.contiguous())
        )

    def __len__(self) -> int:
        return len(self.rows) + len(self.columns)


def _unit(slices: Tensor) -> Tensor:
    return torch.nn.functional.normalize(slices, dim=1, eps=0).nan_to_num()


def masked_cosine_sum(inputs: Tensor, grads: Tensor, reference: MaskedReference) -> Tensor:
    """Sum of each record's cosines over the kept slices only, (n,).

    Forms T·in·|rows| + T·out·|columns| multiply-adds' worth of G, a tile at a time.
    """
    wide = reference.unit_rows
    inputs, grads = inputs.to(wide), grads.to(wide)
    return _row_cosines(inputs, grads[:, :, reference.rows], reference.unit_rows) + _row_cosines(
        grads, inputs[:, :, reference.columns], reference.unit_columns
    )


def _row_cosines(inputs: Tensor, grads: Tensor, units: Tensor) -> Tensor:
    dots, norms = inputs.new_empty(2, len(inputs), len(units))
    for block, tiles_of, product in _blocks(inputs, grads, units.shape[1]):
        beside = units[block]
        rows, lengths = dots[:, block].unbind(), norms[:, block].unbind()
        for i, tile in enumerate(tiles_of):
            torch.mul(tile, beside, out=product)
            torch.sum(product, 1, out=rows[i])
            torch.linalg.vector_norm(tile, dim=1, out=lengths[i])
    return torch.where(norms > 0, dots / norms, 0.0).sum(1)


def cosines(slices: Tensor, units: Tensor) -> Tensor:
    """Cosines along the last dimension with slices of unit length; 0 where undefined."""
    return cosines_of((slices * units).sum(-1), slices.square().sum(-1))


def cosines_of(dots: Tensor, norms2: Tensor) -> Tensor:
    """Cosines from inner products with unit slices and squared norms; 0 where undefined."""
    return torch.where(norms2 > 0, dots / norms2.sqrt(), 0.0)
