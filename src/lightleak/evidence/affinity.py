"""How well each name fits each photo: cosines for a dual encoder, likelihoods for a generator.

Each photo and each sentence with a name is encoded once. Names go through in blocks, and of each
block only what the cheap half needs is kept, so that any number of names fits in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from lightleak.errors import UserError
from lightleak.evidence.collect import BatchSize, plan, run
from lightleak.evidence.readings import Floats, Integers
from lightleak.records import Failure, Photo, Record, open_rgb
from lightleak.targets import Batch, DualEncoderTarget, EncodedRecord, GenerativeTarget, Target

_Made = TypeVar("_Made")
_BLANK = Image.new("RGB", (64, 64), (127, 127, 127))
_TEXTS_AT_ONCE = 256
_PHOTOS_AT_ONCE = 128
# Names whose sentences are cached in one file, and how many numbers a block may yield.
_CACHED_NAMES = 256
_BLOCKS = (1024, 256, 64, 16)
_BLOCK_NUMBERS = 16_000_000


class Matcher(Protocol):
    """Says how well names fit photos.

    Attributes:
        block: how many names to ask for at once.
        photos: those that can be used, in the order of the last axis of `affinities`; a blank
            picture follows them.
        failures: the photos that cannot.
        truncated: how many sentences were longer than the model reads, and were cut.
    """

    block: int
    photos: tuple[Photo, ...]
    failures: tuple[Failure, ...]
    truncated: int

    def affinities(self, names: Sequence[str]) -> Floats:
        """(names, templates, photos + 1) how well each name fits, higher is better."""
        ...


def matcher(
    target: Target,
    photos: Sequence[Photo],
    templates: Sequence[str],
    *,
    size: BatchSize | None = None,
    cache: Path | None = None,
) -> Matcher:
    """The matcher for a kind of target.

    Args:
        target: the model.
        photos: of all people.
        templates: for a dual encoder, sentences with `{}` where the name goes; for a generative
            target, questions that the name answers.
        size: batch limits.
        cache: folder that keeps the embeddings of blocks of names for later runs; they depend
            on the target's hashes, the templates and the names.
    """
    size = size or BatchSize()
    if isinstance(target, DualEncoderTarget):
        return CosineMatcher(target, tuple(photos), tuple(templates), size, cache)
    if isinstance(target, GenerativeTarget):
        return LikelihoodMatcher(target, tuple(photos), tuple(templates), size)
    raise TypeError(type(target).__name__)


@dataclass
class CosineMatcher:
    """Cosines of photos with sentences, in float64 so that no block changes a comparison."""

    target: DualEncoderTarget
    photos: tuple[Photo, ...]
    templates: tuple[str, ...]
    size: BatchSize
    cache: Path | None
    block: int = field(init=False)
    failures: tuple[Failure, ...] = field(init=False)
    truncated: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        embedded: dict[str, Tensor] = {}
        failures: list[Failure] = []

        def one(batch: Batch) -> None:
            found = self.target.embed_images(batch.inputs)
            if not bool(found.isfinite().all()):
                raise FloatingPointError("its embedding is not finite")
            embedded.update(zip(batch.ids, found, strict=True))

        with torch.no_grad():
            for start in range(0, len(self.photos), _PHOTOS_AT_ONCE):
                some = self.photos[start : start + _PHOTOS_AT_ONCE]
                found, unread = _each_photo(some, self.target.pixels)
                encoded = [EncodedRecord(p.id, each, frozenset(), 1) for p, each in found]
                failures += [*unread, *run(self.target, plan(encoded, self.size), one)]
            blank = EncodedRecord("", self.target.pixels(_BLANK), frozenset(), 1)
            wrong = run(self.target, [[blank]], one)
        if wrong:
            raise UserError(f"it cannot embed a picture ({wrong[0].error})", self.target.name)
        self.photos = tuple(photo for photo in self.photos if photo.id in embedded)
        self.failures = tuple(failures)
        kept = [embedded[key] for key in (*(photo.id for photo in self.photos), "")]
        self._images = torch.stack(kept).double().cpu().numpy()
        most = _BLOCK_NUMBERS / (len(self.templates) * len(kept))
        self.block = next((block for block in _BLOCKS if block <= most), _BLOCKS[-1])

    def affinities(self, names: Sequence[str]) -> Floats:
        """(names, templates, photos + 1) cosines."""
        parts = []
        for first in range(0, len(names), _CACHED_NAMES):
            some = names[first : first + _CACHED_NAMES]
            texts = [template.replace("{}", name) for name in some for template in self.templates]
            found = self._cached(texts)
            self.truncated += int(found[:, -1].sum())
            parts.append(found[:, :-1].astype(np.float64) @ self._images.T)
        return np.concatenate(parts).reshape(len(names), len(self.templates), -1)

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> Floats:
        """(texts, d + 1) embeddings, and 1 where the text had to be cut.

        Texts of like length go through together.
        """
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: list[Tensor] = []
        for start in range(0, len(order), _TEXTS_AT_ONCE):
            tokens, cut = self.target.tokens(
                [texts[i] for i in order[start : start + _TEXTS_AT_ONCE]]
            )
            vectors = self.target.embed_texts(tokens).cpu()
            flags = torch.tensor(cut, dtype=vectors.dtype)[:, None]
            found.append(torch.cat([vectors, flags], 1))
        embedded: Floats = torch.cat(found)[np.argsort(order)].numpy()
        if not np.isfinite(embedded).all():
            raise UserError(
                "the embedding of a sentence is not finite",
                self.target.name,
                "Is the model intact, and its precision wide enough?",
            )
        return embedded

    def _cached(self, texts: Sequence[str]) -> Floats:
        if self.cache is None:
            return self._embed(texts)
        decides = [2, sorted(self.target.hashes.items()), str(self.target.dtype), list(texts)]
        file = self.cache / f"{hashlib.sha256(json.dumps(decides).encode()).hexdigest()}.npy"
        try:
            stored: Floats = np.load(file, allow_pickle=False)
            whole = stored.shape == (len(texts), self._images.shape[1] + 1)
            if whole and np.isfinite(stored).all():
                return stored
        except (OSError, ValueError, EOFError, AttributeError, TypeError):
            pass  # Not there, or torn: it is made again.
        embedded = self._embed(texts)
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            _write_whole(file, embedded)
        except OSError:
            self.cache = None  # A cache that cannot be written is only slower.
        return embedded


@dataclass
class LikelihoodMatcher:
    """Log-likelihoods, in nats, of names as answers to questions about photos."""

    target: GenerativeTarget
    photos: tuple[Photo, ...]
    templates: tuple[str, ...]
    size: BatchSize
    block: int = 4
    failures: tuple[Failure, ...] = field(init=False)
    truncated: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        def encode(image: Image.Image) -> None:
            self.target.encode(self._record("", "x", self.templates[0]), image)

        found, failures = _each_photo(self.photos, encode)
        self.photos = tuple(photo for photo, _ in found)
        self.failures = tuple(failures)

    def affinities(self, names: Sequence[str]) -> Floats:
        """(names, templates, photos + 1) log-likelihoods."""
        shape = (len(names), len(self.templates), len(self.photos) + 1)
        found = np.full(shape, np.nan)
        for k in range(shape[2]):
            image = _BLANK if k == len(self.photos) else open_rgb(self.photos[k].file)
            records = [
                self._record(f"{i} {j}", name, question)
                for j, question in enumerate(self.templates)
                for i, name in enumerate(names)
            ]
            encoded = [self.target.encode(record, image) for record in records]

            def one(batch: Batch, k: int = k) -> None:
                said = self.target.outputs(batch).likelihoods()
                for key, values in zip(batch.ids, said, strict=True):
                    i, j = map(int, key.split())
                    found[i, j, k] = float(values.double().sum())

            with torch.no_grad():
                failures = run(self.target, plan(encoded, self.size), one)
            if failures:
                raise UserError(
                    f"the likelihood of a name cannot be read ({failures[0].error})",
                    self.target.name,
                )
        return found

    def _record(self, key: str, name: str, question: str) -> Record:
        return Record(id=key, image=b"", text=name, prompt=question)


def best_of_block(affinities: Floats, names: Integers, count: int) -> pa.Table:
    """The names of a block that fit each photo and template best; of equals the first.

    Args:
        affinities: (names, templates, photos).
        names: (names,) their indices among all names.
        count: how many to keep.

    Returns:
        `photo`, `template` (indices), and lists of `name` and `affinity`, best first.
    """
    count = min(count, len(names))
    by_place = np.ascontiguousarray(affinities.reshape(len(names), -1).T)
    least = np.partition(by_place, -count, axis=1)[:, -count, None]
    chosen = by_place >= least
    if chosen.sum() > count * len(chosen):  # Equals at the cut: the first of them stay.
        equal = by_place == least
        free = count - (by_place > least).sum(axis=1, keepdims=True)
        chosen &= ~equal | (equal.cumsum(axis=1) <= free)
    kept = np.nonzero(chosen)[1].reshape(-1, count)
    values = np.take_along_axis(by_place, kept, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    templates, photos = np.indices(affinities.shape[1:])
    return pa.table(
        {
            "photo": photos.ravel().astype(np.int32),
            "template": templates.ravel().astype(np.int32),
            "name": _lists(names[np.take_along_axis(kept, order, 1)].astype(np.int32)),
            "affinity": _lists(np.take_along_axis(values, order, 1)),
        }
    )


def _lists(rows: np.ndarray) -> pa.Array:
    """A matrix as a column of lists."""
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(rows).ravel()))


def mean_of_block(affinities: Floats, names: Integers, truncated: int) -> pa.Table:
    """Each name's affinity with each photo, averaged over the templates.

    Args:
        affinities: (names, templates, photos).
        names: (names,) their indices among all names.
        truncated: how many sentences of the block had to be cut; kept beside the table.
    """
    means = affinities.mean(axis=1).astype(np.float32)
    table = pa.table({"name": names.astype(np.int32), "affinities": _lists(means)})
    return table.replace_schema_metadata({"truncated": str(truncated)})


def whole_block(affinities: Floats, names: Integers) -> pa.Table:
    """Each name's affinity with each photo by each template, (templates × photos) end to end."""
    return pa.table(
        {
            "name": names.astype(np.int32),
            "affinities": _lists(affinities.reshape(len(names), -1)),
        }
    )


def _each_photo(
    photos: Sequence[Photo], make: Callable[[Image.Image], _Made]
) -> tuple[list[tuple[Photo, _Made]], list[Failure]]:
    found: list[tuple[Photo, _Made]] = []
    failures: list[Failure] = []
    for photo in photos:
        try:
            found.append((photo, make(open_rgb(photo.file))))
        except Exception as error:
            # Processors refuse in any way they like; the photo says which.
            failures.append(Failure(photo.id, "encode", str(error)))
    return found, failures


def _write_whole(file: Path, array: Floats) -> None:
    """Write beside, then take the file's place, so that no reader meets half of it."""
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        np.save(stream, array)
    temporary.replace(file)
