"""What a dual encoder says of each pair: embeddings, contrastive loss, and how steady both are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor, nn

from lightleak.records import Record, open_rgb
from lightleak.targets import DualEncoderTarget, EncodedRecord, Pairs

DROPOUT_PASSES = 10
_DROPOUT_RATE = 0.1


@dataclass(frozen=True)
class PairReader:
    """Readings of each image with its text, as evidence rows.

    Attributes:
        target: the model.
        augmented: whether to read the cosine under augmentations of the image.
        dropout: whether to read it under attention dropout.
    """

    target: DualEncoderTarget
    augmented: bool
    dropout: bool

    def columns(self, numbers: pa.DataType) -> dict[str, pa.DataType]:
        """Names and types of what `rows` yields; `numbers` is a list of floats."""
        return {
            "truncated": pa.bool_(),
            "image_embedding": numbers,
            "text_embedding": numbers,
            "contrast_loss": numbers.value_type,
            "augmented_cosines": numbers,
            "dropout_cosines": numbers,
        }

    def rows(
        self, records: Sequence[Record], encoded: Sequence[EncodedRecord], outputs: Pairs
    ) -> list[dict[str, object]]:
        """One row a record of a batch; readings that were not asked for are empty."""
        losses = [None] * len(records) if self.target.bank is None else outputs.losses.tolist()
        return [
            {
                "truncated": each.truncated,
                "image_embedding": outputs.image[i].cpu().numpy(),
                "text_embedding": outputs.text[i].cpu().numpy(),
                "contrast_loss": losses[i],
                "augmented_cosines": self._augmented(record, outputs.text[i]),
                "dropout_cosines": self._under_dropout(each),
            }
            for i, (record, each) in enumerate(zip(records, encoded, strict=True))
        ]

    @torch.no_grad()
    def _augmented(self, record: Record, text: Tensor) -> list[float]:
        if not self.augmented:
            return []
        pixels = [self.target.pixels(each) for each in augmentations(open_rgb(record.image))]
        together = {name: torch.cat([each[name] for each in pixels]) for name in pixels[0]}
        cosines: list[float] = (self.target.embed_images(together) @ text).tolist()
        return cosines

    @torch.no_grad()
    def _under_dropout(self, encoded: EncodedRecord) -> list[float]:
        """One record at a time and from one seed, so that no batch changes what is dropped."""
        if not self.dropout:
            return []
        copies = {
            name: value.expand(DROPOUT_PASSES, *value.shape[1:])
            for name, value in encoded.inputs.items()
        }
        with _attention_dropout(self.target.model) as found, _seeded(self.target.device):
            if not found:
                return []
            image, text = self.target.embed_images(copies), self.target.embed_texts(copies)
        cosines: list[float] = (image * text).sum(1).tolist()
        return cosines


def augmentations(image: Image.Image) -> list[Image.Image]:
    """The image mirrored, cropped, turned both ways, blurred, darker and paler; none is random."""
    width, height = image.size
    margin = (round(width * 0.1), round(height * 0.1))
    return [
        ImageOps.mirror(image),
        image.crop((*margin, max(width - margin[0], 1), max(height - margin[1], 1))),
        image.rotate(10, Image.Resampling.BILINEAR),
        image.rotate(-10, Image.Resampling.BILINEAR),
        image.filter(ImageFilter.GaussianBlur(min(image.size) / 64)),
        ImageEnhance.Brightness(image).enhance(0.7),
        ImageEnhance.Color(image).enhance(0.5),
    ]


@contextmanager
def _attention_dropout(model: nn.Module) -> Iterator[bool]:
    """Drop attention weights though the model is in eval mode; yields whether it has such."""
    before: list[tuple[nn.Module, str, Any]] = []

    def change(module: nn.Module, name: str, value: object) -> None:
        before.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    for module in model.modules():
        if "Attention" not in type(module).__name__:
            continue
        for name in ("dropout", "attention_dropout"):
            rate = getattr(module, name, None)
            if isinstance(rate, nn.Dropout):
                change(rate, "p", _DROPOUT_RATE)
                change(rate, "training", True)
            elif isinstance(rate, int | float):
                change(module, name, _DROPOUT_RATE)
            else:
                continue
            change(module, "training", True)
    try:
        yield bool(before)
    finally:
        for module, name, value in reversed(before):
            setattr(module, name, value)


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers for every record, and the caller's own afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield
