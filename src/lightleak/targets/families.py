"""Where the parts of a vision-language model are, and how it reads a prompt without a template."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

_VISION_TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower", "vpm")
_LANGUAGE_MODELS = ("language_model", "text_model", "llm", "decoder")
_PROJECTOR = re.compile(
    r"(projector|connector|merger|resampler|perceiver|aligner|qformer)[^.]*$|(^|\.)mlp1$"
    r"|(visual|vision|text|language)_projection$|(^|\.)text_model\.head$"
)


@dataclass(frozen=True)
class Parts:
    """Module names, as `named_modules` gives them, in the order data flows.

    Attributes:
        text_blocks: the decoder layers.
        vision_blocks: the vision encoder's layers.
        projector: the modules between vision encoder and language model, or those that bring the
            two towers of a dual encoder into one space.
        vision_tower: the module that holds the vision encoder's layers and all below them; ""
            where none is found.
    """

    text_blocks: tuple[str, ...]
    vision_blocks: tuple[str, ...]
    projector: tuple[str, ...]
    vision_tower: str = ""


def find_parts(model: nn.Module) -> Parts:
    """Locate text blocks, vision blocks and projector by structure.

    The blocks are the outermost `nn.ModuleList` inside each tower (not the experts inside a
    block); towers are found by the names that transformers itself uses. A part that is not found
    is empty.
    """
    names = {name: module for name, module in model.named_modules() if name}
    vision = _tower(names, _VISION_TOWERS)
    vision_blocks = _blocks(names, vision)
    text_blocks = _blocks(names, _tower(names, _LANGUAGE_MODELS, without=vision))
    inside = (*vision_blocks, *text_blocks)
    projector: list[str] = []
    for name in names:
        nested = any(name.startswith(f"{other}.") for other in (*inside, *projector))
        if _PROJECTOR.search(name) and not nested:
            projector.append(name)
    return Parts(text_blocks, vision_blocks, tuple(projector), vision)


def _tower(names: dict[str, nn.Module], wanted: tuple[str, ...], *, without: str = "") -> str:
    """The module called one of `wanted` that holds the most blocks; "" when there is none."""
    found = [
        name
        for name in names
        if name.rpartition(".")[2] in wanted and not (without and name.startswith(without))
    ]
    return max(found, key=lambda name: len(_blocks(names, name)), default="")


def _blocks(names: dict[str, nn.Module], tower: str) -> tuple[str, ...]:
    lists = [
        (name.count("."), -len(module), name)
        for name, module in names.items()
        if tower and name.startswith(f"{tower}.") and isinstance(module, nn.ModuleList)
    ]
    if not lists:
        return ()
    _, negative_length, name = min(lists)
    return tuple(f"{name}.{index}" for index in range(-negative_length))


def takes_suffix(processor: Any) -> bool:
    """Whether the processor itself joins prompt and answer (PaliGemma's `suffix`)."""
    return "suffix" in inspect.getsource(type(processor))
