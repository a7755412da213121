"""OpenCLIP checkpoints in their own form, dressed as a dual encoder of `transformers`.

Needs the extra `open-clip`. A checkpoint that carries `config.json` too is loaded by transformers
and never comes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import safetensors.torch
import torch
from torch import Tensor, nn

from lightleak.errors import UserError

CONFIG = "open_clip_config.json"


class OpenClip(nn.Module):
    """An OpenCLIP model under the names that transformers uses."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        # Named first, so that every parameter is known by its tower.
        self.vision_model = model.visual
        self.text_model = getattr(model, "text", None) or model.transformer
        self.whole = model
        self.logit_scale = model.logit_scale
        if getattr(model, "logit_bias", None) is not None:
            self.logit_bias = model.logit_bias
        context = SimpleNamespace(max_position_embeddings=model.context_length)
        self.config = SimpleNamespace(model_type="open_clip", get_text_config=lambda: context)

    def get_image_features(self, pixel_values: Tensor) -> Any:
        """(n, d) image embeddings, as `pooler_output`."""
        return SimpleNamespace(pooler_output=self.whole.encode_image(pixel_values))

    def get_text_features(self, input_ids: Tensor) -> Any:
        """(n, d) text embeddings, as `pooler_output`."""
        return SimpleNamespace(pooler_output=self.whole.encode_text(input_ids))


class _Found(dict[str, Any]):
    encodings = None


class _Tokenizer:
    """OpenCLIP pads and cuts every text to one length; 0 is the padding."""

    pad_token_id = 0
    eos_token_id = None

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self._tokenizer = tokenizer
        self.model_max_length = context_length

    def __call__(self, texts: Sequence[str], **options: Any) -> _Found:
        if options.get("return_tensors") == "pt":
            length = options["max_length"]
            return _Found(input_ids=self._tokenizer(list(texts), context_length=length))
        # Uncut, to see how long they are: no text has more tokens than bytes, and two marks.
        longest = 2 + max(len(text.encode()) for text in texts)
        rows = self._tokenizer(list(texts), context_length=longest)
        return _Found(input_ids=[row[row != 0].tolist() for row in rows])


class _Processor:
    def __init__(self, tokenizer: Any, context_length: int, transform: Any) -> None:
        self.tokenizer = _Tokenizer(tokenizer, context_length)
        self._transform = transform

    def image_processor(self, images: Sequence[Any], return_tensors: str) -> dict[str, Tensor]:
        del return_tensors
        return {"pixel_values": torch.stack([self._transform(image) for image in images])}


def load_open_clip(folder: Path) -> tuple[OpenClip, _Processor]:
    """The model in float32 and what prepares its inputs; weights from safetensors alone.

    Raises:
        UserError: the package is missing, or the folder is no complete checkpoint.
    """
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"it is an OpenCLIP checkpoint, and open_clip cannot be imported ({error})",
            str(folder),
            'Run: pip install "lightleak[open-clip]", or give its transformers form.',
        ) from error
    named = f"local-dir:{folder}"
    # A configuration may name parts on the hub; nobody gave those names, so nothing is fetched.
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            named, load_weights=False, pretrained_text=False
        )
        file = next(folder.glob("*.safetensors"))
        model.load_state_dict(safetensors.torch.load_file(file), strict=True)
        tokenizer = open_clip.get_tokenizer(named)
    except Exception as error:
        first = str(error).strip().partition("\n")[0][:300]
        raise UserError(f"open_clip could not load it ({first})", str(folder)) from error
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = offline
    return OpenClip(model), _Processor(tokenizer, model.context_length, transform)
