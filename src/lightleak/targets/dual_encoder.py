"""A dual encoder (CLIP, SigLIP …): images and texts in, unit embeddings out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from lightleak.errors import UserError
from lightleak.records import Record
from lightleak.targets.target import Batch, EncodedRecord, Outputs, Target

_UNLIMITED = 2**30  # A tokenizer that knows no limit says something larger.
_TOKENS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Bank:
    """Embeddings of control pairs, the negatives of every record alike; each (b, d), unit rows."""

    image: Tensor
    text: Tensor


@dataclass(frozen=True)
class Pairs(Outputs):
    """Embeddings of n records, and how far each pair stands out from the bank.

    Attributes:
        image, text: (n, d), rows of unit length.
        logits: against a bank of b pairs, (n, 1 + b) of each image with its own text, then with
            the bank's texts; and (n, 1 + b) of each text with its own image, then the bank's.
        sigmoid: whether the model was trained by the sigmoid loss.
    """

    image: Tensor
    text: Tensor
    logits: tuple[Tensor, Tensor] | None
    sigmoid: bool

    @property
    def losses(self) -> Tensor:
        """(n,) contrastive loss of each pair against the bank, in nats.

        Softmax (Radford et al. 2021, arXiv:2103.00020): mean of the cross-entropies of the own
        text among the bank's, and of the own image among the bank's. Sigmoid (Zhai et al. 2023,
        arXiv:2303.15343): −log σ(own) − ½ Σ log σ(−other) over both directions.
        """
        if self.logits is None:
            raise ValueError("a contrastive loss needs a bank of negatives")
        if self.sigmoid:
            sigma = nn.functional.logsigmoid
            halves = [-sigma(each[:, 0]) - sigma(-each[:, 1:]).sum(1) for each in self.logits]
        else:
            halves = [torch.logsumexp(each, 1) - each[:, 0] for each in self.logits]
        return torch.stack(halves).mean(0)

    def vectors(self) -> list[Tensor]:
        """Both embeddings of each record."""
        return list(torch.cat([self.image, self.text], 1))

    def detach(self) -> Pairs:
        """The same without a graph."""
        logits = self.logits and (self.logits[0].detach(), self.logits[1].detach())
        return Pairs(self.image.detach(), self.text.detach(), logits, self.sigmoid)


@dataclass
class DualEncoderTarget(Target):
    """A model that embeds images and texts in one space.

    Attributes:
        bank: the negatives of the contrastive loss; None until `with_bank`.
    """

    kind: ClassVar[str] = "dual-encoder"
    bank: Bank | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = self.plain
        for name in ("get_image_features", "get_text_features"):
            if not hasattr(plain, name):
                raise UserError(
                    f"it has no {name}", self.name, "Only two-tower models of transformers fit."
                )
        text = set(inspect.signature(plain.get_text_features).parameters)
        self._text_inputs = tuple(name for name in _TOKENS if name in text)
        self._image_inputs = tuple(
            set(inspect.signature(plain.get_image_features).parameters) - {"kwargs"}
        )
        # SigLIP was trained on texts padded to one length, without a mask.
        self._padded = str(plain.config.model_type).startswith("siglip")
        self.sigmoid = hasattr(plain, "logit_bias")

    # -- records in ---------------------------------------------------------------------------

    def encode(self, record: Record, image: Image.Image) -> EncodedRecord:
        """Tokenise the record's text, cut where the model's training cut it, and its image.

        The prompt is not used: a dual encoder compares the image with the text alone.
        """
        tokens, (truncated,) = self.tokens([record.text])
        inputs = {**self.pixels(image), **tokens}
        length = tokens["input_ids"].shape[1]
        along = frozenset(tokens)
        return EncodedRecord(record.id, inputs, along, length, truncated=truncated)

    def pixels(self, image: Image.Image) -> dict[str, Tensor]:
        """An RGB image as the image tower takes it, batch of one."""
        found = self.processor.image_processor(images=[image], return_tensors="pt")
        return {
            name: value
            for name, value in self._cast(dict(found)).items()
            if name in self._image_inputs
        }

    def tokens(self, texts: Sequence[str]) -> tuple[dict[str, Tensor], tuple[bool, ...]]:
        """Texts as the text tower takes them, (n, length), and which of them had to be cut."""
        tokenizer = self.processor.tokenizer
        # RoBERTa counts positions from behind the padding: its tokenizer knows how many are left.
        longest = min(self._context or _UNLIMITED, tokenizer.model_max_length)
        found = tokenizer(
            list(texts),
            padding="max_length" if self._padded else True,
            truncation=True,
            max_length=None if longest >= _UNLIMITED else longest,
            return_tensors="pt",
        )
        names = ("input_ids",) if self._padded else self._text_inputs
        inputs = {name: found[name] for name in names if name in found}
        if found.encodings:
            cut = tuple(bool(each.overflowing) for each in found.encodings)
        else:
            lengths = [len(ids) for ids in tokenizer(list(texts))["input_ids"]]
            cut = tuple(length > inputs["input_ids"].shape[1] for length in lengths)
        return inputs, cut

    # -- batches through the model ------------------------------------------------------------

    def embed_images(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(n, d) image embeddings of unit length, float32 or wider."""
        chosen = {n: v.to(self.device) for n, v in inputs.items() if n in self._image_inputs}
        return self._unit(self.plain.get_image_features(**chosen))

    def embed_texts(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(n, d) text embeddings of unit length, float32 or wider."""
        chosen = {n: v.to(self.device) for n, v in inputs.items() if n in self._text_inputs}
        return self._unit(self.plain.get_text_features(**chosen))

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """(n, m) what the model's own loss takes: scaled cosines of n images and m texts."""
        return image @ text.T * self._scale() + self._bias()

    def outputs(self, batch: Batch) -> Pairs:
        """Embeddings of a batch, and its logits against the bank where there is one."""
        image, text = self.embed_images(batch.inputs), self.embed_texts(batch.inputs)
        logits = None
        if self.bank is not None:
            own = ((image * text).sum(1) * self._scale() + self._bias())[:, None]
            others = self.logits(image, self.bank.text), self.logits(self.bank.image, text).T
            logits = torch.cat([own, others[0]], 1), torch.cat([own, others[1]], 1)
        return Pairs(image, text, logits, self.sigmoid)

    def _unit(self, features: Any) -> Tensor:
        pooled: Tensor = features.pooler_output
        return nn.functional.normalize(pooled.to(self.wide), dim=-1)

    def _scale(self) -> Tensor:
        plain = self.plain
        if hasattr(plain, "logit_scale"):
            scale: Tensor = plain.logit_scale.to(self.wide).exp()
            return scale
        temperature: Tensor = plain.temperature.to(self.wide)  # ALIGN divides by it.
        return 1 / temperature

    def _bias(self) -> Tensor | float:
        bias = getattr(self.plain, "logit_bias", None)
        return 0.0 if bias is None else bias.to(self.wide)
