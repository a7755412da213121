"""What the target says of each answer token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnswerStatistics:
    """One record's token statistics, each a list of one number an answer token, in nats."""

    logprob: list[float]
    mean: list[float]
    variance: list[float]


def answer_statistics(log_probabilities: Tensor, tokens: Tensor) -> AnswerStatistics:
    """Reduce next-token log-probabilities to what the signals need.

    Args:
        log_probabilities: (answer tokens, vocabulary), float32 or float64.
        tokens: (answer tokens,) the answer's token ids.

    Returns:
        log p(y_t); μ_t = Σ p log p; σ_t² = Σ p log² p − μ_t² (Zhang et al. 2025,
        arXiv:2404.02936, equation 3). A token of probability zero adds nothing to either sum.
    """
    probabilities = log_probabilities.exp()
    finite = torch.where(probabilities > 0, log_probabilities, 0.0)
    mean = (probabilities * finite).sum(-1)
    # Σ p (log p − μ)² equals the difference of the two sums and does not cancel.
    variance = (probabilities * (finite - mean[:, None]).square()).sum(-1)
    logprob = log_probabilities.gather(1, tokens[:, None])[:, 0]
    return AnswerStatistics(logprob.tolist(), mean.tolist(), variance.tolist())
