"""Answers drawn from a target again and again, at several temperatures, and kept as texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from transformers import LogitsProcessor

from lightleak.evidence.collect import Reader
from lightleak.evidence.perturbed import seed_of
from lightleak.records import Record, open_rgb
from lightleak.targets import (
    ANSWER_TOKENS,
    EncodedRecord,
    EndpointTarget,
    GenerativeTarget,
    Question,
    Reply,
    quiet,
)

# Those of the released code of Hu et al. (arXiv:2501.18624).
TEMPERATURES = (0.1, 1.6)
REPEATS = 3


@dataclass(frozen=True)
class SampledReader:
    """Adds answers to another reader's rows.

    Attributes:
        reader: what reads the records themselves; None for an endpoint, where nothing else is.
        target: the model, or the endpoint.
    """

    reader: Reader | None
    target: GenerativeTarget | EndpointTarget

    def columns(self, numbers: pa.DataType) -> dict[str, pa.DataType]:
        """Names and types of what `rows` yields; `numbers` is a list of floats."""
        return {
            **({} if self.reader is None else self.reader.columns(numbers)),
            "truth": pa.string(),
            "temperatures": pa.list_(pa.float64()),
            "answers": pa.list_(pa.list_(pa.string())),
            "servers": pa.list_(pa.string()),
        }

    def rows(
        self, records: Sequence[Record], encoded: Sequence[EncodedRecord], outputs: Any
    ) -> list[dict[str, object]]:
        """One row a record of a batch; `servers` is what served it, as far as a server says."""
        rows: list[dict[str, object]] = (
            [{} for _ in records]
            if self.reader is None
            else self.reader.rows(records, encoded, outputs)
        )
        for row, record, each in zip(rows, records, encoded, strict=True):
            replies = draw(self.target, record, each)
            row |= {
                "truth": record.text,
                "temperatures": TEMPERATURES,
                "answers": [
                    [reply.text for reply in replies[first : first + REPEATS]]
                    for first in range(0, len(replies), REPEATS)
                ],
                "servers": sorted({reply.server for reply in replies} - {""}),
            }
        return rows


def draw(
    target: GenerativeTarget | EndpointTarget, record: Record, encoded: EncodedRecord
) -> list[Reply]:
    """Answers to the record's image and prompt, `REPEATS` of each temperature in turn.

    Raises:
        ValueError: an endpoint's reply holds no answer.
        UserError: an endpoint cannot be asked any further.
    """
    temperatures = [each for each in TEMPERATURES for _ in range(REPEATS)]
    if isinstance(target, GenerativeTarget):
        return [Reply(text) for text in generate(target, encoded, temperatures)]
    image = open_rgb(record.image)
    return target.answer(
        [
            Question(image, record.prompt, temperature, seed_of(record.id, "answer", k))
            for k, temperature in enumerate(temperatures)
        ]
    )


def generate(
    target: GenerativeTarget, encoded: EncodedRecord, temperatures: Sequence[float]
) -> list[str]:
    """An answer at each temperature, of at most `ANSWER_TOKENS` tokens.

    They are drawn together, but with no other record's, by random numbers that follow from the
    record's id: no batch changes them.
    """
    copies = [replace(encoded, id=str(k)) for k in range(len(temperatures))]
    drawn = _Drawn(temperatures, seed_of(encoded.id, "answer"))
    with quiet():
        ids = target.generate(copies, ANSWER_TOKENS, drawn)
    texts = target.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


class _Drawn(LogitsProcessor):  # type: ignore[misc]
    """Scores whose likeliest token is a draw from softmax(scores / T), by the Gumbel trick."""

    def __init__(self, temperatures: Sequence[float], seed: int) -> None:
        self._temperatures = torch.tensor(temperatures)[:, None]
        self._random = torch.Generator().manual_seed(seed)  # The same numbers on every device.

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        noise = torch.empty(scores.shape).exponential_(generator=self._random).log()
        divided = scores.float() / self._temperatures.to(scores.device)
        return divided - noise.to(scores.device)
