"""What a generative target says of copies of a record that were changed a little.

Each reading takes forwards of its own. The copies of one record go through together and with no
other record's, and what is changed follows from the record's id alone: so neither the batch, nor
the process, nor a second run changes a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from hashlib import sha256
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor, nn

from lightleak.evidence.augment import augment_image
from lightleak.evidence.collect import BatchSize, Reader, encode, plan, run
from lightleak.evidence.hidden import layers
from lightleak.evidence.readings import (
    EXTRA,
    AugmentedDivergences,
    CorruptedEmbeddings,
    NeighbourLosses,
)
from lightleak.records import Record, open_rgb
from lightleak.targets import Answers, Batch, EncodedRecord, GenerativeTarget

Read = TypeVar("Read")

# As FiMMIA's released code: six neighbours of each kind of change; a tenth of the words, at least
# five and at most forty.
_EACH_KIND = 6
_SHARE, _FEWEST, _MOST = 0.1, 5, 40
_MASK = "___"


@dataclass(frozen=True)
class PerturbedReader:
    """Adds to another reader's rows what changed copies of each record yield.

    Attributes:
        reader: what reads the records themselves.
        target: the model.
        needs: which kinds of evidence to add.
        size: batch limits.
    """

    reader: Reader
    target: GenerativeTarget
    needs: Set[type]
    size: BatchSize

    @property
    def _added(self) -> Mapping[str, Callable[..., list[float]]]:
        return {column: read for kind, (column, read) in _OF_KIND.items() if kind in self.needs}

    def columns(self, numbers: pa.DataType) -> dict[str, pa.DataType]:
        """Names and types of what `rows` yields; `numbers` is a list of floats."""
        return {**self.reader.columns(numbers), **dict.fromkeys(self._added, numbers)}

    def rows(
        self, records: Sequence[Record], encoded: Sequence[EncodedRecord], outputs: Answers
    ) -> list[dict[str, object]]:
        """One row a record of a batch."""
        rows = self.reader.rows(records, encoded, outputs)
        for row, record, said in zip(rows, records, outputs.log_probabilities, strict=True):
            for column, read in self._added.items():
                row[column] = read(self.target, self.size, record, said)
        return rows


def divergences(
    target: GenerativeTarget, size: BatchSize, record: Record, said: Tensor
) -> list[float]:
    """Mean over the answer's tokens of KL(p‖p_k), for each augmentation of the image, in nats.

    Args:
        target: the model.
        size: batch limits.
        record: the record.
        said: (answer tokens, vocabulary) log p, given the image as it is.
    """
    image = open_rgb(record.image)
    copies = [
        replace(record, image=_stored(augment_image(image, random(record, "augmentation", k))))
        for k in range(EXTRA[AugmentedDivergences])
    ]

    def read(batch: Batch) -> list[float]:
        return [divergence(said, each) for each in target.outputs(batch).log_probabilities]

    return _numbers(_through(target, size, copies, read))


def divergence(first: Tensor, second: Tensor) -> float:
    """Mean over tokens of Σ p (log p − log q); both (tokens, vocabulary) log-probabilities."""
    probabilities = first.exp()
    terms = torch.where(probabilities > 0, probabilities * (first - second), 0.0)
    return float(terms.sum(-1).mean())


def losses_of_neighbours(
    target: GenerativeTarget, size: BatchSize, record: Record, said: Tensor
) -> list[float]:
    """Mean cross-entropy of each of the text's neighbours, in nats a token.

    Arguments are those of `divergences`.
    """
    del said
    copies = [replace(record, text=text) for text in neighbours(record)]

    def read(batch: Batch) -> list[float]:
        found: list[float] = target.outputs(batch).losses.tolist()
        return found

    return _numbers(_through(target, size, copies, read))


def neighbours(record: Record) -> list[str]:
    """The record's text with some of its words masked, left out, doubled or exchanged.

    Numbers and strengths are those of FiMMIA (arXiv:2512.02786), which lets a language model fill
    the masked words; here they stay masked. A text of one word has none.
    """
    words = record.text.split()
    if len(words) < 2:
        return []
    count = min(max(int(_SHARE * len(words)), min(_FEWEST, len(words) - 1)), _MOST)
    return [
        " ".join(change(words, random(record, change.__name__, k), count))
        for change in (_masked, _without, _doubled, _exchanged)
        for k in range(_EACH_KIND)
    ]


def _masked(words: Sequence[str], draw: np.random.Generator, count: int) -> list[str]:
    chosen = set(draw.permutation(len(words))[:count].tolist())
    return [_MASK if i in chosen else word for i, word in enumerate(words)]


def _without(words: Sequence[str], draw: np.random.Generator, count: int) -> list[str]:
    chosen = set(draw.permutation(len(words))[:count].tolist())
    return [word for i, word in enumerate(words) if i not in chosen]


def _doubled(words: Sequence[str], draw: np.random.Generator, count: int) -> list[str]:
    chosen = set(draw.permutation(len(words))[:count].tolist())
    return [word for i, each in enumerate(words) for word in [each] * (1 + (i in chosen))]


def _exchanged(words: Sequence[str], draw: np.random.Generator, count: int) -> list[str]:
    changed = list(words)
    for _ in range(count):
        i, j = draw.permutation(len(words))[:2]
        changed[i], changed[j] = changed[j], changed[i]
    return changed


def cosines_of_corruptions(
    target: GenerativeTarget, size: BatchSize, record: Record, said: Tensor
) -> list[float]:
    """Cosine of the image's visual embedding with that of each of its corruptions.

    The embedding is the mean over the image's tokens of what the language model is given: the
    projector's output, or the vision tower's where there is no projector. Arguments are those of
    `divergences`.
    """
    del said
    image = open_rgb(record.image)
    pictures = [image, *corruptions(image, random(record, "corruption", 0))]
    copies = [replace(record, image=_stored(each)) for each in pictures]
    seen = [layer.name for layer in layers(target) if layer.tower != "language"]

    def embed(batch: Batch) -> list[Tensor]:
        rows = _output(target, seen[-1], batch).to(target.wide)
        return list(rows.reshape(len(batch), -1, rows.shape[-1]).mean(1))

    embeddings = _through(target, size, copies, embed) if seen else [None] * len(copies)
    own, *others = (torch.tensor([math.nan]) if each is None else each.cpu() for each in embeddings)
    return [float(nn.functional.cosine_similarity(own, other, dim=0)) for other in others]


def corruptions(image: Image.Image, draw: np.random.Generator) -> list[Image.Image]:
    """The image blurred, in noise, as a poor JPEG, in coarse pixels and paler; all of its size."""
    width, height = image.size
    noise = draw.normal(0, 25, (height, width, 3))
    jpeg = BytesIO()
    image.save(jpeg, "JPEG", quality=10)
    coarse = image.resize((max(1, width // 4), max(1, height // 4)), Image.Resampling.BOX)
    return [
        image.filter(ImageFilter.GaussianBlur(min(image.size) / 32)),
        Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)),
        open_rgb(jpeg.getvalue()),
        coarse.resize(image.size, Image.Resampling.NEAREST),
        ImageEnhance.Contrast(image).enhance(0.4),
    ]


def random(record: Record, purpose: str, k: int) -> np.random.Generator:
    """Random numbers that belong to a record: the same in every run and process."""
    return np.random.default_rng(seed_of(record.id, purpose, k))


def seed_of(key: str, purpose: str, k: int = 0) -> int:
    """A number that belongs to a record, of 31 bits: more are not taken everywhere."""
    return int.from_bytes(sha256(f"{purpose} {k} {key}".encode()).digest()[:4]) >> 1


def _through(
    target: GenerativeTarget,
    size: BatchSize,
    copies: Sequence[Record],
    read: Callable[[Batch], Sequence[Read]],
) -> list[Read | None]:
    """What `read` finds for each copy of one record; None where the model does not take it."""
    numbered = [replace(copy, id=str(k)) for k, copy in enumerate(copies)]
    found: dict[str, Read] = {}

    @torch.no_grad()
    def one(batch: Batch) -> None:
        found.update(zip(batch.ids, read(batch), strict=True))

    run(target, plan(encode(target, numbered).records, size, rows=False), one)
    return [found.get(copy.id) for copy in numbered]


def _numbers(found: Sequence[float | None]) -> list[float]:
    return [math.nan if each is None else each for each in found]


def _stored(image: Image.Image) -> bytes:
    """A picture as a record carries one, without loss."""
    stream = BytesIO()
    image.save(stream, "BMP")
    return stream.getvalue()


class _Seen(Exception):
    """What was looked for has been seen; the rest of the pass is not needed."""


def _output(target: GenerativeTarget, name: str, batch: Batch) -> Tensor:
    """What the module called `name` yields for a batch; nothing behind it is computed."""
    seen: list[Tensor] = []

    def left(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        del module, inputs
        seen.append(output if isinstance(output, Tensor) else output[0])
        raise _Seen

    handle = target.model.get_submodule(name).register_forward_hook(left)
    try:
        target.outputs(batch)
    except _Seen:
        pass
    finally:
        handle.remove()
    return seen[0]


_OF_KIND: Mapping[type, tuple[str, Callable[..., list[float]]]] = {
    AugmentedDivergences: ("augmented_divergences", divergences),
    NeighbourLosses: ("neighbour_losses", losses_of_neighbours),
    CorruptedEmbeddings: ("corruption_cosines", cosines_of_corruptions),
}
