"""What a record is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from lightleak.records.images import image_sha256, open_rgb

DEFAULT_PROMPT = "Describe the image."


@dataclass(frozen=True)
class Record:
    """One image with its text.

    Attributes:
        id: unique within its set.
        image: an image file, or the encoded bytes of one (PNG, JPEG, WebP …).
        text: what the model was taught to answer; never empty.
        prompt: the question; "Describe the image." unless given.
        group: what is sampled together (patient, photographer, page); None when each record
            stands alone.
        meta: anything else that the file carried; not to be written to. A plain dict, because
            records travel to worker processes and a read-only view cannot be pickled.
    """

    id: str
    image: Path | bytes
    text: str
    prompt: str = DEFAULT_PROMPT
    group: str | None = None
    meta: Mapping[str, object] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Failure:
    """A record that could not be used, and why. Never scored, never dropped in silence."""

    id: str
    stage: str
    error: str


@dataclass(frozen=True)
class RecordSet:
    """The records of one file or folder, in file order.

    Attributes:
        records: the usable ones.
        failures: the unusable ones, each with its reason.
        source: the file or folder.
        sha256: hex digest over the content of all usable records: ids, texts, prompts, groups
            and image bytes. Two sets with the same digest give the same evidence.
    """

    records: tuple[Record, ...]
    failures: tuple[Failure, ...]
    source: Path
    sha256: str


def content_sha256(records: Iterable[Record]) -> str:
    """Hex digest over ids, prompts, texts, groups and encoded images, in the order given.

    Raises:
        UserError: an image file is missing or may not be read.
    """
    digest = sha256()
    for record in records:
        image = image_sha256(record.image)
        # A JSON array shows where each field ends, so no two sets share one stream of bytes.
        fields = [record.id, record.prompt, record.text, record.group, image]
        digest.update(json.dumps(fields).encode())
    return digest.hexdigest()


def content_key(record: Record) -> str:
    """What a record is known by whatever file it stands in: a hex digest over the decoded pixels,
    the prompt and the text.

    Raises:
        UserError: the image cannot be decoded.
    """
    image = open_rgb(record.image)
    pixels = sha256(image.tobytes()).hexdigest()
    fields = [image.size, pixels, record.prompt, record.text]
    return sha256(json.dumps(fields).encode()).hexdigest()
