"""ModRényi: entropy that also asks whether the certain token is the one that came."""

from typing import Literal

from lightleak.evidence.readings import AnswerDistributions, Floats, distributions_of
from lightleak.signals.registry import signal


@signal(
    needs=AnswerDistributions,
    source="Li et al. 2024, arXiv:2411.02902",
    unscorable="its slice has no token, or a token of probability zero",
    needs_with=distributions_of,
)
def modrenyi(
    said: AnswerDistributions,
    *,
    alpha: Literal["0.5", "1", "2"] = "1",
    slice: Literal["instruction", "description", "instruction+description"] = "description",
    answer: Literal["record", "own"] = "record",
) -> Floats:
    """Negative mean of the modified Rényi entropies M_α of the tokens that came.

    M_1 = −(1 − p_y) log p_y − Σ_{j≠y} p_j log(1 − p_j); else, with η = |1 − α|,
    M_α = −[(1 − p_y) p_y^η − (1 − p_y) + Σ_{j≠y} (p_j (1 − p_j)^η − p_j)]/η.
    `slice` and `answer` act when the evidence is gathered: `own` is the model's own description.
    """
    del answer
    return -said.slices[slice].modified[alpha].mean()
