"""OpenCLIP checkpoints in their own form."""

import json
from importlib.util import find_spec

import pytest
import safetensors.torch
import torch

from lightleak import targets
from lightleak.errors import UserError
from lightleak.lab import corpora
from lightleak.records import Record, open_rgb

CONFIG = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 32,
            "patch_size": 8,
            "head_width": 8,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 32,
            "heads": 4,
            "layers": 2,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.3, 0.3, 0.3]},
}


@pytest.mark.skipif(find_spec("open_clip") is not None, reason="open_clip is installed")
def test_without_the_package_the_error_names_the_extra(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"lightleak\[open-clip\]"):
        targets.load(tmp_path)


def test_embeddings_are_those_of_open_clip(tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip and torchvision")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    model = open_clip.model.CLIP(**CONFIG["model_cfg"]).eval()
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "open_clip_model.safetensors")
    target = targets.load(tmp_path)
    named = f"local-dir:{tmp_path}"
    _, _, transform = open_clip.create_model_and_transforms(named)
    (scene,) = corpora.scenes(1, seed=0)
    record = Record("a", scene.png(40), scene.caption())
    image = open_rgb(record.image)
    found = target.outputs(target.collate([target.encode(record, image)]))
    with torch.no_grad():
        expected = (
            model.encode_image(transform(image)[None], normalize=True),
            model.encode_text(open_clip.get_tokenizer(named)([record.text]), normalize=True),
        )
    torch.testing.assert_close((found.image, found.text), expected)
    assert len(target.parts.text_blocks) == len(target.parts.vision_blocks) == 2
    assert target.encode(Record("b", record.image, "word " * 200), image).truncated
