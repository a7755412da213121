"""A generative vision-language model: records in, answer log-probabilities out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lightleak.errors import UserError
from lightleak.records import Record
from lightleak.targets.families import takes_suffix
from lightleak.targets.target import Batch, EncodedRecord, Outputs, Target

# What processors return that the model is not fed.
_LONGEST_EDGE = 8192
_NEVER_FED = ("labels", "offset_mapping", "special_tokens_mask")


@dataclass(frozen=True)
class Heard:
    """Next-token logits at some tokens of a record's prompt, without a graph.

    Attributes:
        logits: (tokens, vocabulary), as the model computed them.
        tokens: (tokens,) the ids that they predict; None in an image.
    """

    logits: Tensor
    tokens: Tensor | None

    def log_probabilities(self, most: int) -> Iterator[Tensor]:
        """Log-probabilities, float32 or wider, of at most so many tokens at a time."""
        wide = _wide(self.logits)
        for logits in torch.split(self.logits, most):
            yield torch.log_softmax(logits.to(wide), -1)


@dataclass(frozen=True)
class Answers(Outputs):
    """What the model says of each record's answer.

    Attributes:
        log_probabilities: one (answer tokens, vocabulary) tensor a record, float32 (float64 for
            a float64 model) whatever the model computes in, so that half precision never enters
            a softmax.
        tokens: the answers' token ids, one 1-D tensor a record.
        prompts: one a record: what was heard at its `image` and its `instruction`; empty where
            the target does not listen there.
    """

    log_probabilities: Sequence[Tensor]
    tokens: Sequence[Tensor]
    prompts: Sequence[Mapping[str, Heard]]

    @property
    def losses(self) -> Tensor:
        """(n,) mean cross-entropy over each record's own answer tokens, in nats."""
        return torch.stack([-each.mean() for each in self.likelihoods()])

    def vectors(self) -> list[Tensor]:
        """The log-likelihoods of each answer's tokens, and the entropies of all that is kept."""
        kept = [
            chain([each], *(heard.log_probabilities(64) for heard in prompt.values()))
            for each, prompt in zip(self.log_probabilities, self.prompts, strict=True)
        ]
        return [
            torch.cat([own, *(torch.special.entr(each.exp()).sum(-1) for each in said)])
            for own, said in zip(self.likelihoods(), kept, strict=True)
        ]

    def likelihoods(self) -> list[Tensor]:
        """The log-likelihoods of each answer's tokens."""
        return [
            each.gather(1, tokens[:, None])[:, 0]
            for each, tokens in zip(self.log_probabilities, self.tokens, strict=True)
        ]

    def detach(self) -> Answers:
        """The same without a graph."""
        own = [each.detach() for each in self.log_probabilities]
        return Answers(own, self.tokens, self.prompts)


@dataclass
class GenerativeTarget(Target):
    """An image-text-to-text model.

    Attributes:
        hears_prompt: whether outputs say what the model expects at its image and instruction;
            logits are then computed at every token.
    """

    kind: ClassVar[str] = "generative"
    hears_prompt: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._accepts = set(inspect.signature(self.plain.forward).parameters)

    @property
    def resolution(self) -> int | None:
        """Pixels to which images' shorter side is brought; None where they keep their own size."""
        size = getattr(self.processor.image_processor, "size", None) or {}
        found = [size[key] for key in ("shortest_edge", "height", "longest_edge") if key in size]
        # Above it the two edges are numbers of pixels in all, and images keep their shape.
        return int(found[0]) if found and found[0] <= _LONGEST_EDGE else None

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
        kept = {name: value for name, value in self._cast(inputs).items() if name not in _NEVER_FED}
        along = frozenset(n for n, value in kept.items() if value.shape == (1, length))
        return EncodedRecord(record.id, kept, along, length, start, ambiguous)

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

    def outputs(self, batch: Batch) -> Answers:
        """Next-token log-probabilities where each record's answer is predicted."""
        inputs: dict[str, Any] = dict(batch.inputs)
        skipped = 0
        if "logits_to_keep" in self._accepts and not self.hears_prompt:
            # Image and prompt positions predict nothing that is asked for.
            length = inputs["input_ids"].shape[1]
            skipped = min(start for start, _ in batch.answers) - 1
            inputs["logits_to_keep"] = length - skipped
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        wide = _wide(logits)
        ids = batch.inputs["input_ids"]
        return Answers(
            [
                torch.log_softmax(each[start - 1 - skipped : stop - 1 - skipped].to(wide), -1)
                # Indexed one by one, each record's backward would fill zeros for all of them.
                for each, (start, stop) in zip(logits.unbind(), batch.answers, strict=True)
            ],
            [each[start:stop] for each, (start, stop) in zip(ids, batch.answers, strict=True)],
            [
                self._prompt(said, each[:start]) if self.hears_prompt else {}
                for said, each, (start, _) in zip(logits.detach(), ids, batch.answers, strict=True)
            ],
        )

    def _prompt(self, logits: Tensor, ids: Tensor) -> dict[str, Heard]:
        """What is said at a prompt's image, and of the tokens behind it.

        An image that the ids do not mark has no token here, and the instruction is all the prompt.
        """
        image = torch.isin(ids, self._image_ids).nonzero().flatten()
        start = int(image[-1]) + 1 if len(image) else 1
        return {
            "image": Heard(logits[image], None),
            "instruction": Heard(logits[start - 1 : len(ids) - 1], ids[start:]),
        }

    @torch.no_grad()
    def generate(
        self,
        records: Sequence[EncodedRecord],
        most: int,
        scores: LogitsProcessor | None = None,
    ) -> list[list[int]]:
        """The likeliest answer to each record's prompt, token after token: at most so many ids.

        Prompts of one length go together, so that none is padded: no batch changes an answer.
        `scores` may change what is likely.
        """
        alike: dict[object, list[EncodedRecord]] = {}
        for record in map(_prompt_of, records):
            alike.setdefault((record.shape_key, record.n_tokens, record.pieces), []).append(record)
        ends = self.plain.generation_config.eos_token_id
        ends = self.processor.tokenizer.eos_token_id if ends is None else ends
        settings = GenerationConfig(
            max_new_tokens=most, do_sample=False, eos_token_id=ends, pad_token_id=self._pad
        )
        stops = set(ends if isinstance(ends, list) else [ends])
        found: dict[str, list[int]] = {}
        for group in alike.values():
            inputs = self.collate(group).inputs
            ids = self.model.generate(
                **inputs,
                generation_config=settings,
                logits_processor=LogitsProcessorList([] if scores is None else [scores]),
            )
            for record, answer in zip(group, ids[:, group[0].n_tokens :].tolist(), strict=True):
                stop = next((i for i, token in enumerate(answer) if token in stops), len(answer))
                found[record.id] = answer[: stop + 1]
        return [found[record.id] for record in records]

    @property
    def _image_ids(self) -> Tensor:
        """The id that stands in `input_ids` where the image is; empty where none does."""
        config = self.plain.config
        names = ("image_token_id", "image_token_index")
        found = [i for name in names if isinstance(i := getattr(config, name, None), int)]
        return torch.tensor(found[:1], dtype=torch.long, device=self.device)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _prompt_of(record: EncodedRecord) -> EncodedRecord:
    """A record without its answer."""
    start = record.answer_start
    inputs = {
        name: value[:, :start] if name in record.along_tokens else value
        for name, value in record.inputs.items()
    }
    return replace(record, inputs=inputs, n_tokens=start)


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
