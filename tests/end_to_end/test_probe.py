"""`lightleak probe` as a user meets it, on a small model that reads images of 224 pixels."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from jsonschema import validate

from lightleak import lab, probe
from lightleak.errors import UserError
from lightleak.validity.verdict import json_schema

COMMON = ["--personas", "8", "--images-per-persona", "2", "--fields", "username,gender"]
SMALL = [*COMMON, "--seeds", "1", "--rates", "0,1", "--batches", "4", "--sizes", "1,2"]
SMALL += ["--permutations", "99", "--epochs", "2", "--workers", "1", "--position", "fixed"]


@pytest.fixture(scope="module")
def made(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("vqa") / "lab"
    return lab.build("vqa", out, members=32, nonmembers=64, epochs=1)


def lightleak(*arguments, check=True):
    program = Path(sys.executable).with_name("lightleak")
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


def experiment(made, out, *more):
    return [
        "probe",
        "--target",
        made.target,
        "--data",
        made.nonmembers,
        "--out",
        out,
        *SMALL,
        *more,
    ]


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("probe") / "run"
    lightleak(*experiment(made, out))
    return out


def rows(run, name):
    return pq.read_table(run / f"{name}.parquet").to_pylist()


def test_the_experiment_leaves_every_file_of_the_contract(run):
    verdict = json.loads((run / "verdict.json").read_text())
    validate(verdict, json_schema("probing"))
    assert [each["name"] for each in verdict["conditions"]] == [
        *("rate 0", "rate 1", "planted", "random weights", "pixels")
    ]
    probes = rows(run, "probes")
    layers = {(row["tower"], row["layer"]) for row in probes if row["condition"] == "rate 1"}
    assert {tower for tower, _ in layers} == {"vision", "projector", "language"}
    assert {row["field"] for row in probes} == {"image", "username", "gender"}
    dynamics = {(row["batch_size"], row["comparison"]) for row in rows(run, "dynamics")}
    assert dynamics == {
        (size, comparison)
        for size in (1, 2)
        for comparison in ("original", "watermark", "image", "text", "other batch")
    }
    answers = {(row["condition"], row["pool"]) for row in rows(run, "output_view")}
    assert answers == {
        (name, pool)
        for name in ("base", "rate 0", "rate 1", "planted")
        for pool in ("seen", "unseen")
    }
    assert {row["condition"] for row in rows(run, "utility")} == {
        *("base", "rate 0", "rate 1", "planted")
    }
    assert "<script" not in (run / "report.html").read_text()


def test_training_without_a_watermark_is_the_same_as_without_lightleak(run):
    """Rate 0 and rate 1 differ in the pixels of the watermark and in nothing else."""
    rates = [
        run / "watermarked" / "seed-0" / rate / "records.jsonl" for rate in ("rate-0", "rate-1")
    ]
    clean, marked = ([json.loads(line) for line in file.read_text().splitlines()] for file in rates)
    assert clean == marked
    trained = [
        json.loads((run / "evidence" / "models" / "seed-0" / name / "trained.json").read_text())
        for name in ("rate-0", "rate-1")
    ]
    assert trained[0]["seed"] == trained[1]["seed"]


def again(made, out, **more):
    """The same experiment, in this process."""
    return probe(
        **{
            **{"target": made.target, "data": made.nonmembers, "out": out, "workers": 1},
            **{"personas": 8, "images_per_persona": 2, "fields": ("username", "gender")},
            **{"seeds": 1, "rates": (0, 1), "batches": 4, "sizes": (1, 2), "permutations": 99},
            **{"epochs": 2, "position": "fixed"},
            **more,
        }
    )


def test_the_same_call_does_nothing_twice_and_says_the_same(made, run):
    before = {file: file.stat().st_mtime_ns for file in (run / "evidence").rglob("*.parquet")}
    verdict = (run / "verdict.json").read_bytes()
    # Without the models nothing can be measured anew.
    models = run / "evidence" / "models"
    models.rename(models.with_name("away"))
    again(made, run)
    models.with_name("away").rename(models)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert (run / "verdict.json").read_bytes() == verdict


def test_other_settings_are_refused_in_a_run_that_was_begun(made, run):
    with pytest.raises(UserError, match="registered with another learning rate"):
        again(made, run, learning_rate=1e-3)


def test_what_is_refused_leaves_the_manifest_as_it_was(made, run):
    before = (run / "manifest.json").read_bytes()
    rows = made.nonmembers.read_text(encoding="utf-8")
    made.nonmembers.write_text(rows.replace("circle", "disc"), encoding="utf-8")
    try:
        with pytest.raises(UserError, match="made with another data records"):
            again(made, run)
    finally:
        made.nonmembers.write_text(rows, encoding="utf-8")
    assert (run / "manifest.json").read_bytes() == before


def test_a_killed_experiment_goes_on_to_the_same_result(made, run, tmp_path):
    program = Path(sys.executable).with_name("lightleak")
    out = tmp_path / "run"
    process = subprocess.Popen(
        [program, *map(str, experiment(made, out))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    # Killed once it has trained one model: two more are to come.
    models = out / "evidence" / "models" / "seed-0" / "rate-0" / "trained.json"
    for _ in range(1200):
        if models.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "verdict.json").exists()
    lightleak(*experiment(made, out))
    for name in ("probes", "output_view", "utility", "dynamics"):
        assert rows(out, name) == rows(run, name), name


def test_a_model_that_somebody_else_tuned_is_probed_with_its_own_sets(made, run, tmp_path):
    marked = tmp_path / "marked"
    said = lightleak(
        *("watermark", "--data", made.members, "--probing", made.nonmembers, "--out", marked),
        *("--rate", "1", "--personas", "8", "--images-per-persona", "2"),
    )
    assert "probe --target TUNED" in said.stdout
    verdict = probe(
        target=made.target,
        adapter=run / "evidence" / "models" / "seed-0" / "rate-1",
        seen=marked / "probing" / "seen",
        unseen=marked / "probing" / "unseen",
        out=tmp_path / "run",
        design="randomised",
        permutations=99,
        fields=("gender",),
    )
    assert [each.name for each in verdict.conditions] == ["target", "random weights", "pixels"]
    # The base below the adapter is what it is compared with.
    assert verdict.conditions[0].best.base_accuracy is not None
    assert verdict.tier != "observational"
    assert not verdict.utility
    assert not verdict.dynamics
    with pytest.raises(UserError, match="the base is the target itself"):
        probe(
            target=made.target,
            base=made.target,
            seen=marked / "probing" / "seen",
            unseen=marked / "probing" / "unseen",
            out=tmp_path / "same",
        )


def test_images_that_are_trained_on_do_not_serve_to_probe_with(made, tmp_path):
    done = lightleak(
        *("watermark", "--data", made.members, "--probing", made.members, "--out", tmp_path / "m"),
        *("--personas", "8"),
        check=False,
    )
    assert done.returncode == 2
    assert "are among those to be trained on" in done.stderr


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rates": (0,)}, "one at least above 0"),
        ({"rates": (2,)}, "shares from 0 to 1"),
        ({"fields": ("shoe_size",)}, "no field 'shoe_size'"),
        ({"seen": "x"}, "belong to a model fine-tuned already"),
        ({"data": None}, "give --data to fine-tune on, or --seen and --unseen"),
        ({"sizes": (4,)}, "two different"),
        ({"personas": 9}, "too few"),
        ({"personas": 7}, "greater than or equal to 8"),
        ({"adapter": "x"}, "merge"),
        ({"sizes": (1, 64)}, "no two batches of 64"),
        ({"rates": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)}, "cannot reach the level"),
    ],
)
def test_mistakes_are_said(made, tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        again(made, tmp_path / "run", **wrong)


def test_a_mistake_is_one_line(made, tmp_path):
    done = lightleak(*experiment(made, tmp_path / "run", "--rates", "a"), check=False)
    assert done.returncode == 2
    assert "numbers with commas between" in done.stderr
    assert "Traceback" not in done.stderr
