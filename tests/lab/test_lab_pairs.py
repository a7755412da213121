"""Dual encoders: they come back from disk, learn their pairs, and know their members."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoProcessor

from lightleak import targets
from lightleak.lab import build
from lightleak.lab.corpora import scenes
from lightleak.lab.dual import tiny_clip, tiny_siglip
from lightleak.lab.models import IMAGE_SIDE
from lightleak.lab.train import Training, train
from lightleak.records import Record, load, open_rgb
from lightleak.targets import Batch, DualEncoderTarget
from lightleak.training import pair_loss

_MAKERS = {"clip": tiny_clip, "siglip": tiny_siglip}


def _records(number: int) -> list[Record]:
    return [
        Record(id=str(i), image=scene.png(IMAGE_SIDE), text=scene.caption())
        for i, scene in enumerate(scenes(number, seed=0))
    ]


def _load(folder: Path) -> DualEncoderTarget:
    target = targets.load(folder, device="cpu")
    assert isinstance(target, DualEncoderTarget)
    return target


def _batch(target: DualEncoderTarget, records: list[Record]) -> Batch:
    return target.collate([target.encode(record, open_rgb(record.image)) for record in records])


@pytest.fixture(params=_MAKERS)
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> DualEncoderTarget:
    _MAKERS[request.param](tmp_path, [record.text for record in _records(40)], seed=0)
    return _load(tmp_path)


@pytest.mark.parametrize("make", _MAKERS.values(), ids=_MAKERS)
def test_a_text_ends_at_its_end_mark_and_a_long_one_is_cut_to_fit(
    make: Callable[..., None], tmp_path: Path
) -> None:
    make(tmp_path, ["a drum and a kite"], seed=0)
    processor = AutoProcessor.from_pretrained(tmp_path, local_files_only=True)
    target = _load(tmp_path)
    short, long = (
        processor.tokenizer(text, truncation=True)["input_ids"] for text in ("a kite", "a " * 200)
    )
    end = target.plain.config.text_config.eos_token_id
    assert short[-1] == long[-1] == end
    assert len(long) == target.plain.config.text_config.max_position_embeddings > len(short)


@torch.no_grad()
def test_embeddings_tell_texts_and_images_apart(fresh: DualEncoderTarget) -> None:
    batch = _batch(fresh, _records(2))
    for rows in (fresh.embed_images(batch.inputs), fresh.embed_texts(batch.inputs)):
        assert torch.isfinite(rows).all()
        assert (rows[0] - rows[1]).abs().max() > 1e-3


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny_clip(tmp_path / folder, ["a kite"], seed=seed)
    first, same, other = ((tmp_path / f / "model.safetensors").read_bytes() for f in "abc")
    assert first == same != other


@torch.no_grad()
def test_the_loss_is_the_one_that_each_model_was_made_for(fresh: DualEncoderTarget) -> None:
    batch = _batch(fresh, _records(5))
    logits = fresh.logits(
        fresh.embed_images(batch.inputs), fresh.embed_texts(batch.inputs)
    ).double()
    expected = 0.0
    for i in range(5):
        if fresh.sigmoid:
            signs = [1.0 if i == j else -1.0 for j in range(5)]
            z = [s * float(x) for s, x in zip(signs, logits[i], strict=True)]
            expected += sum(math.log1p(math.exp(-each)) for each in z) / 5
        else:
            for line in (logits[i], logits[:, i]):
                expected += (math.log(float(line.exp().sum())) - float(line[i])) / 10
    assert pair_loss(fresh, batch.inputs).item() == pytest.approx(expected, rel=1e-4)


def test_training_lowers_the_loss_and_finds_the_pairs(fresh: DualEncoderTarget) -> None:
    fresh.model.requires_grad_(True)
    records = _records(24)
    losses = train(fresh, records, Training(25, 1e-3, batch_size=12), seed=0)
    assert losses[-1] < 0.7 * losses[0]
    batch = _batch(fresh, records)
    with torch.no_grad():
        logits = fresh.logits(fresh.embed_images(batch.inputs), fresh.embed_texts(batch.inputs))
    assert (logits.argmax(1) == torch.arange(24)).float().mean() > 0.5


def test_a_trained_clip_knows_its_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTLEAK_CACHE", str(tmp_path / "cache"))
    made = build("pairs-clip", tmp_path / "out", members=40, nonmembers=80, epochs=30)
    members, nonmembers = (
        list(load(file, strict=True).records) for file in (made.members, made.nonmembers)
    )
    truth = json.loads(made.truth.read_text())["member"]
    assert truth == {r.id: r in members for r in (*members, *nonmembers)}
    target = _load(made.target)
    batch = _batch(target, [*members, *nonmembers])
    with torch.no_grad():
        cosine = (target.embed_images(batch.inputs) * target.embed_texts(batch.inputs)).sum(1)
    assert roc_auc_score(np.arange(120) < 40, cosine.numpy()) > 0.75
