"""Tables: CSV and Parquet, read batch by batch with pyarrow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from lightleak.errors import UserError
from lightleak.records.formats.rows import FIELD_OF, Row, fields_of_columns

# A line of a CSV file may not be longer than this block (pyarrow's own default is 1 MB).
CSV_BLOCK_BYTES = 64 * 2**20
# Few rows at a time, because each may hold the bytes of an image.
PARQUET_BATCH_ROWS = 128
# pyarrow checks most encodings while it reads, but some strings only when they are taken out.
UNREADABLE = (pa.ArrowException, UnicodeDecodeError)


def csv_rows(file: Path) -> Iterator[Row]:
    """Yield a row for each line of values; an empty cell counts as absent.

    Raises:
        UserError: the file is not CSV, or a column is unknown or missing.
    """
    try:
        reader = csv.open_csv(
            file,
            csv.ReadOptions(block_size=CSV_BLOCK_BYTES, use_threads=False),
            csv.ParseOptions(newlines_in_values=True),
            csv.ConvertOptions(column_types=dict.fromkeys(FIELD_OF, pa.string())),
        )
        for row in _rows(file, reader.schema.names, reader):
            yield Row(row.place, row.number, {k: v for k, v in row.fields.items() if v != ""})
    except UNREADABLE as error:
        raise UserError(
            f"this is not a readable CSV file ({error})",
            str(file),
            "Use UTF-8, commas, and a first line with the names of the columns.",
        ) from error


def parquet_rows(file: Path) -> Iterator[Row]:
    """Yield a row for each row; an image is bytes, a path, or a struct of `bytes` and `path`.

    Raises:
        UserError: the file is not Parquet, or a column is unknown or missing.
    """
    try:
        with parquet.ParquetFile(file) as table:
            batches = table.iter_batches(PARQUET_BATCH_ROWS)
            for row in _rows(file, table.schema_arrow.names, batches):
                image = row.fields.get("image")
                if isinstance(image, dict):
                    image = image.get("bytes") or image.get("path")
                yield Row(row.place, row.number, {**row.fields, "image": image})
    except (*UNREADABLE, OSError) as error:
        raise UserError(
            f"this is not a readable Parquet file ({error})",
            str(file),
            "Check that you may read it, or write it again.",
        ) from error


def _rows(file: Path, columns: Sequence[str], batches: Iterable[Any]) -> Iterator[Row]:
    field = fields_of_columns(columns, str(file))
    for needed in ("image", "text"):
        if needed not in field.values():
            names = " or ".join(name for name in FIELD_OF if FIELD_OF[name] == needed)
            raise UserError(f"there is no column for the {needed}", str(file), f"Add {names}.")
    values = (row for batch in batches for row in batch.to_pylist())
    for number, row in enumerate(values):
        fields = {field[column]: value for column, value in row.items()}
        yield Row(f"row {number} (counted from 0)", number, fields)
