"""Fine-tuning: what it trains, in which order, and that a broken one goes on."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lightleak import targets
from lightleak.errors import UserError
from lightleak.evidence.collect import encode
from lightleak.lab.dual import tiny_clip, tiny_siglip
from lightleak.lab.models import tiny_llava
from lightleak.records import Record
from lightleak.training import FineTuning, fine_tune, fine_tune_epochs, pair_loss

ADAPTER = "adapter_model.safetensors"
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


def same(one, other):
    first, then = (load_file(folder / ADAPTER) for folder in (one, other))
    return first.keys() == then.keys() and all(torch.equal(first[k], then[k]) for k in first)


def losses(target, records):
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
        fine_tune(loaded(base), given, replace(RECIPE, epochs=1), tmp_path / name, seed=seed)
    assert same(tmp_path / "one", tmp_path / "same")
    assert not same(tmp_path / "one", tmp_path / "other")


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
    assert same(tmp_path / "whole", tmp_path / "broken")


def test_kept_epochs_are_those_of_the_whole_training(base, records, tmp_path):
    kept = {epoch: tmp_path / "kept" / f"epoch-{epoch}" for epoch in (1, 2, 3)}
    fine_tune_epochs(loaded(base), records, RECIPE, kept, seed=0)
    told = [json.loads((folder / "trained.json").read_text()) for folder in kept.values()]
    assert [each["epoch"] for each in told] == [1, 2, 3]
    assert told[0]["loss"] > told[1]["loss"] > told[2]["loss"]
    fine_tune(loaded(base), records, RECIPE, tmp_path / "whole", seed=0)
    assert same(kept[3], tmp_path / "whole")
    # Training stops behind the last that is kept, and the learning rate falls as if it did not.
    early, seen = {2: tmp_path / "early"}, []
    fine_tune_epochs(loaded(base), records, RECIPE, early, seed=0, progress=seen.append)
    assert sum(seen) == 2 * len(records)
    assert same(kept[2], early[2])
    # An epoch that somebody removed is made again, and no other is touched.
    before = (kept[3] / ADAPTER).stat().st_mtime_ns
    kept[1].rename(tmp_path / "first")
    fine_tune_epochs(loaded(base), records, RECIPE, kept, seed=0)
    assert same(kept[1], tmp_path / "first")
    assert (kept[3] / ADAPTER).stat().st_mtime_ns == before
    assert sorted(each.name for each in (tmp_path / "kept").iterdir()) == [
        *("epoch-1", "epoch-2", "epoch-3")
    ]


@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip])
def test_an_adapter_on_a_dual_encoder_learns_the_pairs(records, tmp_path, make):
    make(tmp_path / "base", ["red green blue"] * 3, seed=0)
    told = [replace(each, text=str(i)) for i, each in enumerate(records)]
    recipe = replace(RECIPE, epochs=10, batch_size=6, vision=True, learning_rate=1e-2)
    fine_tune(loaded(tmp_path / "base"), told, recipe, tmp_path / "tuned", seed=0)
    found = []
    for target in (
        loaded(tmp_path / "base"),
        loaded(tmp_path / "base", adapter=tmp_path / "tuned"),
    ):
        with torch.no_grad():
            found.append(pair_loss(target, target.collate(encode(target, told).records).inputs))
    assert found[1] < 0.8 * found[0]


def test_a_training_that_does_not_converge_is_told(base, records, tmp_path):
    recipe = replace(RECIPE, method="full", learning_rate=1e30)
    with pytest.raises(UserError, match="not finite"):
        fine_tune(loaded(base), records, recipe, tmp_path / "tuned", seed=0)
    assert not (tmp_path / "tuned").exists()


def test_a_record_that_the_model_cannot_read_is_named(base, records, tmp_path):
    bad = [*records, replace(records[0], id="long", text="red " * 600)]
    with pytest.raises(UserError, match="long"):
        fine_tune(loaded(base), bad, RECIPE, tmp_path / "tuned", seed=0)
