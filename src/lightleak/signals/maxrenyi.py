"""MaxRényi-K %: of what was learnt, even the least certain tokens are rather certain."""

from typing import Literal

from lightleak.evidence.readings import AnswerDistributions, Floats, distributions_of
from lightleak.signals.registry import signal

Slice = Literal["image", "instruction", "description", "instruction+description"]


@signal(
    needs=AnswerDistributions,
    source="Li et al. 2024, arXiv:2411.02902",
    unscorable="its slice has no token, or the model's input does not mark the image's",
    needs_with=distributions_of,
)
def maxrenyi(
    said: AnswerDistributions,
    *,
    alpha: Literal["0.5", "1", "2", "inf"] = "0.5",
    k: float = 10,
    slice: Slice = "description",
    answer: Literal["record", "own"] = "record",
) -> Floats:
    """Negative mean of the largest max(1, ⌊k % · T⌋) Rényi entropies H_α of the next token.

    H_α = log(Σ p^α)/(1 − α); H_1 is Shannon's, H_∞ = −log max p. `k` = 0 is the one largest.
    `slice` and `answer` act when the evidence is gathered: `own` is the model's own description.
    """
    del answer
    return -said.slices[slice].renyi[alpha].mean_of_highest(k / 100)
