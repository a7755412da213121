"""Load: a file or folder of records becomes a `RecordSet`, with every fault named."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from lightleak.errors import UserError
from lightleak.records.formats.conversations import conversation_rows
from lightleak.records.formats.jsonl import jsonl_rows, parse_json
from lightleak.records.formats.rows import Row
from lightleak.records.formats.tables import csv_rows, parquet_rows
from lightleak.records.record import (
    DEFAULT_PROMPT,
    Failure,
    Record,
    RecordSet,
    content_sha256,
)

READERS = {
    ".jsonl": jsonl_rows,
    ".json": conversation_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def load(
    path: str | Path,
    *,
    allow_outside: bool = False,
    strict: bool = False,
    id_prefix: str = "",
) -> RecordSet:
    """Read records from JSONL, CSV, Parquet, LLaVA or ShareGPT JSON, or an image folder.

    An image folder is a folder with a metadata file whose `file_name` names the images (the
    Hugging Face convention). A record without an id takes its file name in an image folder, and
    its row number, counted from 0, elsewhere; JSONL demands ids. Images are found from the
    folder of the file and hashed, but not decoded: see `readable`.

    Args:
        path: the file or folder.
        allow_outside: let images lie outside the folder of the file.
        strict: raise the first fault of a record instead of listing it in `failures`.
        id_prefix: put before every id, to keep apart the ids of several files.

    Raises:
        UserError: the file as a whole cannot be used: missing, in no known format, damaged,
            without records, with an unknown column or with one id twice; or, when strict, a
            record in it.
    """
    source = Path(path)
    try:
        file = _records_file(source)
    except OSError as reason:
        raise UserError(f"the path cannot be opened ({reason.strerror})", str(source)) from reason
    folder = file.parent.resolve()
    places: dict[str, str] = {}
    records: list[Record] = []
    failures: list[Failure] = []
    for row in _rows(file):
        record_id = id_prefix + _id(row, file)
        if record_id in places:
            raise UserError(
                f"the id {record_id!r} stands at {places[record_id]} and again at {row.place}",
                str(file),
                "Give every record an id of its own.",
            )
        places[record_id] = row.place
        try:
            records.append(_record(row, record_id, folder, allow_outside))
        except UserError as fault:
            where = f"{file}, {row.place}, record {record_id!r}"
            error = UserError(fault.what, where, fault.what_to_do)
            if strict:
                raise error from fault
            failures.append(Failure(record_id, "load", str(error)))
    if not places:
        raise UserError("there are no records in it", str(file), "Check that it is the right file.")
    return RecordSet(tuple(records), tuple(failures), source, content_sha256(records))


def _records_file(source: Path) -> Path:
    """The file that holds the records: the path itself, or the metadata file in the folder."""
    if source.is_dir():
        found = [name for name in METADATA_NAMES if (source / name).is_file()]
        if len(found) != 1:
            raise UserError(
                f"the folder has {' and '.join(found) or 'no metadata file'}",
                str(source),
                f"Keep exactly one of {', '.join(METADATA_NAMES)} in it.",
            )
        return source / found[0]
    if not source.exists():
        raise _missing(source)
    if source.suffix.lower() not in READERS:
        raise UserError(
            "the format is not recognised",
            str(source),
            f"Give a file that ends in {', '.join(READERS)}, or a folder with one of "
            f"{', '.join(METADATA_NAMES)}.",
        )
    return source


def _missing(source: Path) -> UserError:
    looks_like_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None
    if looks_like_hub and source.suffix not in READERS and not source.parent.is_dir():
        return UserError(
            "there is no such file; a data set of the Hugging Face hub must be downloaded first",
            str(source),
            f"Run `hf download {source} --repo-type dataset --local-dir DIR`, "
            "then give a file or folder in DIR.",
        )
    return UserError("there is no such file or folder", str(source), "Check the path.")


def _rows(file: Path) -> Iterator[Row]:
    try:
        if file.stat().st_size > 0:
            yield from READERS[file.suffix.lower()](file)
    except OSError as error:
        raise UserError(f"the file cannot be read ({error.strerror})", str(file)) from error


def _id(row: Row, file: Path) -> str:
    """The row's id as a string.

    Ids and places are all that a failure is known by, so a bad id is a fault of the whole file.
    """
    where = f"{file}, {row.place}"
    image = row.fields.get("image")
    try:
        given = _label(row.fields.get("id"), "id")
        if given is not None:
            return given
        if file.name in METADATA_NAMES and isinstance(image, str) and image:
            return _string(image, "image")
    except UserError as fault:
        raise UserError(fault.what, where, fault.what_to_do) from fault
    if file.suffix.lower() == ".jsonl":
        raise UserError("the record has no id", where, 'Give every record an "id" of its own.')
    return str(row.number)


def _record(row: Row, record_id: str, folder: Path, allow_outside: bool) -> Record:
    """Check one row. Faults are raised without a place, which the caller knows."""
    if row.fault:
        raise UserError(row.fault, what_to_do="Mend the record or remove it.")
    text = row.fields.get("text")
    if text is None or not _string(text, "text").strip():
        raise UserError("the text is empty", what_to_do="Give a text or remove the record.")
    prompt = row.fields.get("prompt")
    return Record(
        id=record_id,
        image=_image(row.fields.get("image"), folder, allow_outside),
        text=_string(text, "text"),
        prompt=DEFAULT_PROMPT if prompt is None else _string(prompt, "prompt"),
        group=_label(row.fields.get("group"), "group"),
        meta=_meta(row.fields.get("meta")),
    )


def _image(image: object, folder: Path, allow_outside: bool) -> Path | bytes:
    if isinstance(image, bytes) and image:
        return image
    if not image:
        raise UserError("there is no image", what_to_do="Name one or remove the record.")
    named = _string(image, "image")
    try:
        # The resolved path is kept, so that what was checked is what will be opened.
        file = (folder / named).resolve()
        if not allow_outside and not file.is_relative_to(folder):
            raise UserError(
                f"the image {named!r} lies outside the folder of the records",
                what_to_do="Move it inside, or allow images from outside if you trust the file.",
            )
        if not file.is_file():
            raise UserError(f"there is no image file {named!r}", what_to_do="Check its path.")
        file.open("rb").close()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the image {named!r} cannot be opened ({error})") from error
    return file


def _meta(meta: object) -> dict[str, object]:
    if meta is None:
        return {}
    if isinstance(meta, str):  # a table's cell
        try:
            meta = parse_json(meta.encode())
        except ValueError as error:
            raise UserError(f"meta is not JSON ({error})", what_to_do="Write an object.") from error
    if not isinstance(meta, dict):
        raise _wrong_type("meta", "an object", meta)
    return meta


def _label(value: object, field: str) -> str | None:
    """An id or a group: a string or a number; what is blank, null or NaN is absent."""
    if isinstance(value, float):
        # Tables turn whole numbers to floating point when some are missing.
        value = None if math.isnan(value) else int(value) if value.is_integer() else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None or not _string(value, field).strip():
        return None
    return _string(value, field)


def _string(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(field, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{field} has half a character (a lone surrogate)", what_to_do="Write it again."
        ) from error
    return value


def _wrong_type(field: str, expected: str, value: object) -> UserError:
    return UserError(
        f"{field} must be {expected}, not {type(value).__name__}", what_to_do="Mend the record."
    )
