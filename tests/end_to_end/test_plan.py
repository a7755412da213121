"""What an audit will take and could find, told beforehand and held against the audit itself."""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

import lightleak
from lightleak import statistics as st
from lightleak.cli import main

SIDE = 40


@pytest.fixture(scope="module")
def records(lab_lora):
    """Forty records a side, beside their images."""
    files = {}
    for side, source in (("suspect", lab_lora.members), ("control", lab_lora.nonmembers)):
        files[side] = source.with_name(f"plan-test-{side}.jsonl")
        files[side].write_text("".join(source.read_text().splitlines(True)[:SIDE]))
    return files


@pytest.fixture(scope="module")
def asked(lab_lora, records):
    """An adapter's audit with everything in it: gradients, shuffled texts, the base."""
    return {
        "target": lab_lora.base,
        "adapter": lab_lora.adapter,
        "signals": ("loss", "gradaudit"),
        "design": "randomised",
        **records,
    }


@pytest.fixture(scope="module")
def forecast(asked):
    return lightleak.plan(**asked)


@pytest.fixture(scope="module")
def audited(asked, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "planned"
    return lightleak.audit(**asked, out=run), run / "evidence"


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Run `lightleak plan` in a folder of its own; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lightleak", "plan", *map(str, arguments)])
        try:
            main.run()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        return code, *capfd.readouterr()

    return run


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_the_steps_told_are_those_that_the_audit_leaves(forecast, audited):
    _, evidence = audited
    measured = {each.of: each for each in forecast.steps if each.what == "measuring"}
    folders = {
        "target": evidence,
        "texts shuffled": evidence / "shuffled",
        "the base": evidence / "base",
        "the base, texts shuffled": evidence / "base-shuffled",
    }
    assert list(measured) == list(folders)
    for name, folder in folders.items():
        assert measured[name].shards == len(list(folder.glob("part-*.parquet"))), name
    assert [each.of for each in forecast.steps if each.what == "reference gradients"] == ["target"]
    assert {folder.name for folder in evidence.iterdir() if folder.is_dir()} == {
        folder.name for folder in folders.values() if folder != evidence
    }


def test_the_disk_told_is_what_the_audit_takes(forecast, audited):
    assert forecast.evidence_bytes == pytest.approx(size(audited[1]), rel=0.25)
    assert forecast.scratch_bytes > 0


def test_the_power_told_is_that_of_the_verdict(forecast, audited):
    verdict, _ = audited
    power = verdict.validity.power
    assert forecast.power.min_detectable_auc == power.min_detectable_auc
    assert forecast.power.suspect_groups == power.suspect_groups
    assert forecast.prospects[0].tier == verdict.tier
    needed = forecast.power.needed
    assert st.minimum_detectable_auc(needed["0.60"], needed["0.60"], 0.01) <= 0.60


def test_a_signal_that_is_fitted_needs_more_and_is_not_shuffled(asked, audited):
    # Every slice dropped on the way: the records go through once more.
    chosen = {**asked, "primary": "gradaudit", "negative_controls": False, "evidence_limit": 0}
    told = lightleak.plan(**chosen)
    assert [each.what for each in told.steps] == [
        "reference gradients",
        "measuring",
        "scoring kept slices",
    ]
    assert told.steps[2].records == 2 * SIDE
    assert told.power.min_detectable_auc > audited[0].validity.power.min_detectable_auc


def test_gradients_held_against_each_other_grow_as_the_square_of_the_records(asked, tmp_path):
    chosen = {**asked, "signals": ("signature",), "negative_controls": False}
    forecast, run = lightleak.plan(**chosen), tmp_path / "run"
    lightleak.audit(**chosen, out=run)
    made = [step for step in forecast.steps if step.what == "each record against each"]
    written = list((run / "evidence" / "shares").glob("*-target.safetensors"))
    assert len(made) == len(written) == 3
    for step, file in zip(made, written, strict=True):
        assert step.records == 2 * SIDE
        assert step.evidence_bytes == pytest.approx(file.stat().st_size, rel=0.1)
    assert forecast.evidence_bytes == pytest.approx(size(run / "evidence"), rel=0.25)


def test_the_time_told_grows_with_the_records_and_falls_with_the_processes(forecast):
    for step in forecast.steps:
        work = step.seconds(1) - step.opening_seconds
        assert work > 0
        assert step.opening_seconds >= 0
        twice = replace(step, records=2 * step.records, shards=2 * step.shards)
        assert twice.seconds(1) - step.opening_seconds == pytest.approx(2 * work)
        assert twice.seconds(2) == pytest.approx(step.seconds(1))
    assert forecast.seconds > sum(step.seconds(1) for step in forecast.steps)


def test_records_too_few_for_any_answer_are_told_first_and_nothing_is_left(
    lab_lora, subset, command, tmp_path
):
    suspect = subset(lab_lora.members, "suspect", 0, 12)
    control = subset(lab_lora.nonmembers, "control", 0, 12)
    file = tmp_path / "audit.toml"
    file.write_text('signals = "loss"\nout = "run"\nnegative-controls = false\n')
    before = set(Path(tempfile.gettempdir()).glob("lightleak-plan-*"))
    code, told, _ = command(
        *("--target", lab_lora.base, "--suspect", suspect, "--control", control),
        *("--config", file, "--json", tmp_path / "forecast.json"),
    )
    assert code == 0
    assert told.startswith("These records can give no answer")
    assert "Only 12 suspect records" in told
    stored = json.loads((tmp_path / "forecast.json").read_text())
    assert [step["of"] for step in stored["steps"]] == ["target"]
    assert stored["prospects"][0]["if_found"] == "inconclusive"
    assert not (tmp_path / "run").exists()
    assert set(Path(tempfile.gettempdir()).glob("lightleak-plan-*")) == before


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--signals", "los"), "Did you mean loss?"),
        (("--base", "same"), "the target itself"),
        (("--batch-size", "many"), "--batch-size many"),
        (("--protocol", "split"), "--calibration-members"),
    ],
)
def test_a_mistake_is_one_line(lab_lora, command, wrong, said):
    wrong = [lab_lora.base if word == "same" else word for word in wrong]
    code, _, errors = command(
        *("--target", lab_lora.base, "--suspect", lab_lora.members),
        *("--control", lab_lora.nonmembers, *wrong),
    )
    assert code == 2
    assert len(errors.splitlines()) == 1, errors
    assert said in errors
