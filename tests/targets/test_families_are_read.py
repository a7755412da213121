"""Every family: the answer is found exactly, and readings equal plain autograd."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightleak import targets
from lightleak.errors import UserError
from lightleak.evidence import collect
from lightleak.evidence.gradients import GradientEngine, select
from lightleak.evidence.selfcheck import self_check
from lightleak.evidence.tokens import AnswerReader
from lightleak.lab import families
from lightleak.lab.models import tiny_llava, train_tokenizer
from lightleak.records import Record, open_rgb

TEXTS = ["two things: a drum at the left and a kite.", "a bell", "three red kites, one large drum"]
SIZES = [(40, 64), (64, 64), (64, 40)]


@pytest.fixture(scope="module")
def some_records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    records = []
    for i in range(7):
        file = folder / f"{i}.png"
        pixels = rng.integers(0, 256, (*SIZES[i % 3], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
        records.append(Record(id=f"r{i}", image=file, text=TEXTS[i % 3] + " kite" * i))
    return records


MAKERS = {
    "llava": tiny_llava,
    "idefics3 whole": lambda folder, texts: families.tiny_idefics3(
        folder, texts, split_images=False
    ),
    "idefics3 split": families.tiny_idefics3,
    "paligemma": families.tiny_paligemma,
    "gemma3": families.tiny_gemma3,
}


class QwenInputs:
    """What Qwen2-VL's processor does for one image; the real one needs torchvision for videos."""

    chat_template = "given by `apply_chat_template`"
    image_token = "<|image_pad|>"

    def __init__(self, tokenizer):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        self.tokenizer = tokenizer
        self.image_processor = Qwen2VLImageProcessorPil(
            patch_size=8, merge_size=2, min_pixels=16 * 16, max_pixels=64 * 64
        )

    def apply_chat_template(self, messages, add_generation_prompt=False, tokenize=False):
        text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        text += messages[0]["content"][1]["text"] + "<|im_end|>\n"
        if len(messages) > 1:
            text += "<|im_start|>assistant\n" + messages[1]["content"][0]["text"] + "<|im_end|>\n"
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")

    def __call__(self, images, text, return_tensors):
        pixels = self.image_processor(images=images, return_tensors=return_tensors)
        n = int(pixels["image_grid_thw"][0].prod()) // 4
        wide = text[0].replace(self.image_token, self.image_token * n)
        inputs = self.tokenizer([wide], return_tensors=return_tensors)
        image = inputs["input_ids"] == self.tokenizer.convert_tokens_to_ids(self.image_token)
        return {**inputs, **pixels, "mm_token_type_ids": image.int()}


def qwen2_vl():
    extra = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = train_tokenizer(TEXTS, extra=extra)
    torch.manual_seed(0)
    model = families.tiny_qwen2_vl(tokenizer).eval().requires_grad_(False)
    return targets.GenerativeTarget(model, QwenInputs(tokenizer), torch.device("cpu"), {}, "qwen")


@pytest.fixture(scope="module", params=[*MAKERS, "qwen2_vl"])
def target(request, tmp_path_factory):
    if request.param == "qwen2_vl":
        made = qwen2_vl()
        made.model.double()
        return made
    folder = tmp_path_factory.mktemp("model")
    MAKERS[request.param](folder, TEXTS)
    return targets.load(folder, dtype="float64")


def test_the_parts_are_found(target):
    assert len(target.parts.text_blocks) == 4
    assert len(target.parts.vision_blocks) == 3
    assert target.parts.projector


def test_the_answer_is_exactly_what_follows_the_prompt(target, some_records):
    for record in some_records:
        encoded = target.encode(record, open_rgb(record.image))
        answer = encoded.inputs["input_ids"][0, encoded.answer_start :]
        text = target.processor.tokenizer.decode(answer)
        assert text.rstrip("\n") == record.text + "<|im_end|>"
        assert not encoded.boundary_ambiguous


def naive(target, engine, record):
    """Loss and gradient norms of one record, by autograd with nothing captured."""
    encoded = target.encode(record, open_rgb(record.image))
    parameters = dict(target.model.named_parameters())
    chosen = [parameters[name].requires_grad_(True) for name in engine.selection.shapes]
    logits = target.model(**encoded.inputs).logits[0]
    start = encoded.answer_start
    loss = torch.nn.functional.cross_entropy(
        logits[start - 1 : -1], encoded.inputs["input_ids"][0, start:]
    )
    gradients = torch.autograd.grad(loss, chosen)
    for parameter in chosen:
        parameter.requires_grad_(False)
    return loss.item(), [gradient.norm().item() for gradient in gradients]


def test_batched_readings_equal_plain_autograd(target, some_records):
    engine = GradientEngine(target, select(target, "all"))
    unreached = self_check(target, engine, some_records, collect.BatchSize()).unreached
    engine = GradientEngine(target, engine.selection.without(unreached))
    measured = collect.measure(target, engine, AnswerReader(), some_records)
    assert not measured.failures
    for row, record in zip(measured.table.to_pylist(), some_records, strict=True):
        loss, norms = naive(target, engine, record)
        assert row["id"] == record.id
        assert -np.mean(row["logprob"]) == pytest.approx(loss, rel=1e-9)
        np.testing.assert_allclose(row["matrix_norms"], norms, rtol=1e-7)


def test_the_order_of_records_changes_nothing(target, some_records):
    engine = GradientEngine(target, select(target, "last3"))
    rows = {}
    for order in (some_records, some_records[::-1]):
        for row in collect.measure(target, engine, AnswerReader(), order).table.to_pylist():
            rows.setdefault(row["id"], []).append(row)
    for one, other in rows.values():
        np.testing.assert_allclose(one["logprob"], other["logprob"], rtol=1e-9)
        np.testing.assert_allclose(
            one["slice_norms2"], other["slice_norms2"], rtol=1e-7, atol=1e-20
        )


def test_parameters_outside_linear_layers_are_read_one_record_at_a_time(tmp_path, some_records):
    families.tiny_gemma3(tmp_path, TEXTS)
    target = targets.load(tmp_path)
    (bare,) = select(target, "last3").dense
    assert bare.endswith("mm_input_projection_weight")


class TestTraps:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("llava")
        tiny_llava(folder, TEXTS)
        return folder

    def test_a_template_without_the_image_is_refused(self, folder, some_records, tmp_path):
        import shutil

        broken = tmp_path / "broken"
        shutil.copytree(folder, broken)
        template = broken / "chat_template.jinja"
        template.write_text(template.read_text().replace("<image>", ""))
        target = targets.load(broken)
        # Either the processor or the check must refuse: an image that is ignored scores nothing.
        with pytest.raises(UserError, match="no record can be given to the model"):
            self_check(target, None, some_records, collect.BatchSize())

    def test_a_special_token_in_a_text_is_refused(self, folder, some_records):
        target = targets.load(folder)
        record = Record(id="evil", image=some_records[0].image, text="a <image> kite")
        with pytest.raises(UserError, match="special token '<image>'"):
            target.encode(record, open_rgb(record.image))

    def test_a_record_longer_than_the_context_is_listed_not_cut(self, folder, some_records):
        target = targets.load(folder)
        long = Record(id="long", image=some_records[0].image, text="kite " * 2000)
        measured = collect.measure(target, None, AnswerReader(), [some_records[0], long])
        assert [failure.id for failure in measured.failures] == ["long"]
        assert "512" in measured.failures[0].error
        assert measured.table["id"].to_pylist() == ["r0"]

    def test_a_merged_boundary_token_belongs_to_the_answer_and_is_said(self, folder, some_records):
        target = targets.load(folder)
        template = target.processor.chat_template
        # With no newline between them, the answer's first letters join the prompt's last.
        template = template.replace("assistant\n{% endif", "assistant k{% endif")
        target.processor.chat_template = template.replace(
            "{{ message['role'] }}\n",
            "{{ 'assistant k' if message['role'] == 'assistant' else 'user\n' }}",
        )
        record = Record(id="joined", image=some_records[0].image, text="ites in the sky")
        encoded = target.encode(record, open_rgb(record.image))
        answer = target.processor.tokenizer.decode(
            encoded.inputs["input_ids"][0, encoded.answer_start :]
        )
        assert encoded.boundary_ambiguous
        assert answer.startswith(" kite")

    def test_dropout_does_not_act(self, folder, some_records):
        target = targets.load(folder)
        assert not any(module.training for module in target.model.modules())

    def test_half_precision_is_summed_in_single(self, folder, some_records):
        exact = collect.measure(targets.load(folder), None, AnswerReader(), some_records[:2]).table
        half = targets.load(folder, dtype="bfloat16")
        batch = half.collate([half.encode(some_records[0], open_rgb(some_records[0].image))])
        (log_probabilities,) = half.outputs(batch).log_probabilities
        assert log_probabilities.dtype == torch.float32
        total = log_probabilities.exp().sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=1e-5)
        coarse = collect.measure(half, None, AnswerReader(), some_records[:2]).table
        np.testing.assert_allclose(
            coarse["logprob"][0].as_py(), exact["logprob"][0].as_py(), atol=0.1
        )

    def test_a_record_whose_loss_is_not_finite_is_listed_and_spares_its_batch(
        self, folder, some_records
    ):
        target = targets.load(folder)
        engine = GradientEngine(target, select(target, "last3"))
        clean = collect.measure(target, engine, AnswerReader(), some_records).table.to_pylist()
        encode = target.encode

        def poisoned(record, image):
            encoded = encode(record, image)
            if record.id == "r3":
                encoded.inputs["pixel_values"].fill_(float("inf"))
            return encoded

        target.encode = poisoned
        measured = collect.measure(target, engine, AnswerReader(), some_records)
        assert [failure.id for failure in measured.failures] == ["r3"]
        for row in measured.table.to_pylist():
            (expected,) = [each for each in clean if each["id"] == row["id"]]
            np.testing.assert_allclose(row["logprob"], expected["logprob"], atol=1e-5)


class TestLoading:
    def test_pickled_weights_are_refused(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(UserError, match="--allow-pickle"):
            targets.load(tmp_path)

    def test_a_hub_id_offline_is_one_line(self):
        with pytest.raises(UserError, match="the hub did not give it") as caught:
            targets.load("nobody/nothing")
        assert "\n" not in str(caught.value)

    def test_a_missing_folder_says_so(self, tmp_path):
        with pytest.raises(UserError, match="no such folder"):
            targets.load(tmp_path / "absent")

    def test_an_adapter_that_changes_nothing_is_refused(self, tmp_path, some_records):
        from peft import LoraConfig, get_peft_model

        tiny_llava(tmp_path / "base", TEXTS)
        model = targets.load(tmp_path / "base").model
        config = LoraConfig(r=2, target_modules=["q_proj"])  # B starts at zero.
        get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
        target = targets.load(tmp_path / "base", adapter=tmp_path / "adapter")
        with pytest.raises(UserError, match="adapter changes nothing"):
            self_check(target, None, some_records, collect.BatchSize())

    def test_adapter_matrices_need_an_adapter(self, tmp_path):
        tiny_llava(tmp_path, TEXTS)
        with pytest.raises(UserError, match="has no adapter"):
            select(targets.load(tmp_path), "lora")

    def test_hashes_change_with_the_weights(self, tmp_path):
        tiny_llava(tmp_path / "a", TEXTS, seed=0)
        tiny_llava(tmp_path / "b", TEXTS, seed=1)
        one, other = (targets.load(tmp_path / name).hashes for name in "ab")
        assert one["weights"] != other["weights"]
        assert one["processor"] == other["processor"]
