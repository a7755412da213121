"""What a generative target says of each answer token."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import pyarrow as pa
import torch
from torch import Tensor

from lightleak.records import Record
from lightleak.targets import Answers, EncodedRecord


class AnswerReader:
    """Token statistics of each record's answer, as evidence rows."""

    def columns(self, numbers: pa.DataType) -> dict[str, pa.DataType]:
        """Names and types of what `rows` yields; `numbers` is a list of floats."""
        return {
            "boundary_ambiguous": pa.bool_(),
            "zlib_bytes": pa.int64(),
            "logprob": numbers,
            "mean": numbers,
            "variance": numbers,
        }

    def rows(
        self, records: Sequence[Record], encoded: Sequence[EncodedRecord], outputs: Answers
    ) -> list[dict[str, object]]:
        """One row a record of a batch."""
        return [
            {
                "boundary_ambiguous": each.boundary_ambiguous,
                "zlib_bytes": len(zlib.compress(record.text.encode())),
                **answer_statistics(log_probabilities, tokens),
            }
            for record, each, log_probabilities, tokens in zip(
                records, encoded, outputs.log_probabilities, outputs.tokens, strict=True
            )
        ]


def answer_statistics(log_probabilities: Tensor, tokens: Tensor) -> dict[str, list[float]]:
    """Reduce next-token log-probabilities to what the signals need.

    Args:
        log_probabilities: (answer tokens, vocabulary), float32 or float64.
        tokens: (answer tokens,) the answer's token ids.

    Returns:
        `logprob`, `mean` and `variance`, one number an answer token, in nats: log p(y_t);
        μ_t = Σ p log p; σ_t² = Σ p log² p − μ_t² (Zhang et al. 2025, arXiv:2404.02936,
        equation 3). A token of probability zero adds nothing to either sum.
    """
    probabilities = log_probabilities.exp()
    finite = torch.where(probabilities > 0, log_probabilities, 0.0)
    mean = (probabilities * finite).sum(-1)
    # Σ p (log p − μ)² equals the difference of the two sums and does not cancel.
    variance = (probabilities * (finite - mean[:, None]).square()).sum(-1)
    logprob = log_probabilities.gather(1, tokens[:, None])[:, 0]
    return {"logprob": logprob.tolist(), "mean": mean.tolist(), "variance": variance.tolist()}
