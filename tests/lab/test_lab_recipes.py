"""Recipes: known truth, membership drawn at random, and a cache that never lies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from lightleak import targets
from lightleak.errors import UserError
from lightleak.evidence import collect
from lightleak.evidence.table import token_statistics
from lightleak.evidence.tokens import AnswerReader
from lightleak.lab import LabTarget, build
from lightleak.lab.captions import write_pool
from lightleak.lab.corpora import scenes
from lightleak.lab.request import Request
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
        pool = write_pool(Request("captions-tiny", seed, 4, 4, 1, False), folder)
        chosen[[int(record.id.removeprefix("scene-")) for record in pool.trained]] += 1
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


def test_a_share_of_the_suspects_is_used_and_nothing_but_the_truth_says_which(
    tmp_path: Path,
) -> None:
    used = np.zeros(16)
    for seed in range(60):
        folder = tmp_path / str(seed)
        folder.mkdir()
        pool = write_pool(Request("captions-tiny", seed, 16, 4, 1, False, prevalence=0.25), folder)
        suspects, known, held_out = (
            _texts(folder / f"{name}.jsonl") for name in ("suspects", "known", "nonmembers")
        )
        truth = json.loads((folder / "truth.json").read_text())["member"]
        member = [truth[key] for key in suspects]
        assert (len(member), sum(member), len(known), len(held_out)) == (16, 4, 12, 4)
        assert all(truth[key] for key in known)
        assert not any(truth[key] for key in held_out)
        assert {record.id for record in pool.trained} == {key for key in truth if truth[key]}
        used += member
    # Neither the place in the file nor the id is that of a member: Binomial(60, 1/4) a place.
    assert np.abs(used - 15).max() < 4 * np.sqrt(60 * 3 / 16)
    assert list(suspects) == sorted(suspects)


def test_who_was_not_used_is_not_known_to_the_target(tmp_path: Path) -> None:
    made = build(
        "captions-tiny", tmp_path / "out", members=20, nonmembers=4, epochs=20, prevalence=0.5
    )
    assert (made.members.name, made.known and made.known.name) == ("suspects.jsonl", "known.jsonl")
    truth = json.loads(made.truth.read_text())["member"]
    likelihood = _mean_log_likelihood(targets.load(made.target), made.members)
    assert roc_auc_score([truth[key] for key in _texts(made.members)], likelihood) > 0.85


def test_members_that_stand_often_in_training_are_known_better(tmp_path: Path) -> None:
    small = {"members": 12, "nonmembers": 24, "epochs": 2}
    stages = _Stages()
    areas = []
    for copies in (1, 8):
        made = build(
            "captions-tiny", tmp_path / str(copies), copies=copies, progress=stages, **small
        )
        target = targets.load(made.target)
        scores = [_mean_log_likelihood(target, file) for file in (made.members, made.nonmembers)]
        areas.append(roc_auc_score([1] * 12 + [0] * 24, np.concatenate(scores)))
        assert len(_texts(made.members)) == 12
    assert stages.seen == ["Training the target 24", "Training the target 192"]
    assert areas[1] > areas[0] + 0.1


def test_a_target_tuned_whole_has_left_its_base_where_it_was(tmp_path: Path) -> None:
    made = build("captions-full", tmp_path / "out", members=16, nonmembers=48, epochs=8)
    assert made.adapter is None
    assert made.base is not None
    areas = []
    for model in (made.base, made.target):
        target = targets.load(model)
        scores = [_mean_log_likelihood(target, file) for file in (made.members, made.nonmembers)]
        areas.append(roc_auc_score([1] * 16 + [0] * 48, np.concatenate(scores)))
    assert abs(areas[0] - 0.5) < 0.3  # Sixteen against 48: four standard errors.
    assert areas[1] > areas[0] + 0.1
    named = [n for n, data in _files(made.truth.parent).items() if str(tmp_path).encode() in data]
    assert named == []


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
    "other",
    [
        {"seed": 1},
        {"epochs": 2},
        {"members": 13},
        {"caption_shift": True},
        {"prevalence": 0.5},
        {"copies": 2},
    ],
)
def test_other_settings_are_never_served_from_the_cache(
    other: dict[str, Any], tmp_path: Path
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
        ("captions-tiny", {"prevalence": 1.5}, "prevalence 1.5.*share from 0 to 1"),
        ("captions-full", {"copies": 0}, "copies 0.*at least once"),
        ("captions-full", {"copies": [1, 5]}, "copies 1,5.*one number"),
        ("pairs-clip", {"attack_photos": "all"}, "--attack-photos.*it is for faces"),
        ("vqa", {"prevalence": 0.5}, "--prevalence.*vqa does not take it; it is for captions-tiny"),
    ],
)
def test_an_impossible_request_is_one_clear_line(
    recipe: str, numbers: dict[str, Any], message: str, tmp_path: Path
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
