"""Tiny vision-language models from the real classes, saved as any checkpoint is.

Weights are random: `train` teaches them. A folder written here loads by the same code as one of
seven billion parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lightleak.targets import quiet

IMAGE_SIDE = 32
_PATCH = 8
_VOCABULARY = 1536
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ image_token }}\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str],
    *,
    image_token: str = "<image>",
    extra: Iterable[str] = (),
    vocabulary: int = _VOCABULARY,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML's turn marks, trained on some texts."""
    turn = ("<|im_start|>", "<|im_end|>")
    special = ["<pad>", "<s>", "</s>", image_token, *turn, *extra]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": image_token, "turn_token": turn[0]},
    )


def tiny_llava(folder: Path, texts: Iterable[str], *, text_layers: int = 4, seed: int = 0) -> None:
    """Write a LLaVA that reads 32 px images as 16 tokens: 1.4 million random parameters."""
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=_PATCH,
    )
    _llava(folder, texts, vision, text_layers=text_layers, feature_layer=-2, seed=seed)


def reading_llava(folder: Path, texts: Iterable[str], *, seed: int = 0) -> None:
    """Write a LLaVA of 1.5 million random parameters that reads 224 px images as 49 tokens."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=224,
        patch_size=32,
    )
    _llava(folder, texts, vision, text_layers=3, feature_layer=-1, seed=seed)


def _llava(
    folder: Path,
    texts: Iterable[str],
    vision: CLIPVisionConfig,
    *,
    text_layers: int,
    feature_layer: int,
    seed: int,
) -> None:
    tokenizer = train_tokenizer(texts)
    processor = LlavaProcessor(
        image_processor=clip_image_processor(vision.image_size),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE.replace("{{ image_token }}", "<image>"),
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=text_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            **special_ids(tokenizer),
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=feature_layer,
    )
    save(folder, lambda: LlavaForConditionalGeneration(config), processor, seed)


def clip_image_processor(side: int, **settings: Any) -> Any:
    """CLIP's image processor at `side` pixels, in the form that needs no torchvision."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **settings
    )


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The ids that a language model's configuration repeats from its tokenizer."""
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def save(folder: Path, make: Callable[[], Any], processor: Any, seed: int) -> None:
    """Make a model from a seed and write it with its processor."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
