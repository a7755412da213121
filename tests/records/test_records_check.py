"""Undecodable images are known before anything expensive begins."""

import json

import pytest
from PIL import Image

from lightleak.errors import UserError
from lightleak.records import load, readable


@pytest.fixture
def file(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:500])
    names = {"a": "good.png", "b": "cut.png", "c": "gone.png"}
    lines = [json.dumps({"id": id, "image": name, "text": "x"}) for id, name in names.items()]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    return tmp_path / "r.jsonl"


def test_an_undecodable_image_moves_to_the_failures(file):
    checked = readable(load(file))
    assert [record.id for record in checked.records] == ["a"]
    assert [(failure.id, failure.stage) for failure in checked.failures] == [
        ("c", "load"),
        ("b", "image"),
    ]
    error = checked.failures[1].error
    assert "record 'b'" in error
    assert "cut.png" in error
    assert len(error.splitlines()) == 1


def test_the_digest_is_that_of_the_readable_records(file):
    checked = readable(load(file))
    only_good = file.with_name("good.jsonl")
    only_good.write_text(file.read_text().splitlines()[0])
    assert checked.sha256 == load(only_good).sha256 != load(file).sha256


def test_strict_raises_the_first_fault(file):
    with pytest.raises(UserError, match="record 'b'"):
        readable(load(file), strict=True)
