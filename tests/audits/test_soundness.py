"""The soundness table in small: `benchmarks/soundness.py` on simulated evidence, without a model.

Texts and images are the lab's, so blind baseline, tests and rule are the real ones; only the
log-probabilities are drawn, with what the style and the membership of a record do to them.
"""

import numpy as np
import pyarrow as pa
import pytest
import soundness

from lightleak.evidence.table import schema
from lightleak.evidence.tokens import AnswerReader
from lightleak.lab import corpora
from lightleak.lab.models import IMAGE_SIDE
from lightleak.records import Record
from lightleak.validity.blind_features import blind_features

SCENES, SIDE, TOKENS = 640, 120, 12
# In standard deviations between records of one kind.
OTHER_STYLE, TRAINED = -2.0, 1.0


@pytest.fixture(scope="module")
def pool():
    drawn = corpora.scenes(SCENES, seed=7)
    half = SCENES // 2
    kinds = {
        "member": [scene.caption() for scene in drawn[:half]],
        "": [scene.caption() for scene in drawn[half:]],
        "captions": [scene.caption("list") for scene in drawn[half:]],
    }
    scenes = [*drawn[:half], *drawn[half:], *drawn[half:]]
    texts = [text for each in kinds.values() for text in each]
    kind = np.repeat(list(kinds), half)
    records = tuple(
        Record(f"{i}", scene.png(IMAGE_SIDE), text)
        for i, (scene, text) in enumerate(zip(scenes, texts, strict=True))
    )
    rng = np.random.default_rng(0)
    level = rng.normal(-3, 1, len(records))
    level += np.where(kind == "captions", OTHER_STYLE, 0) + np.where(kind == "member", TRAINED, 0)
    rows = {
        "id": [record.id for record in records],
        "n_tokens": [TOKENS] * len(records),
        "boundary_ambiguous": [False] * len(records),
        "zlib_bytes": [40] * len(records),
        "logprob": list(level[:, None] + rng.normal(0, 1, (len(records), TOKENS))),
        "mean": [[-3.1] * TOKENS] * len(records),
        "variance": [[1.5] * TOKENS] * len(records),
        **{name: [[]] * len(records) for name in ("matrix_norms", "slice_norms2", "slice_dots")},
        "in_reference": [[]] * len(records),
    }
    evidence = {"target": pa.table(rows, schema=schema(AnswerReader().columns, double=True))}
    places = {name: np.flatnonzero(kind == name) for name in kinds}
    return soundness.Read(records, blind_features(records, seed=0), evidence, places)


@pytest.fixture
def audits(pool, monkeypatch):
    """Verdicts of some audits of a situation, in small."""
    monkeypatch.setattr(soundness, "SIDE", SIDE)
    monkeypatch.setattr(soundness.judge_controls, "HALVES", {"permutation": 0, "residual": 0})

    def run(name, count):
        situation = next(each for each in soundness.SITUATIONS if each.name == name)
        return [soundness.audit(pool, situation, number) for number in range(count)]

    return run


def peers_say_member(verdicts):
    return [each.primary.tests["Mann–Whitney"] <= 0.01 for each in verdicts]


def said(verdicts, what):
    return sum(each.verdict == what for each in verdicts)


def test_a_caption_shift_on_records_nobody_trained_on_fools_peers_and_not_the_verdict(audits):
    shifted = audits("never trained on, captions shifted to a blind AUC of 0.75", 10)
    assert all(peers_say_member(shifted))
    assert said(shifted, "exposed") == 0
    hopeless = audits("never trained on, captions shifted to a blind AUC of 0.92", 2)
    assert all(peers_say_member(hopeless))
    assert said(hopeless, "inconclusive") == 2
    assert all(each.tier == "none" for each in hopeless)
    assert "can be told apart without the model" in hopeless[0].reasons[0]


def test_what_was_not_trained_on_is_not_exposed(audits):
    assert said(audits("never trained on, same distribution", 5), "exposed") == 0


def test_what_was_trained_on_is_exposed_even_where_captions_are_shifted(audits):
    assert said(audits("trained on, same distribution", 4), "exposed") == 4
    shifted = audits("trained on, captions shifted to a blind AUC of 0.75", 4)
    assert said(shifted, "exposed") >= 3


def test_the_tables_own_bounds_are_kept_or_broken_by_the_share_exposed():
    null, trained = soundness.SITUATIONS[0], soundness.SITUATIONS[-1]
    row = {"p": 0.5, "p adjusted": 0.5, "Mann–Whitney": 0.5, "dataset inference": None}
    row |= {"verdict": "exposed", "tier": "none", "auc": 0.5, "blind": 0.5}
    assert not soundness.summary(null, [row] * 20)["holds"]
    assert soundness.summary(trained, [row] * 20)["holds"]
