"""Temperature: what was trained on is answered as it was taught, until the sampling grows hot."""

from typing import Literal

import numpy as np

from lightleak.evidence.readings import Floats, SampledAnswers
from lightleak.signals.registry import signal
from lightleak.signals.similarity import Similarity, alike, comparable


@signal(
    needs=SampledAnswers,
    source="Hu et al. 2025, arXiv:2501.18624",
    unscorable="its text has fewer than two words (similarity=rougeL compares single ones)",
)
def temperature_set(
    answers: SampledAnswers,
    *,
    score: Literal["fall", "level"] = "fall",
    similarity: Similarity = "rouge2",
) -> Floats:
    """Mean similarity of sampled answers to the record's text, and how it falls with heat.

    `fall` is the target-only attack: mean similarity at the lowest temperature less that at the
    highest. `level` is the reference attack, the controls being its non-members: mean similarity
    at the lowest temperature. Published are z-tests of sets of 50; here every record has a number,
    and the audit's own tests compare the sets. Of the published similarities only ROUGE is here.
    """
    scores = np.full(len(answers.truth), np.nan)
    for i, (truth, at_each) in enumerate(zip(answers.truth, answers.answers, strict=True)):
        if comparable(truth, similarity):
            low, high = (
                np.mean([alike(truth, answer, similarity) for answer in at_each[place]])
                for place in (0, -1)
            )
            scores[i] = low - high if score == "fall" else low
    return scores
