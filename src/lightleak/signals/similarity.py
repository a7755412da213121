"""How alike two texts are, as summaries are compared."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import Literal

from rapidfuzz.distance import Indel

Similarity = Literal["rouge2", "rougeL"]

# Letters of scripts that put no spaces between words count as words.
_CLOSE = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff"
_WORDS = re.compile(rf"[{_CLOSE}]|[^\W{_CLOSE}]+")


def alike(first: str, second: str, by: Similarity) -> float:
    """From 0 to 1, of words whatever their case.

    Lin 2004 (aclanthology.org/W04-1013), the harmonic mean of precision and recall: ROUGE-2 of the
    pairs of neighbouring words, ROUGE-L of the longest common subsequence. Unlike the usual
    program it keeps letters that are not English.
    """
    a, b = (_WORDS.findall(text.casefold()) for text in (first, second))
    if by == "rougeL":
        # Insertions and deletions alone: 1 − distance/(|a| + |b|) = 2·LCS/(|a| + |b|).
        return Indel.normalized_similarity(a, b) if a and b else 0.0
    pairs = [Counter(pairwise(words)) for words in (a, b)]
    total = sum(map(Counter.total, pairs))
    return 2 * (pairs[0] & pairs[1]).total() / total if total else 0.0


def comparable(text: str, by: Similarity) -> bool:
    """Whether a text has enough words for another to be like it."""
    return len(_WORDS.findall(text)) >= (1 if by == "rougeL" else 2)
