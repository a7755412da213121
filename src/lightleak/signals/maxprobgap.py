"""Largest-probability gap: what was learnt leaves the second choice far behind."""

from lightleak.evidence.readings import AnswerDistributions, Floats
from lightleak.signals.registry import signal


@signal(needs=AnswerDistributions, source="Li et al. 2024, arXiv:2411.02902")
def maxprobgap(answer: AnswerDistributions) -> Floats:
    """Mean over the answer's tokens of log p(1) − log p(2), the likeliest less the second."""
    return answer.slices["description"].gap.mean()
