"""Recipes: known truth, membership drawn at random, and a cache that never lies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from lightleak import targets
from lightleak.errors import UserError
from lightleak.evidence import collect
from lightleak.evidence.table import token_statistics
from lightleak.evidence.tokens import AnswerReader
from lightleak.lab import LabTarget, build, recipes
from lightleak.lab.corpora import scenes
from lightleak.records import load
from lightleak.runs import Advance

_SMALL = {"members": 12, "nonmembers": 24, "epochs": 1}


class _Stages:
    """Keeps the names of the stages; stops the first one that begins when told to."""

    def __init__(self, stop: bool = False) -> None:
        self.seen: list[str] = []
        self.stop = stop

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        self.seen.append(f"{name} {total}")
        if self.stop:
            raise KeyboardInterrupt
        yield lambda _: None


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTLEAK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _texts(file: Path) -> dict[str, str]:
    return {record.id: record.text for record in load(file, strict=True).records}


def _files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def _mean_log_likelihood(target: targets.GenerativeTarget, file: Path) -> np.ndarray:
    measured = collect.measure(target, None, AnswerReader(), load(file, strict=True).records)
    return np.asarray(token_statistics(measured.table).logprob.mean())


def test_the_truth_names_every_record_and_both_sides_come_from_one_pool(tmp_path: Path) -> None:
    made = build("captions-tiny", tmp_path / "out", seed=3, **_SMALL)
    members, nonmembers = _texts(made.members), _texts(made.nonmembers)
    truth = json.loads(made.truth.read_text())
    assert truth["member"] == {key: key in members for key in (members | nonmembers)}
    assert (len(members), len(nonmembers)) == (12, 24)
    pool = {f"scene-{i:05d}": scene.caption() for i, scene in enumerate(scenes(36, seed=3))}
    assert members | nonmembers == pool
    assert not set(members.values()) & set(nonmembers.values())
    assert (truth["settings"]["recipe"], truth["settings"]["seed"]) == ("captions-tiny", 3)


def test_membership_is_as_likely_for_every_place_in_the_pool(tmp_path: Path) -> None:
    chosen = np.zeros(8)
    for seed in range(100):
        folder = tmp_path / str(seed)
        folder.mkdir()
        members, _ = recipes._write_pool(
            recipes._Request("captions-tiny", seed, 4, 4, 1, False), folder
        )
        chosen[[int(record.id.removeprefix("scene-")) for record in members]] += 1
    # Binomial(100, 1/2): four standard deviations are 20.
    assert np.abs(chosen - 50).max() < 20


def test_a_planted_shift_rewords_the_nonmembers_and_changes_nothing_else(tmp_path: Path) -> None:
    plain = build("captions-tiny", tmp_path / "plain", **_SMALL)
    shifted = build("captions-tiny", tmp_path / "shifted", caption_shift=True, **_SMALL)
    assert _texts(plain.members) == _texts(shifted.members)
    before, after = _texts(plain.nonmembers), _texts(shifted.nonmembers)
    assert before.keys() == after.keys()
    assert all(before[key] != after[key] for key in before)
    images = [
        {name: data for name, data in _files(made.truth.parent).items() if name.startswith("img")}
        for made in (plain, shifted)
    ]
    assert images[0] == images[1]


def test_the_same_request_is_trained_once_and_again_only_without_the_cache(
    tmp_path: Path, cache: Path
) -> None:
    first, again, anew = _Stages(), _Stages(), _Stages()
    build("captions-tiny", tmp_path / "a", progress=first, **_SMALL)
    build("captions-tiny", tmp_path / "b", progress=again, **_SMALL)
    cache.rename(tmp_path / "elsewhere")
    build("captions-tiny", tmp_path / "c", progress=anew, **_SMALL)
    assert first.seen == anew.seen == ["Training the target 12"]
    assert again.seen == []
    assert _files(tmp_path / "a") == _files(tmp_path / "b") == _files(tmp_path / "c")


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"epochs": 2}, {"members": 13}, {"caption_shift": True}]
)
def test_other_settings_are_never_served_from_the_cache(
    other: dict[str, int], tmp_path: Path
) -> None:
    build("captions-tiny", tmp_path / "a", **_SMALL)
    stages = _Stages()
    made = build("captions-tiny", tmp_path / "b", progress=stages, **{**_SMALL, **other})
    assert stages.seen
    settings = json.loads(made.truth.read_text())["settings"]
    assert {key: settings[key] for key in other} == other


def test_a_build_that_is_stopped_leaves_nothing_that_looks_finished(
    tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        build("captions-tiny", tmp_path / "out", progress=_Stages(stop=True), **_SMALL)
    assert list(cache.iterdir()) == []
    assert not (tmp_path / "out").exists()


def test_a_trained_target_knows_its_members(tmp_path: Path) -> None:
    made = build("captions-tiny", tmp_path / "out", members=16, nonmembers=48, epochs=20)
    target = targets.load(made.target)
    scores = [_mean_log_likelihood(target, file) for file in (made.members, made.nonmembers)]
    assert roc_auc_score([1] * 16 + [0] * 48, np.concatenate(scores)) > 0.85


@pytest.fixture
def tuned(tmp_path: Path) -> LabTarget:
    return build("captions-lora", tmp_path / "out", members=16, nonmembers=16, epochs=4)


def test_an_adapter_changes_its_base_and_switched_off_gives_it_back(tuned: LabTarget) -> None:
    assert tuned.adapter is not None
    assert tuned.base is not None
    base = _mean_log_likelihood(targets.load(tuned.base), tuned.members)
    both = targets.load(tuned.target, adapter=tuned.adapter)
    assert np.abs(_mean_log_likelihood(both, tuned.members) - base).min() > 1e-3
    with both.model.disable_adapter():
        np.testing.assert_allclose(_mean_log_likelihood(both, tuned.members), base, atol=1e-5)


def test_nothing_that_a_recipe_writes_names_the_folder_it_was_built_in(
    tuned: LabTarget, tmp_path: Path
) -> None:
    named = [n for n, data in _files(tuned.truth.parent).items() if str(tmp_path).encode() in data]
    assert named == []


@pytest.mark.parametrize(
    ("recipe", "numbers", "message"),
    [
        ("caption-tiny", {}, "unknown recipe.*captions-tiny"),
        ("captions-tiny", {"members": 0}, "at least one member"),
        ("captions-tiny", {"epochs": 0}, "epoch"),
    ],
)
def test_an_impossible_request_is_one_clear_line(
    recipe: str, numbers: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        build(recipe, tmp_path / "out", **numbers)
    assert "\n" not in str(error.value)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    build("captions-tiny", tmp_path / "lab", **_SMALL)
    with pytest.raises(UserError, match="other settings"):
        build("captions-tiny", tmp_path / "lab", seed=1, **_SMALL)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        build("captions-tiny", tmp_path / "thesis", **_SMALL)
    assert list((tmp_path / "thesis").iterdir()) == [tmp_path / "thesis" / "chapter.tex"]
