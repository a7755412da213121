"""Whose are the rows of a layer: record by record, whatever the model packs or cuts."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightleak.targets import Batch


class UnevenRows(Exception):
    """A captured layer's rows cannot be dealt out to the records of the batch; names the layer."""


def by_record(
    name: str, rows: Tensor, batch: Batch, alone: dict[tuple[object, str], Fraction]
) -> Tensor:
    """View a layer's rows as (records, rows a record, features); shorter ones end in zeros.

    Rows of zeros add nothing to a gradient. Arguments and errors are those of `row_counts`.
    """
    counts = row_counts(name, rows, batch, alone)
    if min(counts) == max(counts):
        return rows.reshape(len(batch), counts[0], rows.shape[-1])
    return pad_sequence(list(torch.split(rows.flatten(0, -2), counts)), batch_first=True)


def row_counts(
    name: str, rows: Tensor, batch: Batch, alone: dict[tuple[object, str], Fraction]
) -> list[int]:
    """How many of a layer's rows each record owns; they stand in the order of the records.

    Vision towers may pack the patches of all records, or line up their tiles: then each record
    owns as many as its share of the pieces. A tower that drops some rows, or has rows that all
    records share, breaks that, which shows against what a record of this shape took alone.

    Args:
        name: of the layer.
        rows: (…, features).
        batch: whose they are.
        alone: rows a piece, by batch shape and layer; learned from batches of one.

    Raises:
        UnevenRows: call again with one record at a time.
    """
    n, total = len(batch), rows.shape[:-1].numel()
    if n == 1:
        alone[batch.key, name] = Fraction(total, batch.pieces[0])
    elif rows.ndim == 3 and rows.shape[0] == n:
        return [rows.shape[1]] * n
    each = alone.get((batch.key, name), Fraction())
    counts = [each * pieces for pieces in batch.pieces]
    if sum(counts) != total or any(count.denominator > 1 for count in counts):
        raise UnevenRows(name)
    return [int(count) for count in counts]
