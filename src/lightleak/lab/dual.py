"""Tiny dual encoders from the real classes, saved as any checkpoint is; weights are random."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lightleak.lab.models import (
    IMAGE_SIDE,
    clip_image_processor,
    save,
    special_ids,
    train_tokenizer,
)

_LENGTH = 64  # tokens of a text; longer ones are cut
_PATCH = 8
_VOCABULARY = 3000  # room for most names in one or two tokens, as in CLIP's own
_TOWER = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def tiny_clip(folder: Path, texts: Iterable[str], *, seed: int, side: int = IMAGE_SIDE) -> None:
    """Write a CLIP of at most 0.6 million random parameters that reads images of `side` pixels."""
    tokenizer = _tokenizer(texts)
    config = CLIPConfig(
        text_config={**_text(tokenizer), "projection_dim": 64},
        vision_config={"image_size": side, "patch_size": _PATCH, **_TOWER, "projection_dim": 64},
        projection_dim=64,
    )
    processor = CLIPProcessor(clip_image_processor(side), tokenizer)
    save(folder, lambda: CLIPModel(config), processor, seed)


def tiny_siglip(folder: Path, texts: Iterable[str], *, seed: int, side: int = IMAGE_SIDE) -> None:
    """Write a SigLIP of the same towers; it knows texts padded to full length and no mask."""
    tokenizer = _tokenizer(texts)
    tokenizer.model_input_names = ["input_ids"]
    config = SiglipConfig(
        text_config=_text(tokenizer),
        vision_config={"image_size": side, "patch_size": _PATCH, **_TOWER},
    )
    processor = SiglipProcessor(
        SiglipImageProcessorPil(size={"height": side, "width": side}), tokenizer
    )

    def make() -> SiglipModel:
        model = SiglipModel(config)
        # Where the paper starts them (arXiv:2303.15343, section 3); transformers starts at zero.
        nn.init.constant_(model.logit_scale, math.log(10))
        nn.init.constant_(model.logit_bias, -10)
        return model

    save(folder, make, processor, seed)


def _tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Every text between its marks: CLIP reads a text off at the first end mark."""
    tokenizer = train_tokenizer(texts, vocabulary=_VOCABULARY)
    tokenizer.model_max_length = _LENGTH
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}",
        special_tokens=[(begin, tokenizer.bos_token_id), (end, tokenizer.eos_token_id)],
    )
    return tokenizer


def _text(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": _LENGTH,
        **_TOWER,
        **special_ids(tokenizer),
    }
