"""What every page shows, read from the run folder."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image, ImageOps

from lightleak.records.images import READABLE_FORMATS
from lightleak.runs import Run, read_table

FAILURES_SHOWN = 20
THUMBNAIL = 128
# So few points a side leave skin, hair and background, and nobody's features.
BLURRED = 7


@dataclass(frozen=True)
class Failure:
    """A record, person or photo that failed, or that a signal could not score."""

    id: str
    set: str
    stage: str
    error: str


@dataclass(frozen=True)
class Failures:
    """All failures counted by stage and side, and the first of them."""

    counts: tuple[tuple[str, str, int], ...]
    shown: tuple[Failure, ...]
    total: int


def failures(run: Run) -> Failures:
    """What could not be used or scored."""
    rows = [_failure(**row) for row in read_table(run.failures_file).to_pylist()]
    counted = Counter((row.stage, row.set) for row in rows)
    counts = tuple((stage, side, count) for (stage, side), count in counted.most_common())
    return Failures(counts, tuple(rows[:FAILURES_SHOWN]), len(rows))


def _failure(id: str, stage: str, error: str, set: str | None = None) -> Failure:
    if set is None:  # Identity audits and probes lead the id by the set, where there is one.
        set, _, id = id.partition("/") if "/" in id else ("", "", id)
    return Failure(id, set, stage, error)


def hashes(run: Run) -> dict[str, str]:
    """SHA-256 of the files that a page is made from, evidence apart."""
    files = sorted(run.folder.glob("[!.]*.json")) + sorted(run.folder.glob("[!.]*.parquet"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def thumbnail(file: str, side: int = THUMBNAIL) -> str | None:
    """The picture as a JPEG data URI of at most side × side pixels; None if it cannot be read."""
    return _embedded(file, side, "JPEG", Image.Resampling.BICUBIC)


def blurred(file: str) -> str | None:
    """The picture as a PNG data URI of at most 7 × 7 averages; None if it cannot be read.

    The page enlarges them: what is not embedded cannot be recovered from it.
    """
    return _embedded(file, BLURRED, "PNG", Image.Resampling.BOX)


def _embedded(file: str, side: int, kind: str, resampling: Image.Resampling) -> str | None:
    try:
        # Only what Pillow decodes by itself; no picture may start another program.
        with Image.open(file, formats=READABLE_FORMATS) as image:
            image.draft("RGB", (THUMBNAIL, THUMBNAIL))
            small = ImageOps.exif_transpose(image).convert("RGB")
    except Exception:  # Missing, or damaged since: then decoders raise nearly anything.
        return None
    small.thumbnail((side, side), resampling)
    small.info.clear()  # Comments and profiles would travel with it.
    stream = BytesIO()
    small.save(stream, kind, quality=80)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values of nested content, for a table of two columns."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        elif isinstance(value, list):
            yield name, ", ".join(str(each) for each in value)
        else:
            yield name, "not given" if value in (None, {}) else str(value)
