"""Images of different sizes share a batch, and no record's readings depend on the others."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from lightleak import targets
from lightleak.evidence import collect
from lightleak.evidence.gradients import GradientEngine, select
from lightleak.evidence.gradients.rows import UnevenRows, by_record
from lightleak.evidence.selfcheck import self_check
from lightleak.lab import families
from lightleak.lab.models import CHAT_TEMPLATE, save, special_ids, train_tokenizer
from lightleak.records import Record
from lightleak.targets import Batch
from targets.test_families_are_read import TEXTS, QwenInputs, qwen2_vl

SIZES = [(64, 64), (32, 64), (64, 48), (32, 32), (48, 64), (64, 64)]


def qwen2_5_vl():
    """A Qwen2.5-VL: some of its vision blocks attend within windows, which reorders patches."""
    extra = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = train_tokenizer(TEXTS, extra=extra)
    named = zip(("image", "video", "vision_start", "vision_end"), extra, strict=True)
    earlier = families.tiny_qwen2_vl(tokenizer).config.text_config.to_dict()
    config = Qwen2_5_VLConfig(
        text_config={**earlier, "model_type": "qwen2_5_vl_text"},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 48,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 8,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in named},
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)
    return targets.GenerativeTarget(model, QwenInputs(tokenizer), torch.device("cpu"), {}, "qwen")


def llava_next(folder):
    """A LLaVA-NeXT: an image becomes a small view and two to four tiles."""
    tokenizer = train_tokenizer(TEXTS)
    grids = [[32, 64], [64, 32], [64, 64]]
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 32},
            crop_size={"height": 32, "width": 32},
            image_grid_pinpoints=grids,
        ),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE.replace("{{ image_token }}", "<image>"),
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), **families._TEXT, **special_ids(tokenizer)
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grids,
        vision_feature_layer=-1,
    )
    save(folder, lambda: LlavaNextForConditionalGeneration(config), processor, 0)


@pytest.fixture(scope="module")
def some_records(tmp_path_factory):
    """Pictures of several sizes; the more kites, the longer the text."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    records = []
    for i, size in enumerate(SIZES):
        file = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
        records.append(Record(id=f"r{i}", image=file, text=TEXTS[i % 3] + " kite" * (i % 4)))
    return records


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl", "llava_next", "idefics3"])
def target(request, tmp_path):
    if request.param.startswith("qwen"):
        made = (qwen2_vl if request.param == "qwen2_vl" else qwen2_5_vl)()
        made.model.double()
        return made
    if request.param == "llava_next":
        llava_next(tmp_path)
    else:
        families.tiny_idefics3(tmp_path, TEXTS)
    return targets.load(tmp_path, dtype="float64")


def test_images_of_different_sizes_go_together_and_read_as_alone(target, some_records):
    engine = GradientEngine(target, select(target, "all"))
    encoded = collect.encode(target, some_records).records
    alone = {each.id: engine.read(target.collate([each]), {}) for each in encoded}
    alike = {}
    for each in encoded:
        alike.setdefault(each.shape_key, []).append(each)
    most = max(alike.values(), key=len)
    assert len({each.pieces for each in most}) > 1
    batch = target.collate(most)
    together = engine.read(batch, {})
    for i, key in enumerate(batch.ids):
        expected = alone[key]
        torch.testing.assert_close(
            together.outputs.vectors()[i], expected.outputs.vectors()[0], rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(
            together.matrix_norms[i], expected.matrix_norms[0], rtol=1e-7, atol=1e-12
        )
        torch.testing.assert_close(together.norms2[i], expected.norms2[0], rtol=1e-7, atol=1e-16)


def batch_of(*pieces):
    n = len(pieces)
    return Batch({}, tuple(f"r{i}" for i in range(n)), ((1, 9),) * n, (), pieces)


def test_rows_are_dealt_out_by_patches_and_padded_with_zeros():
    alone = {}
    # Four patches of an image become one row.
    by_record("merger", torch.ones(2, 3), batch_of(8), alone)
    rows = torch.arange(15.0).reshape(5, 3)
    dealt = by_record("merger", rows, batch_of(4, 16), alone)
    assert torch.equal(dealt[0], torch.stack([rows[0], *torch.zeros(3, 3)]))
    assert torch.equal(dealt[1], rows[1:])


@pytest.mark.parametrize(
    ("rows", "pieces"),
    [
        (2, (8, 8)),  # All records share the rows.
        (3, (6, 6)),  # No whole row ends where the first record does.
        (3, (8, 8)),  # A row was dropped, and nobody knows whose.
    ],
)
def test_rows_that_nobody_owns_alone_are_refused_by_name(rows, pieces):
    alone = {}
    by_record("merger", torch.ones(2, 3), batch_of(8), alone)
    with pytest.raises(UnevenRows, match="merger"):
        by_record("merger", torch.ones(rows, 3), batch_of(*pieces), alone)


class TestTheCheckSaysAloud:
    def test_which_parameters_keep_records_apart(self, tmp_path, some_records):
        families.tiny_gemma3(tmp_path, TEXTS)
        target = targets.load(tmp_path)
        engine = GradientEngine(target, select(target, "last3"))
        (name,) = self_check(target, engine, some_records, collect.BatchSize()).one_by_one
        assert name.endswith("mm_input_projection_weight")

    def test_which_layer_deals_no_rows(self, tmp_path, some_records):
        families.tiny_idefics3(tmp_path, TEXTS)
        target = targets.load(tmp_path)
        encode = target.encode

        def with_an_empty_tile(record, image):
            encoded = encode(record, image)
            if record.id == "r4":
                # The tower passes over what is zero, and has no embedding for these tokens.
                encoded.inputs["pixel_values"][0, 1] = 0
                ids = encoded.inputs["input_ids"][0]
                (places,) = (ids == target.processor.image_token_id).nonzero(as_tuple=True)
                ids[places[: target.processor.image_seq_len]] = target._pad
            return encoded

        target.encode = with_an_empty_tile
        engine = GradientEngine(target, select(target, "last3"))
        (name,) = self_check(target, engine, some_records, collect.BatchSize()).one_by_one
        assert any(matrix.startswith(name) for matrix in engine.selection.shapes)

    def test_nothing_where_records_go_together(self, target, some_records):
        engine = GradientEngine(target, select(target, "last3"))
        assert not self_check(target, engine, some_records, collect.BatchSize()).one_by_one
