"""Every family's tiny model comes back from disk and looks at its image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lightleak.lab import families
from lightleak.lab.models import tiny_llava, train_tokenizer

_TEXTS = [
    "Describe the image.",
    "two things on a teal ground: a drum and a kite.",
    "user assistant",
]
_FAMILIES: dict[str, Callable[..., None]] = {
    "llava": tiny_llava,
    "idefics3 whole": partial(families.tiny_idefics3, split_images=False),
    "idefics3 split": partial(families.tiny_idefics3, split_images=True),
    "paligemma": families.tiny_paligemma,
    "gemma3": families.tiny_gemma3,
}


def _picture(seed: int, side: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _inputs(processor: Any, image: Image.Image) -> Any:
    text = f"{getattr(processor, 'image_token', '')}Describe the image.\n"
    if processor.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return processor(images=[image], text=[text], return_tensors="pt")


@pytest.mark.parametrize("name", _FAMILIES)
@torch.no_grad()
def test_a_saved_model_loads_and_its_answer_depends_on_the_image(name: str, tmp_path: Path) -> None:
    _FAMILIES[name](tmp_path, _TEXTS, seed=0)
    processor = AutoProcessor.from_pretrained(tmp_path, local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, local_files_only=True).eval()
    one, other = (_inputs(processor, _picture(seed)) for seed in (1, 2))
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert int(one["input_ids"].max()) < model.get_input_embeddings().num_embeddings
    seen = model(**one).logits[0, -1]
    assert torch.isfinite(seen).all()
    assert (seen - model(**other).logits[0, -1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", _FAMILIES)
def test_the_seed_decides_the_weights(name: str, tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        _FAMILIES[name](tmp_path / folder, _TEXTS, seed=seed)
    first, same, other = (
        (tmp_path / folder / "model.safetensors").read_bytes() for folder in ("a", "b", "c")
    )
    assert first == same != other


def test_idefics3_cuts_an_image_into_tiles_only_when_told(tmp_path: Path) -> None:
    tiles = {}
    for split in (False, True):
        families.tiny_idefics3(tmp_path / str(split), _TEXTS, split_images=split)
        processor = AutoProcessor.from_pretrained(tmp_path / str(split), local_files_only=True)
        tiles[split] = _inputs(processor, _picture(0))["pixel_values"].shape[1]
    assert tiles[False] == 1 < tiles[True]


@torch.no_grad()
def test_qwen2_vl_reads_images_of_different_sizes_in_one_sequence() -> None:
    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = train_tokenizer(_TEXTS, extra=special)
    torch.manual_seed(0)
    model = families.tiny_qwen2_vl(tokenizer).eval()
    reader = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )
    answers = []
    for seeds in ((1, 2), (1, 3)):
        images = [_picture(seeds[0], 32), _picture(seeds[1], 48)]
        pixels = reader(images=images, return_tensors="pt")
        rows = [int(grid.prod()) // 4 for grid in pixels["image_grid_thw"]]
        text = "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in rows)
        tokens = tokenizer(f"{text}Describe the image.", return_tensors="pt")
        kinds = (tokens["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        logits = model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            mm_token_type_ids=kinds,
            **pixels,
        ).logits
        answers.append(logits[0, -1])
    assert len(set(rows)) == 2
    assert (answers[0] - answers[1]).abs().max() > 1e-4
