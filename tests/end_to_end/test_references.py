"""`lightleak references train`: who was trained on what is known, and stays known."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lightleak import targets, train_references
from lightleak.audits.reference_models import read_references
from lightleak.audits.reference_training import draw_halves
from lightleak.cli import main
from lightleak.errors import UserError
from lightleak.lab.dual import tiny_clip
from lightleak.lab.models import tiny_llava
from lightleak.records import content_key, load
from lightleak.runs import Silent
from lightleak.runs.folder import alone

ADAPTER = "adapter_model.safetensors"
EPOCHS, COUNT, SIDE = 2, 2, 14
RECIPE = {"epochs": EPOCHS, "keep": (1, 2), "train_batch": 4, "learning_rate": 2e-3, "rank": 4}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A base, suspects and controls: some of a group, one that stands on both sides."""
    folder = tmp_path_factory.mktemp("given")
    tiny_llava(folder / "base", ["Which one? red green blue"] * 3, seed=3)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2 * SIDE, 32, 32, 3), dtype=np.uint8)
    pixels[SIDE] = pixels[0]
    for side, start in (("suspect", 0), ("control", SIDE)):
        rows = []
        for i in range(SIDE):
            image = f"{side}-{i}.png"
            Image.fromarray(pixels[start + i]).save(folder / image)
            text = ("red", "green", "blue")[int(rng.integers(3))]
            row = {"id": str(i), "image": image, "text": text, "prompt": "Which one?"}
            if i in (3, 4, 5):
                row["group"] = "one page"
            rows.append(row)
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sides = {side: folder / f"{side}.jsonl" for side in ("suspect", "control")}
    return {"base": folder / "base", **sides}


@pytest.fixture(scope="module")
def trained(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("references") / "refs"
    train_references(**given, **RECIPE, count=COUNT, out=out)
    return out


def keys(given):
    """Content key → id, and id → group."""
    found = {}
    for side in ("suspect", "control"):
        for record in load(given[side], id_prefix=f"{side}/").records:
            found[record.id] = content_key(record), record.group
    return found


def weights(out):
    return {file.relative_to(out): load_file(file) for file in sorted(out.glob(f"*/*/{ADAPTER}"))}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[file][name], other[file][name]) for file in one for name in one[file]
    )


def program(monkeypatch, capfd, *arguments):
    """Run `lightleak references train` in this process: exit code, output, errors."""
    line = ["lightleak", "references", "train", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", line)
    try:
        main.run()
        code = 0
    except SystemExit as exit_:
        code = exit_.code or 0
    return code, *capfd.readouterr()


def options(given, **more):
    return [
        part
        for name, value in {**given, **more}.items()
        for part in (f"--{name.replace('_', '-')}", value)
    ]


# -- who is in which --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_halves_share_the_records_and_split_no_unit(seed):
    rng = np.random.default_rng(seed)
    units, suspect = rng.integers(0, 60, 100), rng.random(100) < 0.4
    halves = draw_halves(units, suspect, 6, seed)
    assert (halves.sum(1) == 3).all()
    assert (halves[:, ::2] == ~halves[:, 1::2]).all()
    assert all(len(np.unique(halves[units == unit], axis=0)) == 1 for unit in np.unique(units))
    assert not (halves[:, 0] == halves[:, 2]).all()
    largest = np.bincount(units).max()
    for side in (suspect, ~suspect):
        assert (abs(2 * halves[side].sum(0) - side.sum()) <= 2 * largest).all()
    # Five are the first five of six.
    assert (draw_halves(units, suspect, 5, seed) == halves[:, :5]).all()


def test_every_unit_is_in_as_often_as_out():
    units, suspect = np.arange(9), np.arange(9) < 4
    drawn = np.concatenate([draw_halves(units, suspect, 1, seed) for seed in range(400)], axis=1)
    assert abs(drawn.mean(1) - 0.5).max() < 0.1
    together = np.corrcoef(drawn)[~np.eye(9, dtype=bool)]
    assert abs(together).max() < 0.45  # One of three or more others is matched, by lot.


def test_what_is_written_down_is_what_was_trained_on(given, trained):
    known, found = keys(given), read_references(trained)
    assert [each.epoch for each in found] == [EPOCHS] * COUNT
    for each in found:
        said = json.loads((trained / each.name / "trained.json").read_text())["records"]
        assert {known[name][0] for name in said} == each.members
        # Nobody who shares a key with a member is left out.
        assert {name for name, (key, _) in known.items() if key in each.members} == set(said)
        assert len(said) == pytest.approx(SIDE, abs=6)
    for one, other in zip(found[::2], found[1::2], strict=True):
        assert not one.members & other.members
        assert one.members | other.members == {key for key, _ in known.values()}
        for side in (one, other):
            page = {key in side.members for key, group in known.values() if group == "one page"}
            assert len(page) == 1
            copies = {known[name][0] in side.members for name in ("suspect/0", "control/0")}
            assert len(copies) == 1


def test_a_record_is_known_by_its_content_wherever_it_stands(given, trained, tmp_path):
    source = given["suspect"].with_name("suspect-2.png")
    with Image.open(source) as image:
        image.save(tmp_path / "again.bmp")
    row = json.loads(given["suspect"].read_text().splitlines()[2])
    (tmp_path / "other.jsonl").write_text(
        json.dumps({**row, "id": "other", "group": "any", "image": "again.bmp"})
        + "\n"
        + json.dumps({**row, "id": "reworded", "text": "yellow", "image": "again.bmp"})
    )
    again, reworded = load(tmp_path / "other.jsonl").records
    inside = [content_key(again) in each.members for each in read_references(trained)]
    assert sum(inside) == COUNT // 2
    assert not any(content_key(reworded) in each.members for each in read_references(trained))


def test_references_differ_and_each_epoch_can_be_loaded(given, trained):
    adapters = weights(trained)
    assert len(adapters) == COUNT * EPOCHS
    first, *others = adapters
    assert not any(
        all(torch.equal(adapters[first][name], adapters[other][name]) for name in adapters[first])
        for other in others
    )
    for epoch in (1, 2):
        one = read_references(trained, epoch)[0]
        assert one.adapter
        assert Path(one.base) == given["base"]
        target = targets.load(one.base, adapter=one.folder, device="cpu")
        assert target.has_adapter


# -- stopping and going on --------------------------------------------------------------------


def test_a_killed_training_goes_on_to_the_same_weights(given, trained, tmp_path):
    out = tmp_path / "refs"
    script = Path(sys.executable).with_name("lightleak")
    asked = options(given, **{**RECIPE, "keep": "1,2"}, count=COUNT, out=out, workers=1)
    process = subprocess.Popen(
        [script, "references", "train", *map(str, asked)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for _ in range(2400):
        if (out / "reference-01" / "epoch-01").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    begun = json.loads((out / "references.json").read_text())
    assert [each["finished"] for each in begun["references"]] == [True, False]
    file = out / "reference-00" / "epoch-02" / ADAPTER
    seen = file.stat().st_mtime_ns
    heard = []
    assert len(read_references(out, progress=_Noting(heard))) == 1
    assert "1 of 2 references are not finished" in heard[0]
    train_references(**given, **RECIPE, count=COUNT, out=out)
    assert file.stat().st_mtime_ns == seen, "what was finished was trained again"
    assert same(weights(out), weights(trained))
    assert json.loads((out / "references.json").read_text()) == json.loads(
        (trained / "references.json").read_text()
    )


class _Noting(Silent):
    def __init__(self, heard):
        self._heard = heard

    def note(self, text):
        self._heard.append(text)


def test_more_references_are_added_to_those_that_are_there(given, trained, tmp_path):
    out = tmp_path / "refs"
    shutil.copytree(trained, out)
    before = {file: file.stat().st_mtime_ns for file in out.glob("*/*/*.safetensors")}
    found = train_references(**given, **RECIPE, count=3, out=out)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    first = [each.members for each in read_references(trained)]
    assert [each.members for each in found[:COUNT]] == first
    assert found[2].members not in first
    with pytest.raises(UserError, match="may only grow"):
        train_references(**given, **RECIPE, count=COUNT, out=out)


def test_the_order_of_the_files_changes_nothing(given, trained):
    before = (trained / "references.json").read_bytes()
    rows = given["suspect"].read_text()
    given["suspect"].write_text("".join(reversed(rows.splitlines(True))))
    try:
        train_references(**given, **RECIPE, count=COUNT, out=trained)
    finally:
        given["suspect"].write_text(rows)
    assert (trained / "references.json").read_bytes() == before


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"learning_rate": 1e-3}, "another learning rate"),
        ({"keep": (2,)}, "another kept epochs"),
        ({"control": "suspect"}, "another records"),
    ],
)
def test_another_recipe_or_other_records_are_refused(given, trained, other, said):
    before = (trained / "references.json").read_bytes()
    asked = {**given, **RECIPE, **other}
    asked["control"] = given.get(other.get("control", "control"))
    with pytest.raises(UserError, match=said):
        train_references(**asked, count=COUNT, out=trained)
    assert (trained / "references.json").read_bytes() == before


# -- what it takes ----------------------------------------------------------------------------


def test_what_it_takes_is_told_first_and_a_dry_run_leaves_nothing(
    given, trained, tmp_path, monkeypatch, capfd
):
    more = {**RECIPE, "keep": "1,2", "count": COUNT, "workers": 1}
    asked = options(given, **more, out=tmp_path / "refs")
    code, told, errors = program(monkeypatch, capfd, *asked, "--dry-run")
    assert code == 0, errors
    assert "To train: 2 references on about 14 records each, 2 epochs" in told
    assert "Time: " in told
    assert list(tmp_path.iterdir()) == []
    code, told, errors = program(monkeypatch, capfd, *options(given, **more, out=trained))
    assert code == 0, errors
    assert "To train" not in told, "there is nothing left to train"
    assert "2 references in" in told


def test_the_disk_told_is_what_the_references_take(given, trained):
    from lightleak.audits.reference_training import estimate_references

    told = estimate_references(**given, **RECIPE, count=COUNT)
    taken = sum(file.stat().st_size for file in trained.glob("*/*/*.safetensors"))
    assert told.kept_bytes == pytest.approx(taken, rel=0.1)
    assert 0 < told.seconds < 600


# -- other bases, other shapes, other records -------------------------------------------------


def test_a_dual_encoder_is_tuned_whole(given, tmp_path):
    tiny_clip(tmp_path / "clip", ["red green blue"] * 3, seed=0)
    out = tmp_path / "refs"
    found = train_references(
        **{**given, "base": tmp_path / "clip"},
        **{"count": 2, "epochs": 2, "method": "full", "learning_rate": 1e-3, "out": out},
    )
    assert [each.adapter for each in found] == [False, False]
    first, other = (targets.load(each.folder, device="cpu") for each in found)
    assert first.kind == "dual-encoder"
    assert not torch.equal(first.model.text_projection.weight, other.model.text_projection.weight)
    assert not list(out.glob("*/.epoch*")), "what a broken run would need stays behind"


def test_references_take_the_shape_of_the_targets_adapter(given, trained, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = targets.load(given["base"], device="cpu").model
    shape = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}
    get_peft_model(model, LoraConfig(**shape)).save_pretrained(tmp_path / "theirs")
    (one,) = train_references(
        **given, like=tmp_path / "theirs", count=1, train_batch=8, out=tmp_path / "refs"
    )
    own, theirs = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (one.folder, tmp_path / "theirs")
    )
    assert sorted(own["target_modules"]) == sorted(theirs["target_modules"])
    assert all(own[n] == theirs[n] for n in ("r", "lora_alpha", "use_rslora", "bias", "task_type"))
    shapes = [
        {name: tensor.shape for name, tensor in load_file(folder / ADAPTER).items()}
        for folder in (one.folder, tmp_path / "theirs")
    ]
    assert shapes[0] == shapes[1]


def test_on_other_peoples_records_no_suspect_is_a_member(given, tmp_path):
    other = {"base": given["base"], "train_on": given["control"]}
    found = train_references(**other, count=2, train_batch=8, out=tmp_path / "refs")
    suspects = {key for name, (key, _) in keys(given).items() if name.startswith("suspect/")}
    copy = keys(given)["control/0"][0]
    assert found[0].members | found[1].members >= {copy}
    assert not any(each.members & (suspects - {copy}) for each in found)


def test_a_record_that_the_base_cannot_take_is_left_out_by_name(given, tmp_path):
    rows = given["suspect"].read_text().splitlines(True)
    long = {**json.loads(rows[1]), "text": "red " * 600}
    file = given["suspect"].with_name("long.jsonl")
    file.write_text("".join([rows[0], json.dumps(long) + "\n", *rows[2:]]))
    heard = []
    found = train_references(
        **{**given, "suspect": file},
        **{"count": 2, "train_batch": 8, "out": tmp_path / "refs"},
        progress=_Noting(heard),
    )
    assert "1 record(s) cannot be used" in heard[0]
    assert "tokens long" in heard[0]
    (bad,) = (record for record in load(file).records if len(record.text) > 99)
    assert not any(content_key(bad) in each.members for each in found)


# -- what may go wrong ------------------------------------------------------------------------


def test_damaged_references_are_said_to_be(given, trained, tmp_path):
    with pytest.raises(UserError, match="no references here"):
        read_references(tmp_path)
    with pytest.raises(UserError, match="epoch 7 was not kept; there are 1, 2"):
        read_references(trained, 7)
    out = tmp_path / "refs"
    shutil.copytree(trained, out)
    file = out / "reference-01" / "epoch-02" / ADAPTER
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="not what was trained"):
        read_references(out)
    shutil.rmtree(file.parent)
    with pytest.raises(UserError, match="is missing"):
        read_references(out)
    train_references(**given, **RECIPE, count=COUNT, out=out)
    assert same(weights(out), weights(trained)), "only the lost epoch is made again"
    text = (out / "references.json").read_text()
    for damaged in ("[" * 100_000, text[:-9], text.replace('"version": 1', '"version": 9'), "{}"):
        (out / "references.json").write_text(damaged)
        with pytest.raises(UserError, match=r"damaged|cannot be read"):
            read_references(out)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"keep": (3,)}, "from 1 to 2"),
        ({"suspect": None}, "--train-on"),
        ({"train_on": "x.jsonl"}, "stands instead of"),
        ({"like": "x"}, "leave out"),
        ({"count": 0}, "--count"),
        ({"dtype": "bfloat16", "method": "full", "rank": None}, "half precision"),
    ],
)
def test_mistakes_are_said(given, tmp_path, wrong, said):
    with pytest.raises(UserError, match=said):
        train_references(**{**given, **RECIPE, **wrong}, out=tmp_path / "refs")


@pytest.mark.parametrize(
    ("name", "said"),
    [("verdict.json", "'verdict.json', which is no part"), ("reference-00", "and no references")],
)
def test_a_folder_of_something_else_is_left_alone(given, tmp_path, name, said):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=said):
        train_references(**given, **RECIPE, out=tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_two_processes_do_not_train_in_one_folder(given, trained):
    with alone(trained), pytest.raises(UserError, match="another process is at work"):
        train_references(**given, **RECIPE, count=COUNT, out=trained)
