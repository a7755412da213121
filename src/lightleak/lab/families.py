"""Tiny models of further families, to prove that a target of another shape is read rightly."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lightleak.lab.models import CHAT_TEMPLATE, save, special_ids, train_tokenizer

_TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def tiny_idefics3(
    folder: Path, texts: Iterable[str], *, seed: int = 0, split_images: bool = True
) -> None:
    """Write an Idefics3 (SmolVLM's shape): tiles, pixel shuffle, a connector.

    With `split_images` an image becomes several tiles and a global view, so that records of one
    batch differ in how many rows of the vision tower they take.
    """
    grid = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    extra = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *grid]
    tokenizer = train_tokenizer(texts, extra=extra)
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(
            size={"longest_edge": 64},
            max_image_size={"longest_edge": 32},
            do_image_splitting=split_images,
        ),
        tokenizer,
        image_seq_len=4,
        chat_template=CHAT_TEMPLATE.replace("{{ image_token }}", "<image>"),
    )
    config = Idefics3Config(
        vision_config={
            "model_type": "idefics3_vision",
            "image_size": 32,
            "patch_size": 8,
            **_VISION,
        },
        text_config=LlamaConfig(vocab_size=len(tokenizer), **_TEXT, **special_ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    save(folder, lambda: Idefics3ForConditionalGeneration(config), processor, seed)


def tiny_paligemma(folder: Path, texts: Iterable[str], *, seed: int = 0) -> None:
    """Write a PaliGemma: no chat template, prefix attended in both directions, answer as suffix."""
    tokenizer = train_tokenizer(texts)
    image_processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    image_processor.image_seq_length = 16
    processor = PaliGemmaProcessor(image_processor, tokenizer)
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(image_size=32, patch_size=8, **_VISION),
        text_config=GemmaConfig(
            vocab_size=len(processor.tokenizer), head_dim=12, **_TEXT, **special_ids(tokenizer)
        ),
        image_token_index=processor.image_token_id,
        projection_dim=48,
    )
    save(folder, lambda: PaliGemmaForConditionalGeneration(config), processor, seed)


def tiny_gemma3(folder: Path, texts: Iterable[str], *, seed: int = 0) -> None:
    """Write a Gemma 3: sliding windows, a projector that is a bare parameter, image attention."""
    tokenizer = train_tokenizer(texts, image_token="<image_soft_token>", extra=["<boi>", "<eoi>"])
    named = {"image_token": "<image_soft_token>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens=named,
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer,
        image_seq_length=4,
        chat_template=CHAT_TEMPLATE.replace("{{ image_token }}", "<boi>"),
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(
            image_size=32, patch_size=8, vision_use_head=False, **_VISION
        ),
        text_config=Gemma3TextConfig(
            vocab_size=len(tokenizer),
            head_dim=12,
            sliding_window=16,
            **_TEXT,
            **special_ids(tokenizer),
        ),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<boi>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<eoi>"),
    )

    def make() -> Gemma3ForConditionalGeneration:
        model = Gemma3ForConditionalGeneration(config)
        # transformers starts this parameter at zero, so that no image would be seen.
        nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
        return model

    save(folder, make, processor, seed)


def tiny_qwen2_vl(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL for a tokenizer: images of any size packed into one sequence of patches.

    Only the model: its processor reads videos too and cannot be made without torchvision.
    """
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 2, 2],
            },
            **_TEXT,
            **special_ids(tokenizer),
        },
        vision_config={
            "depth": 3,
            "embed_dim": 32,
            "hidden_size": 48,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    return Qwen2VLForConditionalGeneration(config)
