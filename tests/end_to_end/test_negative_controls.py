"""Comparisons in which nothing may be found: what they find, and what the verdict makes of it."""

import json
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lightleak
from lightleak.audits import judge_controls
from lightleak.audits.gather_controls import shuffled
from lightleak.audits.judge_controls import ControlScores
from lightleak.audits.set_tests import SetTests
from lightleak.audits.settings import AuditSettings
from lightleak.audits.sides import Sides
from lightleak.audits.stored import Measured, compared
from lightleak.cli import main
from lightleak.errors import UserError
from lightleak.lab.models import tiny_llava
from lightleak.records import Record, load

SIDE = 70


@pytest.fixture(scope="module")
def sets(lab_tiny, tmp_path_factory):
    """Members and as many that the target never saw, each beside their images."""
    files = {}
    for side, source in (("suspect", lab_tiny.members), ("control", lab_tiny.nonmembers)):
        files[side] = source.with_name(f"controls-test-{side}.jsonl")
        files[side].write_text("".join(source.read_text().splitlines(True)[:SIDE]))
    return files


@pytest.fixture(scope="module")
def audited(lab_tiny, sets, tmp_path_factory):
    """The verdict on members, with whatever else is given."""

    def run(name, **given):
        out = tmp_path_factory.getbasetemp() / f"controls-{name}"
        settings = {"signals": ("loss",), "design": "randomised", **sets, **given}
        return lightleak.audit(target=lab_tiny.target, out=out, **settings), out

    return run


@pytest.fixture(scope="module")
def nearly_the_target(lab_tiny, tmp_path_factory):
    """A model that was trained on the suspects as well: the target, stirred a little."""
    folder = tmp_path_factory.mktemp("models") / "stirred"
    shutil.copytree(lab_tiny.target, folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    save_file(
        {name: each + 1e-4 * torch.randn_like(each) for name, each in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


@pytest.fixture(scope="module")
def ignorant(lab_tiny, tmp_path_factory):
    """A model that was trained on nothing."""
    folder = tmp_path_factory.mktemp("models") / "ignorant"
    tiny_llava(folder, [record.text for record in load(lab_tiny.nonmembers).records], seed=5)
    return folder


@pytest.fixture(scope="module")
def alone(audited):
    return audited("alone")


def control(verdict, name):
    return next(each for each in verdict.validity.controls if each.name == name)


def test_members_are_exposed_where_no_control_objects(alone):
    verdict, _ = alone
    assert verdict.verdict == "exposed"
    assert not control(verdict, "controls against controls").fired


def test_a_control_model_that_sets_the_suspects_apart_too_forbids_an_answer(
    audited, nearly_the_target
):
    verdict, _ = audited("knows", control_target=nearly_the_target)
    assert verdict.verdict == "inconclusive"
    assert control(verdict, "control target").fired
    assert any("need not come from training" in reason for reason in verdict.reasons)


def test_a_base_that_has_seen_nothing_stays_quiet_and_enters_the_adjustment(
    audited, alone, ignorant
):
    verdict, out = audited("ignorant", base=ignorant)
    assert verdict.verdict == "exposed"
    quiet = control(verdict, "base")
    assert not quiet.fired
    assert quiet.auc_ci95[0] < 0.5 < quiet.auc_ci95[1]
    # The same records and scores, and yet another adjustment: the base's scores are among X.
    assert verdict.primary.p_value == alone[0].primary.p_value
    assert verdict.primary.robustness != alone[0].primary.robustness
    again = lightleak.judge(lightleak.runs.Run.open(out))
    assert again == verdict


def test_a_second_run_measures_no_control_again(audited, ignorant):
    _, out = audited("ignorant", base=ignorant)
    parts = {file: file.stat().st_mtime_ns for file in out.rglob("part-*.parquet")}
    assert {file.parent.name for file in parts} == {
        "evidence",
        "base",
        "shuffled",
        "base-shuffled",
    }
    audited("ignorant", base=ignorant)
    assert parts == {file: file.stat().st_mtime_ns for file in out.rglob("part-*.parquet")}


SHUFFLED = "texts shuffled among the images"


def test_a_target_that_learnt_the_texts_alone_is_not_said_to_know_the_pairs(alone):
    # The tiny LLaVA hardly looks at its images: wrong ones leave the members as familiar.
    pairs = control(alone[0], SHUFFLED)
    assert pairs.auc_ci95[0] < 0.5 < pairs.auc_ci95[1]
    assert "may be the texts by themselves" in pairs.sentence
    assert not pairs.fired


def measured(records):
    side = np.repeat(["suspect", "control"], records)
    names = np.arange(2 * records).astype(str)
    return Measured(None, Path(), None, list(names), side, np.arange(2 * records) % 2, names, None)


@pytest.mark.parametrize(("base_knows", "said"), [(False, "tells their pairs"), (True, "gain no")])
def test_a_target_that_learnt_the_pairs_is_said_to_and_not_what_its_base_knew(base_knows, said):
    rng = np.random.default_rng(0)
    rows, records = measured(120), 240
    learnt = np.where(rows.side == "suspect", 1.0, 0.0)
    scores = ControlScores(
        {"base": rng.normal(size=records) + learnt * base_knows},
        {"": rng.normal(size=records), "base": rng.normal(size=records)},
    )
    tests = SetTests(AuditSettings.read(target="t", suspect="s", control="c"), "loss")
    own = rng.normal(size=records) + learnt
    assert said in judge_controls._pairs(tests, rows, own, scores).sentence


def test_a_control_model_that_scored_one_side_alone_forbids_an_answer():
    rows = measured(120)
    settings = AuditSettings.read(target="t", suspect="s", control="c")
    data = compared(rows, np.zeros(240))
    assert ControlScores.covers(np.zeros(240), data, settings)
    one_sided = np.where(rows.side == "suspect", np.nan, 0.0)
    assert not ControlScores.covers(one_sided, data, settings)
    assert judge_controls._not_compared("base").fired


def test_a_run_whose_control_was_lost_is_not_judged_without_it(audited, ignorant, tmp_path):
    _, out = audited("ignorant", base=ignorant)
    shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "evidence" / "base")
    with pytest.raises(UserError, match="Run the same audit again"):
        lightleak.judge(lightleak.runs.Run.open(tmp_path / "run"))


def test_without_negative_controls_no_model_runs_but_the_target(audited):
    _, out = audited("none", negative_controls=False)
    assert {file.parent.name for file in out.rglob("part-*.parquet")} == {"evidence"}


@pytest.mark.parametrize("option", ["base", "control_target"])
def test_the_target_is_no_control_of_itself(audited, lab_tiny, option):
    with pytest.raises(UserError, match="is the target itself"):
        audited(f"itself-{option}", **{option: lab_tiny.target})


def test_a_control_model_that_is_not_there_is_missed_at_once(audited):
    with pytest.raises(UserError, match="no such folder"):
        audited("missing", base="/nowhere/base")


def test_gates_and_what_other_programs_read(audited, ignorant, tmp_path, capfd, monkeypatch):
    _, out = audited("ignorant", base=ignorant)
    command = ["lightleak", "report", out, "--fail-if", "exposed"]
    command += ["--junit", tmp_path / "audit.xml", "--sarif", tmp_path / "audit.sarif"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert ended.value.code == 3
    assert "--fail-if exposed: tripped" in capfd.readouterr().err
    suite = ElementTree.parse(tmp_path / "audit.xml").getroot()
    assert suite.findall(".//failure")
    sarif = json.loads((tmp_path / "audit.sarif").read_text())
    assert sarif["runs"][0]["results"][0]["level"] == "error"


class TestShuffling:
    @staticmethod
    def sides(texts):
        records = tuple(
            Record(id=f"{side}/{i}", image=b"", text=text, prompt=f"of {side}?")
            for side in ("suspect", "control", "member")
            for i, text in enumerate(texts)
        )
        side = np.array([record.id.partition("/")[0] for record in records])
        return Sides(records, side, np.arange(len(records)) % 2, (), {})

    def test_every_image_gets_another_text_of_its_own_side(self):
        before = self.sides([f"text {i % 5}" for i in range(20)])
        after = shuffled(before, seed=1)
        own = {record.id: record for record in before.records}
        assert set(after.side) == {"suspect", "control"}  # Calibration records are not audited.
        assert len(after.records) == 40
        for record in after.records:
            assert record.text != own[record.id].text
            assert record.prompt == own[record.id].prompt  # "of suspect?": from its own side.

    def test_a_text_that_most_share_is_left_out_rather_than_kept(self):
        after = shuffled(self.sides(["the same"] * 9 + ["another"]), seed=1)
        assert 0 < len(after.records) <= 4
