"""Self-consistency: of an image that it was trained on the model says the same again and again."""

from itertools import combinations

import numpy as np

from lightleak.evidence.readings import Floats, SampledAnswers
from lightleak.signals.registry import signal
from lightleak.signals.similarity import Similarity, alike, comparable


@signal(
    needs=SampledAnswers,
    source="Hu et al. 2025, arXiv:2501.18624",
    unscorable="fewer than two of its answers have words to compare",
)
def self_consistency(
    answers: SampledAnswers, *, temperature: float = 0.1, similarity: Similarity = "rouge2"
) -> Floats:
    """Mean similarity of the answers sampled at one temperature with each other.

    The image-only attack: the record's own text is not used. `temperature` takes the nearest of
    those that answers were drawn at. As with `temperature_set`, the audit compares the sets.
    """
    place = int(np.abs(np.array(answers.temperatures) - temperature).argmin())
    scores = np.full(len(answers.answers), np.nan)
    for i, at_each in enumerate(answers.answers):
        usable = [answer for answer in at_each[place] if comparable(answer, similarity)]
        pairs = [alike(*pair, similarity) for pair in combinations(usable, 2)]
        if pairs:
            scores[i] = np.mean(pairs)
    return scores
