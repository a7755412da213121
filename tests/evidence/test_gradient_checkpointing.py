"""A LLaVA's readings: under gradient checkpointing, and of every parameter that it has."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.modeling_layers import GradientCheckpointingLayer

from lightleak import targets
from lightleak.evidence.gradients import GradientEngine, select
from lightleak.lab.models import tiny_llava
from lightleak.records import Record, open_rgb

TEXTS = ["two things: a drum at the left and a kite.", "a bell", "three red kites, one large drum"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    tiny_llava(folder / "model", TEXTS)
    rng = np.random.default_rng(0)
    for i in range(len(TEXTS)):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def target(folder):
    return targets.load(folder / "model", dtype="float64")


@pytest.fixture
def encoded(folder, target):
    records = [Record(id=f"r{i}", image=folder / f"{i}.png", text=t) for i, t in enumerate(TEXTS)]
    return [target.encode(record, open_rgb(record.image)) for record in records]


def checkpointed(model, reentrant):
    """Count the layers that run again in the backward pass."""
    again = []
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # As it has to be where weights are frozen.
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # It alone: transformers checkpoints in train mode only.
            module.mlp.register_forward_pre_hook(lambda *_: again.append(None))
    return again


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_reading(target, encoded, reentrant):
    engine = GradientEngine(target, select(target, "all"))
    batch = target.collate(encoded)
    plain = engine.read(batch, {})
    again = checkpointed(target.model, reentrant)
    read = engine.read(batch, {})
    layers = len(target.parts.text_blocks) + len(target.parts.vision_blocks)
    assert len(again) > layers
    torch.testing.assert_close(read.norms2, plain.norms2, rtol=1e-10, atol=1e-14)


def test_every_parameter_is_read_as_autograd_does(target, encoded):
    engine = GradientEngine(target, select(target, "everything"))
    parameters = dict(target.model.named_parameters())
    assert set(engine.selection.shapes) == set(parameters)
    # The class token is a bare parameter of the vision tower; all else is captured.
    assert [name.rpartition(".")[2] for name in engine.selection.dense] == ["class_embedding"]
    unreached = engine.unreached([target.collate(encoded[:1])])
    for each in encoded:
        batch = target.collate([each])
        found = dict(zip(parameters, engine.read(batch, {}).matrix_norms[0], strict=True))
        target.model.requires_grad_(True)
        target.outputs(batch).losses.sum().backward()
        for name, parameter in parameters.items():
            assert (parameter.grad is None) == (name in unreached), name
            if parameter.grad is not None:
                norm = parameter.grad.norm()
                torch.testing.assert_close(found[name], norm, rtol=1e-9, atol=1e-13)
        target.model.zero_grad()
        target.model.requires_grad_(False)


def test_a_padded_batch_is_read_as_its_records_are_alone(target, encoded):
    """The last language layer has no gradient at images and prompts: they are cut off there."""
    selection = select(target, "all")
    engine = GradientEngine(target, selection)
    torch.manual_seed(0)
    references = {name: torch.randn(1, *s).double() for name, s in selection.shapes.items()}
    together = engine.read(target.collate(encoded), references)
    for i, each in enumerate(encoded):
        alone = engine.read(target.collate([each]), references)
        torch.testing.assert_close(together.norms2[i], alone.norms2[0], rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(together.dots[i], alone.dots[0], rtol=1e-9, atol=1e-11)
