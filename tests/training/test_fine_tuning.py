"""Fine-tuning: what it trains, in which order, and that a broken one goes on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lightleak import targets
from lightleak.errors import UserError
from lightleak.lab.models import tiny_llava
from lightleak.records import Record
from lightleak.training import FineTuning, fine_tune

RECIPE = FineTuning(epochs=3, batch_size=4, learning_rate=2e-3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llava(folder, ["What colour is it? red green blue"] * 3, seed=3)
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng, found = np.random.default_rng(0), []
    for i in range(12):
        colour = ("red", "green", "blue")[i % 3]
        pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
        pixels[..., i % 3] += 180
        file = folder / f"{i}.png"
        Image.fromarray(pixels).save(file)
        found.append(Record(f"r{i}", file, colour, "What colour is it?"))
    return found


def loaded(folder, **options):
    return targets.load(folder, device="cpu", dtype="float32", **options)


def losses(target, records):
    from lightleak.evidence.collect import encode

    with torch.no_grad():
        return target.outputs(target.collate(encode(target, records).records)).losses


def test_an_adapter_learns_the_answers_and_leaves_the_vision_tower_alone(base, records, tmp_path):
    before = losses(loaded(base), records).mean()
    fine_tune(loaded(base), records, RECIPE, tmp_path / "tuned", seed=0)
    tuned = loaded(base, adapter=tmp_path / "tuned")
    assert losses(tuned, records).mean() < before - 0.5
    names = load_file(tmp_path / "tuned" / "adapter_model.safetensors")
    assert any("language_model" in name for name in names)
    assert any("projector" in name for name in names)
    assert not any("vision" in name for name in names)


@pytest.mark.parametrize("vision", [False, True])
def test_full_training_changes_the_vision_tower_only_when_asked(base, records, tmp_path, vision):
    recipe = replace(RECIPE, method="full", vision=vision, epochs=1)
    fine_tune(loaded(base), records, recipe, tmp_path / "tuned", seed=0)
    first, then = (dict(loaded(f).model.named_parameters()) for f in (base, tmp_path / "tuned"))
    changed = {name for name in first if not torch.equal(first[name], then[name])}
    # The last vision block feeds nothing in this model, so it is not all that changes.
    assert any(name.startswith("model.vision_tower.") for name in changed) is vision
    assert any(".language_model." in name for name in changed)


def test_order_and_start_depend_on_the_seed_alone(base, records, tmp_path):
    for name, given, seed in (
        ("one", records, 1),
        ("same", [replace(r, id=f"other-{r.id}") for r in records], 1),
        ("other", records, 2),
    ):
        fine_tune(loaded(base), given, RECIPE, tmp_path / name, seed=seed)
    one, same, other = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("one", "same", "other")
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_broken_training_goes_on_to_the_same_weights(base, records, tmp_path):
    fine_tune(loaded(base), records, RECIPE, tmp_path / "whole", seed=0)
    steps = 0

    def break_in_the_second_epoch(_):
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(
            *(loaded(base), records, RECIPE, tmp_path / "broken"),
            seed=0,
            progress=break_in_the_second_epoch,
        )
    assert not (tmp_path / "broken").exists()
    # What a kill leaves when it falls into the writing of a checkpoint.
    (tmp_path / ".broken" / "checkpoints" / "checkpoint-5").mkdir()
    seen = []
    fine_tune(loaded(base), records, RECIPE, tmp_path / "broken", seed=0, progress=seen.append)
    assert len(seen) == 6, "the first epoch was trained once more"
    whole, resumed = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "broken")
    )
    for name, weights in whole.items():
        torch.testing.assert_close(resumed[name], weights, rtol=0, atol=0)


def test_a_record_that_the_model_cannot_read_is_named(base, records, tmp_path):
    bad = [*records, replace(records[0], id="long", text="red " * 600)]
    with pytest.raises(UserError, match="long"):
        fine_tune(loaded(base), bad, RECIPE, tmp_path / "tuned", seed=0)
