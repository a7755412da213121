"""Dual encoders of further families are read as transformers reads them, or refused in one line."""

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import (
    ChineseCLIPImageProcessorPil,
)
from transformers.models.efficientnet.image_processing_pil_efficientnet import (
    EfficientNetImageProcessorPil,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lightleak import targets
from lightleak.errors import UserError
from lightleak.evidence import collect
from lightleak.evidence.gradients import GradientEngine, select
from lightleak.evidence.pairs import PairReader
from lightleak.evidence.selfcheck import self_check
from lightleak.lab.models import clip_image_processor, save
from lightleak.records import Record, open_rgb

TEXTS = ["a drum", "two red kites over a small bell", "a bell and a drum", "three kites"]
WORDS = sorted({word for text in TEXTS for word in text.split()})
SIZES = [(40, 64), (64, 64), (64, 40)]
LENGTH, WIDTH = 24, 32
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
BOTH = ("visual_projection", "text_projection")


def of_bert():
    """BERT's tokenizer, which marks segments, and what its configuration repeats of it."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*marks, *WORDS])}
    tokenizer = hf.BertTokenizer(vocab=vocabulary, model_max_length=LENGTH)
    return tokenizer, {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, **TOWER}


def of_roberta():
    """XLM-R's tokenizer, whose model counts positions from behind the padding's id, 1."""
    marks = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = [(word, 0.0) for word in [*marks, *(f"▁{word}" for word in WORDS), "<mask>"]]
    tokenizer = hf.XLMRobertaTokenizer(vocab=vocabulary, model_max_length=LENGTH)
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    return tokenizer, {"vocab_size": len(tokenizer), **ids, **TOWER}


def square(processor):
    return processor(
        size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}, do_resize=True
    )


def chinese_clip(folder):
    tokenizer, text = of_bert()
    config = hf.ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    processor = hf.ChineseCLIPProcessor(square(ChineseCLIPImageProcessorPil), tokenizer)
    save(folder, lambda: hf.ChineseCLIPModel(config), processor, 0)


def alt_clip(folder):
    tokenizer, text = of_roberta()
    text |= {"max_position_embeddings": LENGTH + 2, "project_dim": WIDTH}
    config = hf.AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    processor = hf.AltCLIPProcessor(clip_image_processor(32), tokenizer)
    save(folder, lambda: hf.AltCLIPModel(config), processor, 0)


def metaclip_2(folder):
    tokenizer, text = of_roberta()
    text |= {"max_position_embeddings": LENGTH, "projection_dim": 24}
    vision = {**VISION, "projection_dim": 24}
    config = hf.MetaClip2Config(text_config=text, vision_config=vision, projection_dim=24)
    processor = hf.CLIPProcessor(clip_image_processor(32), tokenizer)
    save(folder, lambda: hf.MetaClip2Model(config), processor, 0)


def vit_and_bert(folder):
    tokenizer, text = of_bert()
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(
        hf.ViTConfig(**VISION), hf.BertConfig(**text), projection_dim=24
    )
    processor = hf.VisionTextDualEncoderProcessor(square(ViTImageProcessorPil), tokenizer)
    save(folder, lambda: hf.VisionTextDualEncoderModel(config), processor, 0)


def siglip2(folder):
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = sorted({letter for text in TEXTS for letter in text.replace(" ", "▁")})
    vocabulary = {piece: i for i, piece in enumerate([*marks, *letters])}
    tokenizer = hf.Siglip2Tokenizer(vocab=vocabulary, padding_side="right")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, **TOWER}
    config = hf.Siglip2Config(
        text_config={**text, "projection_size": WIDTH},
        vision_config={**TOWER, "patch_size": 16, "num_patches": 256},
    )
    processor = hf.Siglip2Processor(Siglip2ImageProcessorPil(), tokenizer)
    save(folder, lambda: hf.Siglip2Model(config), processor, 0)


def align(folder):
    tokenizer, text = of_bert()
    vision = {
        "image_size": 32,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "hidden_dim": WIDTH,
        "kernel_sizes": [3, 3],
        "in_channels": [32, 16],
        "out_channels": [16, WIDTH],
        "depthwise_padding": [],
        "strides": [1, 2],
        "num_block_repeats": [1, 1],
        "expand_ratios": [1, 4],
    }
    config = hf.AlignConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    processor = hf.AlignProcessor(square(EfficientNetImageProcessorPil), tokenizer)
    save(folder, lambda: hf.AlignModel(config), processor, 0)


# Each family: how it is made, and the modules that bring its towers into one space.
FAMILIES = {
    "chinese_clip": (chinese_clip, BOTH),
    "altclip": (alt_clip, BOTH),
    "metaclip_2": (metaclip_2, BOTH),
    "vision-text-dual-encoder": (vit_and_bert, BOTH),
    "siglip2": (siglip2, ("text_model.head",)),
    "align": (align, ("text_projection",)),
}


@pytest.fixture(scope="module")
def some_records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    records = []
    for i in range(9):
        file = folder / f"{i}.png"
        pixels = rng.integers(0, 256, (*SIZES[i % 3], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
        records.append(Record(f"r{i}", file, TEXTS[i % 4] + " kites" * (i // 4)))
    return records


@pytest.fixture(scope="module", params=list(FAMILIES))
def target(request, some_records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dual") / request.param
    FAMILIES[request.param][0](folder)
    target = targets.load(folder, dtype="float64")
    target.bank = collect.embed_bank(target, some_records[6:])
    return target


def family(target):
    return target.model.config.model_type


def batch_of(target, records):
    return target.collate([target.encode(record, open_rgb(record.image)) for record in records])


def whole_model(target, records):
    """Unit embeddings and logits as the model's own forward pass gives them."""
    said = target.model(**batch_of(target, records).inputs)
    image, text = (functional.normalize(e, dim=-1) for e in (said.image_embeds, said.text_embeds))
    return image, text, said.logits_per_image


def test_both_towers_and_what_joins_them_are_found(target):
    assert len(target.parts.text_blocks) == len(target.parts.vision_blocks) == 2
    assert target.parts.projector == FAMILIES[family(target)][1]


def test_embeddings_and_logits_are_those_of_the_whole_model(target, some_records):
    image, text, logits = whole_model(target, some_records)
    found = target.outputs(batch_of(target, some_records))
    torch.testing.assert_close(found.image, image, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.text, text, rtol=1e-9, atol=1e-12)
    scores = target.logits(found.image, found.text)
    torch.testing.assert_close(scores, logits, rtol=1e-9, atol=1e-12)


def test_texts_and_pixels_are_those_of_the_processor(target, some_records):
    record = some_records[1]
    encoded = target.encode(record, open_rgb(record.image))
    expected = target.processor(
        images=[open_rgb(record.image)],
        text=[record.text],
        padding="max_length" if family(target) == "siglip2" else True,
        max_length=64,
        truncation=True,
        return_tensors="pt",
    )
    for name, value in encoded.inputs.items():
        torch.testing.assert_close(value, expected[name].to(value.dtype))


def test_a_batch_changes_no_embedding(target, some_records):
    together = target.outputs(batch_of(target, some_records)).vectors()
    for record, vector in zip(some_records, together, strict=True):
        (alone,) = target.outputs(batch_of(target, [record])).vectors()
        torch.testing.assert_close(vector, alone, rtol=1e-9, atol=1e-12)
    assert torch.stack(together).std(0).max() > 1e-3


def naive_loss(target, record, bank):
    """The loss of one record against a bank that stays as it is, from the whole model."""
    image, text, _ = whole_model(target, [record, *bank])
    by_text = target.logits(image[:1], torch.cat([text[:1], text[1:].detach()]))
    by_image = target.logits(torch.cat([image[:1], image[1:].detach()]), text[:1]).T
    own = torch.zeros(1, dtype=torch.long)
    if family(target) != "siglip2":
        return sum(functional.cross_entropy(each, own) for each in (by_text, by_image)) / 2
    wrong = functional.softplus(by_text[0, 1:]).sum() + functional.softplus(by_image[0, 1:]).sum()
    return functional.softplus(-by_text[0, 0]) + wrong / 2


def test_gradients_are_those_of_autograd_and_reach_every_selected_matrix(target, some_records):
    engine = GradientEngine(target, select(target, "all"))
    assert self_check(target, engine, some_records[:6], collect.BatchSize()).unreached == set()
    reader = PairReader(target, augmented=False, dropout=False)
    rows = collect.measure(target, engine, reader, some_records[:4]).table.to_pylist()
    parameters = dict(target.model.named_parameters())
    wanted = [parameters[name] for name in engine.selection.shapes]
    for row, record in zip(rows, some_records[:4], strict=True):
        for parameter in wanted:
            parameter.requires_grad_(True)
        loss = naive_loss(target, record, some_records[6:])
        gradients = torch.autograd.grad(loss, wanted)
        for parameter in wanted:
            parameter.requires_grad_(False)
        assert row["contrast_loss"] == pytest.approx(loss.item(), rel=1e-9)
        norms = [gradient.norm().item() for gradient in gradients]
        np.testing.assert_allclose(row["matrix_norms"], norms, rtol=1e-7, atol=1e-14)


def test_a_text_longer_than_the_context_is_cut_and_said(target, some_records):
    long = Record("long", some_records[0].image, "two red kites " * 60)
    reader = PairReader(target, augmented=False, dropout=False)
    measured = collect.measure(target, None, reader, [some_records[0], long])
    assert not measured.failures
    assert measured.table["truncated"].to_pylist() == [False, True]


def test_attention_drops_in_every_tower_that_attends(target, some_records, monkeypatch):
    spread = {}

    def watch(name):
        embed = getattr(target, name)

        def watched(inputs):
            rows = embed(inputs)
            spread[name] = (rows - rows[0]).abs().max().item()  # The last call is under dropout.
            return rows

        monkeypatch.setattr(target, name, watched)

    watch("embed_images")
    watch("embed_texts")
    collect.measure(target, None, PairReader(target, False, True), some_records[:1])
    assert spread["embed_texts"] > 1e-4
    # ALIGN's images go through convolutions alone.
    assert (spread["embed_images"] > 1e-4) is (family(target) != "align")


def text_only():
    return hf.BertModel(hf.BertConfig(vocab_size=40, **TOWER))


def vision_only():
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION))


def half_of_a_clip():
    return hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(vocab_size=40, **TOWER))


def classifier():
    config = hf.CLIPConfig(text_config={"vocab_size": 40, **TOWER}, vision_config=VISION)
    return hf.CLIPForImageClassification(config)


@pytest.mark.parametrize("make", [text_only, vision_only, half_of_a_clip, classifier])
def test_a_checkpoint_that_is_neither_is_refused_in_one_line(make, tmp_path):
    with targets.quiet():
        make().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="or a dual encoder") as caught:
        targets.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
