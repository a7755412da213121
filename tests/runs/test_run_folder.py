"""A run folder keeps what was done, refuses what does not belong, and survives damage."""

import json

import pyarrow as pa
import pytest

from lightleak.errors import UserError
from lightleak.runs import EvidenceStore, Run, read_json, write_json


def store(tmp_path, **decides):
    folder = tmp_path / "evidence"
    folder.mkdir(exist_ok=True)
    return EvidenceStore.claim(folder, decides)


def part(value):
    return lambda: pa.table({"id": [value]})


def never():
    raise AssertionError("a part that is there was made again")


def test_a_part_is_made_once(tmp_path):
    store(tmp_path, weights="a").part("part", 0, part("x"))
    assert store(tmp_path, weights="a").part("part", 0, never)["id"].to_pylist() == ["x"]


def test_evidence_of_something_else_is_refused_and_the_difference_named(tmp_path):
    store(tmp_path, weights="a", template="t")
    with pytest.raises(UserError, match="another weights"):
        store(tmp_path, weights="b", template="t")


def test_a_torn_part_is_made_again(tmp_path):
    evidence = store(tmp_path)
    evidence.part("part", 0, part("x"))
    (file,) = evidence.folder.glob("part-*.parquet")
    file.write_bytes(file.read_bytes()[:20])
    assert evidence.part("part", 0, part("again"))["id"].to_pylist() == ["again"]


def test_a_kill_while_writing_leaves_the_old_file_whole(tmp_path, monkeypatch):
    file = tmp_path / "f.json"
    write_json(file, {"a": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(file, {"a": 2})
    monkeypatch.undo()
    assert read_json(file) == {"a": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["f.json"]


def test_numbers_that_are_not_finite_never_reach_a_file(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "f.json", {"auc": float("nan")})


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.doc").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.doc"):
        Run.create(tmp_path)


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Run.create(tmp_path / "run")


def test_opening_no_run_says_so(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        Run.open(tmp_path)


def test_damaged_json_names_the_file(tmp_path):
    file = tmp_path / "f.json"
    file.write_text(json.dumps({"a": 1})[:4])
    with pytest.raises(UserError, match=r"f\.json"):
        read_json(file)
