"""A generative vision-language model: records in, answer log-probabilities out."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lightleak.errors import UserError
from lightleak.records import Record
from lightleak.targets.families import Parts, find_parts, takes_suffix

# What processors return that the model is not fed.
_NEVER_FED = ("labels", "offset_mapping", "special_tokens_mask")


@dataclass(frozen=True)
class EncodedRecord:
    """One record as the model takes it.

    Attributes:
        id: the record's id.
        inputs: the processor's tensors, batch of one.
        answer_start: index of the first answer token in `input_ids`.
        n_tokens: length of `input_ids`; the answer runs to its end.
        boundary_ambiguous: the answer's first token had merged with the prompt's last, so that
            the answer begins at the first token that differs.
    """

    id: str
    inputs: Mapping[str, Tensor]
    answer_start: int
    n_tokens: int
    boundary_ambiguous: bool

    @property
    def shape_key(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Shapes of everything but the token axis; records batch together when it is equal."""
        return tuple(
            (name, tuple(value.shape))
            for name, value in sorted(self.inputs.items())
            if not _along_tokens(value, self.n_tokens)
        )


@dataclass(frozen=True)
class Batch:
    """Records of one shape, padded on the right.

    Attributes:
        inputs: tensors on the target's device; token tensors are (n, length).
        ids: the records' ids, n of them.
        answers: each record's answer as (start, stop) in the token axis.
        key: the shape that the records share (`EncodedRecord.shape_key`).
    """

    inputs: Mapping[str, Tensor]
    ids: tuple[str, ...]
    answers: tuple[tuple[int, int], ...]
    key: tuple[tuple[str, tuple[int, ...]], ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class GenerativeTarget:
    """An image-text-to-text model of `transformers` with its processor, in eval mode.

    Attributes:
        model: the model, or a PEFT model around it; frozen.
        processor: joins tokenizer and image processor.
        device: where the model is.
        hashes: SHA-256 of weights, processor and adapter.
        name: what the user called it.
    """

    model: Any
    processor: Any
    device: torch.device
    hashes: Mapping[str, str]
    name: str
    parts: Parts = field(init=False)

    def __post_init__(self) -> None:
        self.parts = find_parts(self.model)
        plain = self.model.get_base_model() if self.has_adapter else self.model
        self._accepts = set(inspect.signature(plain.forward).parameters)
        tokenizer = self.processor.tokenizer
        self._pad = next(
            (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
        )
        text_config = plain.config.get_text_config()
        self._context = int(getattr(text_config, "max_position_embeddings", 0) or 0)

    @property
    def has_adapter(self) -> bool:
        """Whether a PEFT adapter sits on the model."""
        return hasattr(self.model, "peft_config")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights compute in."""
        parameters: Iterable[Tensor] = self.model.parameters()
        return next(p.dtype for p in parameters if p.is_floating_point())

    # -- records in ---------------------------------------------------------------------------

    def render(self, record: Record) -> tuple[str, str]:
        """The prompt alone, and prompt with answer, as text.

        The answer is all that the second adds to the first: its end-of-turn token included.
        """
        tokenizer = self.processor.tokenizer
        for special in {self._image_token(), *tokenizer.all_special_tokens} - {None, ""}:
            if special in record.text or special in record.prompt:
                raise UserError(
                    f"its text holds the model's special token {special!r}",
                    f"record {record.id}",
                    "Remove it: the model would not read it as text.",
                )
        if not self._template():
            image = self._image_token() or ""
            prompt = f"{image}{record.prompt}\n"
            return prompt, prompt + record.text + (tokenizer.eos_token or "")
        question = {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": record.prompt}],
        }
        answer = {"role": "assistant", "content": [{"type": "text", "text": record.text}]}
        render = self.processor.apply_chat_template
        return (
            str(render([question], add_generation_prompt=True, tokenize=False)),
            str(render([question, answer], add_generation_prompt=False, tokenize=False)),
        )

    def encode(self, record: Record, image: Image.Image) -> EncodedRecord:
        """Tokenise a record and find its answer.

        Args:
            record: the record.
            image: its image, RGB.

        Raises:
            UserError: the text holds special tokens, the answer has no token of its own, or the
                record is longer than the model's context (nothing is ever cut off).
        """
        if not self._template() and takes_suffix(self.processor):
            inputs, start, ambiguous = self._encode_with_suffix(record, image)
        else:
            inputs, start, ambiguous = self._encode_rendered(record, image)
        length = int(inputs["input_ids"].shape[1])
        if start >= length:
            raise UserError("its answer yields no token", f"record {record.id}")
        if self._context and length > self._context:
            raise UserError(
                f"it is {length} tokens long and the model reads {self._context}",
                f"record {record.id}",
                "Shorten its text; lightleak never cuts a record.",
            )
        kept = {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in inputs.items()
            if isinstance(value, Tensor) and name not in _NEVER_FED
        }
        return EncodedRecord(record.id, kept, start, length, ambiguous)

    def _encode_rendered(
        self, record: Record, image: Image.Image
    ) -> tuple[Mapping[str, Any], int, bool]:
        prompt, full = self.render(record)
        bos = self.processor.tokenizer.bos_token
        # A template that writes the begin token itself must not be given a second one.
        special = {"add_special_tokens": False} if bos and full.startswith(bos) else {}
        inputs = self.processor(images=[image], text=[full], return_tensors="pt", **special)
        # Processors only widen the image placeholder, so the answer's tokens are those that the
        # plain tokenizer finds behind the common prefix; this saves a second pass over the image.
        tokenizer = self.processor.tokenizer
        prompt_ids, full_ids = (tokenizer(text, **special)["input_ids"] for text in (prompt, full))
        common = _common_prefix(prompt_ids, full_ids)
        n_answer = len(full_ids) - common
        ids = inputs["input_ids"][0].tolist()
        if n_answer and ids[-n_answer:] == full_ids[common:]:
            expected = len(_without_trailing_special(prompt_ids, tokenizer))
            return inputs, len(ids) - n_answer, common < expected
        alone = self.processor(images=[image], text=[prompt], return_tensors="pt", **special)
        prompt_list = alone["input_ids"][0].tolist()
        common = _common_prefix(prompt_list, ids)
        return inputs, common, common < len(_without_trailing_special(prompt_list, tokenizer))

    def _encode_with_suffix(
        self, record: Record, image: Image.Image
    ) -> tuple[Mapping[str, Any], int, bool]:
        self.render(record)
        inputs = self.processor(
            images=[image],
            text=[f"{self._image_token() or ''}{record.prompt}"],
            suffix=[record.text],
            return_tensors="pt",
        )
        answered = (inputs["labels"][0] != -100).nonzero().flatten()
        return inputs, int(answered[0]) if len(answered) else inputs["labels"].shape[1], False

    def _template(self) -> str | None:
        template = getattr(self.processor, "chat_template", None)
        return template or getattr(self.processor.tokenizer, "chat_template", None)

    def _image_token(self) -> str | None:
        token = getattr(self.processor, "image_token", None)
        return str(token) if token is not None else None

    # -- batches through the model ------------------------------------------------------------

    def collate(self, records: Sequence[EncodedRecord]) -> Batch:
        """Pad records of equal `shape_key` on the right and stack them on the device."""
        length = max(record.n_tokens for record in records)
        inputs = {}
        for name, first in records[0].inputs.items():
            values = [record.inputs[name] for record in records]
            if _along_tokens(first, records[0].n_tokens):
                fill = self._pad if name == "input_ids" else 0
                values = [
                    nn.functional.pad(v, (0, length - v.shape[1]), value=fill) for v in values
                ]
            inputs[name] = torch.cat(values).to(self.device)
        return Batch(
            inputs,
            tuple(record.id for record in records),
            tuple((record.answer_start, record.n_tokens) for record in records),
            records[0].shape_key,
        )

    def answer_log_probabilities(self, batch: Batch) -> list[Tensor]:
        """Next-token log-probabilities where each record's answer is predicted.

        Returns:
            One tensor a record, (answer tokens, vocabulary), float32 (float64 for a float64
            model) whatever the model computes in, so that half precision never enters a softmax.
        """
        inputs: dict[str, Any] = dict(batch.inputs)
        skipped = 0
        if "logits_to_keep" in self._accepts:
            # Image and prompt positions predict nothing that is asked for.
            length = inputs["input_ids"].shape[1]
            skipped = min(start for start, _ in batch.answers) - 1
            inputs["logits_to_keep"] = length - skipped
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return [
            torch.log_softmax(logits[row, start - 1 - skipped : stop - 1 - skipped].to(wide), -1)
            for row, (start, stop) in enumerate(batch.answers)
        ]

    def answer_tokens(self, batch: Batch) -> list[Tensor]:
        """The answer's token ids, one 1-D tensor a record."""
        ids = batch.inputs["input_ids"]
        return [ids[row, start:stop] for row, (start, stop) in enumerate(batch.answers)]


def _along_tokens(value: Tensor, n_tokens: int) -> bool:
    return value.ndim == 2 and value.shape[0] == 1 and value.shape[1] == n_tokens


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    for position, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return position
    return min(len(first), len(second))


def _without_trailing_special(ids: Sequence[int], tokenizer: Any) -> Sequence[int]:
    """`ids` without an end-of-text token that the tokenizer put behind the bare prompt."""
    if ids and ids[-1] == tokenizer.eos_token_id:
        return ids[:-1]
    return ids
