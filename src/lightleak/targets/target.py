"""What every target is: records in, batches through the model, outputs with one loss a record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor, nn

from lightleak.records import Record
from lightleak.targets.families import Parts, find_parts

# Dimensions of an image's tensor that has an axis of tiles: (1, tiles, channels, height, width).
_TILED = 5


@dataclass(frozen=True)
class EncodedRecord:
    """One record as the model takes it.

    Attributes:
        id: the record's id.
        inputs: the processor's tensors, batch of one.
        along_tokens: which of them are (1, `n_tokens`).
        n_tokens: length of `input_ids`.
        answer_start: index of the first token that is predicted; the answer runs to the end.
        boundary_ambiguous: the answer's first token had merged with the prompt's last, so that
            the answer begins at the first token that differs.
        truncated: the text is longer than the model reads, and was cut as in its training.
    """

    id: str
    inputs: Mapping[str, Tensor]
    along_tokens: frozenset[str]
    n_tokens: int
    answer_start: int = 0
    boundary_ambiguous: bool = False
    truncated: bool = False

    @property
    def shape_key(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Shapes of all but tokens, tiles and patches; records batch together when it is equal."""
        tiled = self.tiled
        return tuple(
            (name, tuple(value.shape[2 if name in tiled else 1 :]))
            for name, value in sorted(self.inputs.items())
            if name not in self.along_tokens
        )

    @property
    def tiled(self) -> frozenset[str]:
        """Which inputs are (1, tiles, …): pixels and their mask, of an image cut into tiles."""
        image = self._image
        if image is None or image.ndim != _TILED:
            return frozenset()
        return frozenset(
            name
            for name, value in self.inputs.items()
            if value.ndim > 2 and value.shape[:2] == image.shape[:2]
        )

    @property
    def pieces(self) -> int:
        """How many tiles or patches the image is; 1 where it is whole."""
        image = self._image
        return 1 if image is None else int(image.shape[1 if image.ndim == _TILED else 0])

    @property
    def _image(self) -> Tensor | None:
        others = [value for name, value in self.inputs.items() if name not in self.along_tokens]
        return max(others, key=Tensor.numel, default=None)


@dataclass(frozen=True)
class Batch:
    """Records of one shape, padded on the right.

    Attributes:
        inputs: tensors on the target's device; token tensors are (n, length), tiles are
            (n, tiles, …), and the patches of all records stand end to end.
        ids: the records' ids, n of them.
        answers: each record's answer as (start, stop) in the token axis.
        key: the shape that the records share (`EncodedRecord.shape_key`).
        pieces: how many tiles or patches each record's image is.
    """

    inputs: Mapping[str, Tensor]
    ids: tuple[str, ...]
    answers: tuple[tuple[int, int], ...]
    key: tuple[tuple[str, tuple[int, ...]], ...]
    pieces: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


class Outputs(ABC):
    """What the model says of a batch."""

    @property
    @abstractmethod
    def losses(self) -> Tensor:
        """(n,) each record's own loss, in nats; gradients flow when they are enabled."""

    @abstractmethod
    def vectors(self) -> list[Tensor]:
        """One vector a record of all that evidence is made of; no batch may change it."""

    @abstractmethod
    def detach(self) -> Self:
        """The same without a graph."""


@dataclass
class Target(ABC):
    """A model of `transformers` with its processor, in eval mode.

    Attributes:
        model: the model, or a PEFT model around it; frozen.
        processor: joins tokenizer and image processor.
        device: where the model is.
        hashes: SHA-256 of weights, processor and adapter.
        name: what the user called it.
        kind: generative or dual-encoder.
    """

    kind: ClassVar[str]
    model: Any
    processor: Any
    device: torch.device
    hashes: Mapping[str, str]
    name: str
    parts: Parts = field(init=False)

    def __post_init__(self) -> None:
        self.parts = find_parts(self.model)
        tokenizer = self.processor.tokenizer
        self._pad = next(
            (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
        )
        text_config = self.plain.config.get_text_config()
        self._context = int(getattr(text_config, "max_position_embeddings", 0) or 0)

    @property
    def plain(self) -> Any:
        """The model itself, under any adapter."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def has_adapter(self) -> bool:
        """Whether a PEFT adapter sits on the model."""
        return hasattr(self.model, "peft_config")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights compute in."""
        parameters: Iterable[Tensor] = self.model.parameters()
        return next(p.dtype for p in parameters if p.is_floating_point())

    @property
    def wide(self) -> torch.dtype:
        """What readings are accumulated in: float32, or float64 for a float64 model."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @abstractmethod
    def encode(self, record: Record, image: Image.Image) -> EncodedRecord:
        """Make a record and its image, RGB, ready for the model.

        Raises:
            UserError: the model cannot take it.
        """

    @abstractmethod
    def outputs(self, batch: Batch) -> Outputs:
        """Take a batch forward."""

    def collate(self, records: Sequence[EncodedRecord]) -> Batch:
        """Pad records of equal `shape_key` on the right and stack them on the device.

        Tiles are padded with zeros, as processors pad them.
        """
        padded = records[0].along_tokens | records[0].tiled
        inputs = {}
        for name in records[0].inputs:
            values = [record.inputs[name] for record in records]
            if name in padded:
                fill = self._pad if name == "input_ids" else 0
                most = max(value.shape[1] for value in values)
                values = [
                    nn.functional.pad(v, (0, 0) * (v.ndim - 2) + (0, most - v.shape[1]), value=fill)
                    for v in values
                ]
            inputs[name] = torch.cat(values).to(self.device)
        return Batch(
            inputs,
            tuple(record.id for record in records),
            tuple((record.answer_start, record.n_tokens) for record in records),
            records[0].shape_key,
            tuple(record.pieces for record in records),
        )

    def _cast(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors alone, in the model's dtype where they are not whole numbers."""
        return {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }
