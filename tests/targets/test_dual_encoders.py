"""Dual encoders are read as transformers reads them, and every gradient is autograd's own."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightleak import targets
from lightleak.errors import UserError
from lightleak.evidence import collect
from lightleak.evidence.gradients import GradientEngine, select
from lightleak.evidence.pairs import PairReader, augmentations
from lightleak.evidence.selfcheck import self_check
from lightleak.lab import corpora
from lightleak.lab.dual import tiny_clip, tiny_siglip
from lightleak.records import Record, open_rgb

MAKERS = {"clip": tiny_clip, "siglip": tiny_siglip}


@pytest.fixture(scope="module")
def some_records():
    scenes = corpora.scenes(12, seed=7)
    return [Record(f"r{i}", scene.png(40), scene.caption()) for i, scene in enumerate(scenes)]


@pytest.fixture(scope="module", params=list(MAKERS))
def folder(request, some_records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dual") / request.param
    MAKERS[request.param](folder, [record.text for record in some_records], seed=3)
    return folder


@pytest.fixture(scope="module")
def target(folder, some_records):
    target = targets.load(folder, dtype="float64")
    target.bank = collect.embed_bank(target, some_records[8:])
    return target


def naive_loss(target, record, bank):
    """The contrastive loss of one record against the bank, from the model's own parts."""
    model = target.model
    processor = target.processor
    sigmoid = model.config.model_type == "siglip"
    padding = {"padding": "max_length", "max_length": 64} if sigmoid else {"padding": True}

    def embed(each):
        pixels = processor.image_processor(images=[open_rgb(each.image)], return_tensors="pt")
        tokens = processor.tokenizer([each.text], return_tensors="pt", **padding)
        image = model.get_image_features(pixel_values=pixels["pixel_values"].double())
        text = model.get_text_features(input_ids=tokens["input_ids"])
        return [f.pooler_output[0] / f.pooler_output[0].norm() for f in (image, text)]

    image, text = embed(record)
    with torch.no_grad():
        others = [embed(each) for each in bank]
    scale, bias = model.logit_scale.exp(), model.logit_bias if sigmoid else 0.0
    own = scale * (image @ text) + bias
    by_text = torch.stack([scale * (image @ other) + bias for _, other in others])
    by_image = torch.stack([scale * (other @ text) + bias for other, _ in others])
    if sigmoid:
        wrong = sum(torch.nn.functional.softplus(each).sum() for each in (by_text, by_image))
        return torch.nn.functional.softplus(-own) + wrong / 2
    return sum(
        -torch.log_softmax(torch.cat([own[None], each]), 0)[0] / 2 for each in (by_text, by_image)
    )


class TestWhatTheModelSays:
    def test_logits_equal_those_of_transformers(self, target, some_records):
        batch = target.collate([target.encode(r, open_rgb(r.image)) for r in some_records[:1]])
        for record in some_records[1:4]:
            encoded = target.encode(record, open_rgb(record.image))
            expected = target.model(**encoded.inputs).logits_per_image
            one = target.collate([encoded])
            found = target.logits(target.embed_images(one.inputs), target.embed_texts(one.inputs))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert batch.inputs["input_ids"].shape[0] == 1

    def test_a_batch_changes_no_embedding(self, target, some_records):
        encoded = [target.encode(r, open_rgb(r.image)) for r in some_records]
        together = target.outputs(target.collate(encoded)).vectors()
        for each, vector in zip(encoded, together, strict=True):
            (alone,) = target.outputs(target.collate([each])).vectors()
            torch.testing.assert_close(vector, alone, rtol=1e-9, atol=1e-12)

    def test_a_long_text_is_cut_as_in_training_and_said(self, target, some_records):
        words = " ".join(str(i) for i in range(500))
        long = Record("long", some_records[0].image, words)
        encoded = target.encode(long, open_rgb(long.image))
        assert encoded.truncated
        assert encoded.n_tokens == 64
        assert not target.encode(some_records[0], open_rgb(long.image)).truncated

    def test_half_precision_is_compared_in_float32(self, folder, some_records):
        half = targets.load(folder, dtype="bfloat16")
        batch = half.collate([half.encode(some_records[0], open_rgb(some_records[0].image))])
        image = half.embed_images(batch.inputs)
        assert image.dtype == torch.float32
        torch.testing.assert_close(image.norm(dim=1), torch.ones(1), rtol=1e-6, atol=1e-6)


class TestGradients:
    def test_batched_readings_equal_plain_autograd(self, target, some_records):
        chosen = some_records[:6]
        engine = GradientEngine(target, select(target, "all"))
        reader = PairReader(target, augmented=False, dropout=False)
        rows = collect.measure(target, engine, reader, chosen).table.to_pylist()
        parameters = dict(target.model.named_parameters())
        wanted = [parameters[name] for name in engine.selection.shapes]
        for row, record in zip(rows, chosen, strict=True):
            for parameter in wanted:
                parameter.requires_grad_(True)
            loss = naive_loss(target, record, some_records[8:])
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            for parameter in wanted:
                parameter.requires_grad_(False)
            norms = [0.0 if g is None else float(g.norm()) for g in gradients]
            assert row["contrast_loss"] == pytest.approx(float(loss), rel=1e-9)
            np.testing.assert_allclose(row["matrix_norms"], norms, rtol=1e-7, atol=1e-14)

    def test_both_towers_and_their_projections_are_read(self, target):
        names = select(target, "last3").shapes
        assert any(name.startswith("vision_model") for name in names)
        assert any(name.startswith("text_model") for name in names)
        ends = {"clip": "visual_projection.weight", "siglip": "text_model.head.weight"}
        assert ends[target.model.config.model_type] in names

    def test_the_self_check_passes(self, target, some_records):
        engine = GradientEngine(target, select(target))
        assert self_check(target, engine, some_records, collect.BatchSize()).unreached == set()


class TestSteadiness:
    def test_no_batch_changes_what_is_dropped_or_altered(self, target, some_records):
        reader = PairReader(target, augmented=True, dropout=True)
        sizes = (collect.BatchSize(1, 10**6), collect.BatchSize(8, 10**6))
        one, many = (
            collect.measure(target, None, reader, some_records, size=size).table for size in sizes
        )
        for column in ("augmented_cosines", "dropout_cosines"):
            for a, b in zip(one[column].to_pylist(), many[column].to_pylist(), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9)
        assert len(one["dropout_cosines"][0]) == 10
        assert np.std(one["dropout_cosines"][0].as_py()) > 0

    def test_the_model_is_left_as_it_was(self, target, some_records):
        before = {
            name: (module.training, getattr(module, "dropout", None))
            for name, module in target.model.named_modules()
        }
        state = torch.random.get_rng_state()
        reader = PairReader(target, augmented=False, dropout=True)
        collect.measure(target, None, reader, some_records[:2])
        after = {
            name: (module.training, getattr(module, "dropout", None))
            for name, module in target.model.named_modules()
        }
        assert before == after
        assert torch.equal(state, torch.random.get_rng_state())

    def test_every_augmentation_changes_the_picture(self):
        noise = np.random.default_rng(0).integers(0, 255, (30, 20, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        for each in augmentations(image):
            assert each.size != image.size or each.tobytes() != image.tobytes()


def test_a_bank_of_one_pair_is_refused(target, some_records):
    with pytest.raises(UserError, match="fewer than two usable pairs"):
        collect.embed_bank(target, some_records[:1])


def test_an_adapter_on_a_dual_encoder_is_read(folder, some_records, tmp_path):
    from peft import LoraConfig, get_peft_model

    plain = targets.load(folder)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(plain.model, config).save_pretrained(tmp_path / "adapter")
    adapted = targets.load(folder, adapter=tmp_path / "adapter")
    adapted.bank = collect.embed_bank(adapted, some_records[8:])
    engine = GradientEngine(adapted, select(adapted))
    assert engine.selection.strategy == "lora"
    reader = PairReader(adapted, augmented=False, dropout=False)
    table = collect.measure(adapted, engine, reader, some_records[:4]).table
    assert np.all(np.array(table["matrix_norms"].to_pylist()).sum(axis=1) > 0)
    bare = targets.load(folder)
    batch = bare.collate([bare.encode(some_records[0], open_rgb(some_records[0].image))])
    assert not torch.allclose(adapted.embed_texts(batch.inputs), bare.embed_texts(batch.inputs))
