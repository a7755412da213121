"""Whose are the rows of a layer: record by record, whatever the model packs or cuts."""

from __future__ import annotations

from torch import Tensor

from lightleak.targets import Batch


class UnevenRows(Exception):
    """A captured layer's rows cannot be dealt out to the records of the batch."""


def by_record(
    name: str, rows: Tensor, batch: Batch, alone: dict[tuple[object, str], int]
) -> Tensor:
    """View a layer's rows as (records, rows a record, features).

    Vision towers may pack records or cut them into tiles; the records of a batch have equal
    shapes, so each owns an equal run of rows. A tower that drops some rows breaks that, which
    shows against what a record of this shape took when it was alone.

    Args:
        name: of the layer.
        rows: (…, features).
        batch: whose they are.
        alone: rows that a record takes, by batch shape and layer; learned from batches of one.

    Raises:
        UnevenRows: call again with one record at a time.
    """
    n, features = len(batch), rows.shape[-1]
    total = rows.numel() // features
    plain = rows.ndim == 3 and rows.shape[0] == n
    key = (batch.key, name)
    if n == 1:
        alone[key] = total
    elif not plain and alone.get(key, -1) * n != total:
        raise UnevenRows
    return rows.reshape(n, total // n, features)
