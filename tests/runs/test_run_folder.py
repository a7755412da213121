"""A run folder keeps what was done, refuses what does not belong, and survives damage."""

import json
import subprocess
import sys

import pyarrow as pa
import pytest

from lightleak.errors import UserError
from lightleak.runs import EvidenceStore, Run, read_json, read_table, write_json


def store(tmp_path, **decides):
    folder = tmp_path / "evidence"
    folder.mkdir(exist_ok=True)
    return EvidenceStore.claim(folder, decides)


def part(*values):
    return pa.table({"id": list(values)})


def test_a_part_is_found_again(tmp_path):
    store(tmp_path, weights="a").put("part", 0, part("x"))
    again = store(tmp_path, weights="a")
    assert again.has("part", 0)
    assert not again.has("part", 1)
    assert read_table(again.file("part", 0))["id"].to_pylist() == ["x"]


def test_evidence_of_something_else_is_refused_and_the_difference_named(tmp_path):
    store(tmp_path, weights="a", template="t")
    with pytest.raises(UserError, match="another weights"):
        store(tmp_path, weights="b", template="t")


@pytest.mark.parametrize("damage", ["torn", "one bit turned"])
def test_a_damaged_part_is_told_of_and_makes_room_for_a_new_one(tmp_path, damage):
    evidence = store(tmp_path)
    evidence.put("part", 0, part(*map(str, range(1000))))
    file = evidence.file("part", 0)
    content = bytearray(file.read_bytes())
    if damage == "torn":
        content = content[:-20]
    else:
        content[200] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"part-00000.parquet: it is missing or damaged"):
        read_table(file)
    assert not evidence.has("part", 0)
    assert not file.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_a_full_disk_is_one_line_and_what_was_written_stays(tmp_path):
    program = (
        "import resource, sys, pyarrow as pa, signal\n"
        "from lightleak.runs import EvidenceStore\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "store = EvidenceStore.claim(Path(sys.argv[1]), {})\n"
        "store.put('part', 0, pa.table({'id': [1]}))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "store.put('part', 1, pa.table({'id': list(range(100_000))}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], stderr=subprocess.PIPE)
    assert b"part-00001.parquet: it cannot be written" in done.stderr.splitlines()[-1]
    assert EvidenceStore(tmp_path).has("part", 0)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["fingerprint.json", "part-00000.parquet"]


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
