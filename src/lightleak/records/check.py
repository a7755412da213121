"""Check: every image is decoded once before anything expensive begins."""

from __future__ import annotations

from dataclasses import replace

from lightleak.errors import UserError
from lightleak.records.images import open_rgb
from lightleak.records.record import Failure, Record, RecordSet, content_sha256


def readable(record_set: RecordSet, *, strict: bool = False) -> RecordSet:
    """Move records whose image cannot be decoded to the failures, with stage "image".

    Args:
        record_set: what `load` returned.
        strict: raise the first such fault instead.

    Raises:
        UserError: an image cannot be decoded and `strict` is set.
    """
    records: list[Record] = []
    failures = list(record_set.failures)
    for record in record_set.records:
        try:
            open_rgb(record.image)
            records.append(record)
        except UserError as fault:
            where = f"record {record.id!r} ({fault.where})"
            error = UserError(fault.what, where, fault.what_to_do)
            if strict:
                raise error from fault
            failures.append(Failure(record.id, "image", str(error)))
    if len(records) == len(record_set.records):
        return record_set
    return replace(
        record_set,
        records=tuple(records),
        failures=tuple(failures),
        sha256=content_sha256(records),
    )
