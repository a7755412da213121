"""A membership audit of a dual encoder: verdict, bank of negatives, and scores anyone can check."""

import json
import shutil
import sys

import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel

import naive_gradaudit as naive
from lightleak import signals
from lightleak.audits.membership import audit
from lightleak.cli import main
from lightleak.errors import UserError
from lightleak.evidence.readings import OtherLosses, ReferenceLosses
from lightleak.lab.models import tiny_llava
from lightleak.runs import Run
from lightleak.validity.verdict import json_schema

BANK_SIZE = 20
# Without other models there is nothing to compare with.
USUAL = {
    name
    for name in signals.names("dual-encoder")
    if signals.get(name).needs not in (OtherLosses, ReferenceLosses)
}


@pytest.fixture(scope="module")
def whole(lab_pairs, tmp_path_factory):
    """What was asked, and the run folder: all signals, controls in groups of three."""
    folder = tmp_path_factory.mktemp("whole")
    rows = [json.loads(line) for line in lab_pairs.nonmembers.read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"group": f"page-{i // 3}", "image": str(lab_pairs.nonmembers.parent / row["image"])}
    control = folder / "control.jsonl"
    control.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {
        "target": lab_pairs.target,
        "suspect": lab_pairs.members,
        "control": control,
        "allow_outside": True,
        "bank_size": BANK_SIZE,
        "design": "randomised",
        # So small a set has few pairs beyond the published 1.5 standard deviations.
        "options": {"weak": {"spread": 0.5}},
    }
    audit(**asked, out=folder / "run")
    return asked, Run(folder / "run")


@pytest.fixture
def sides(lab_pairs, subset):
    """Small records files of a lab target, with a bank of their own."""
    return {
        "suspect": subset(lab_pairs.members, "suspect", 0, 12),
        "control": subset(lab_pairs.nonmembers, "control", 0, 14),
        "bank": subset(lab_pairs.nonmembers, "bank", 100, 108),
    }


@pytest.fixture
def split(lab_pairs, subset):
    """Calibration records for the protocol split."""
    return {
        "protocol": "split",
        "calibration_members": subset(lab_pairs.members, "member", 30, 45),
        "calibration_nonmembers": subset(lab_pairs.nonmembers, "nonmember", 30, 45),
    }


def rows_of(file):
    return pq.read_table(file).to_pylist()


def scores(run, name=None):
    """Scores in the order of the run, by (signal, set, id)."""
    return {
        (row["signal"], row["set"], row["id"]): row["score"]
        for row in rows_of(Run(run).scores_file)
        if name in (None, row["signal"])
    }


def verdict_of(run):
    return json.loads(run.verdict_file.read_text())


class TestVerdict:
    def test_pairs_trained_on_are_exposed_and_every_signal_tells(self, whole):
        verdict = verdict_of(whole[1])
        assert (verdict["verdict"], verdict["tier"]) == ("exposed", "randomised")
        assert verdict["primary"]["signal"] == "cosine"
        assert set(verdict["signals"]) == USUAL
        for name, finding in verdict["signals"].items():
            assert finding["n_unscorable"] == 0, name
            assert finding["auc"] > 0.6, name

    def test_pairs_never_trained_on_are_not(self, lab_pairs, subset, tmp_path):
        verdict = audit(
            target=lab_pairs.target,
            suspect=subset(lab_pairs.nonmembers, "suspect", 0, 60),
            control=subset(lab_pairs.nonmembers, "control", 60, 120),
            out=tmp_path / "run",
            signals=("cosine", "contrast_loss"),
            design="randomised",
        )
        assert verdict.verdict == "inconclusive"

    def test_what_is_written_is_what_other_programs_were_promised(self, whole):
        _, run = whole
        jsonschema.validate(verdict_of(run), json_schema())
        assert run.manifest()["target"]["kind"] == "dual-encoder"
        assert pq.read_schema(run.scores_file).names == ["id", "set", "fold", "signal", "score"]

    def test_report_judges_again_without_the_model(self, whole, tmp_path, monkeypatch, capsys):
        again = tmp_path / "run"
        shutil.copytree(whole[1].folder, again)
        for name in ("verdict.json", "scores.parquet"):
            (again / name).unlink()
        monkeypatch.setattr("lightleak.targets.loading._load_model", None)
        monkeypatch.setattr(sys, "argv", ["lightleak", "report", str(again)])
        with pytest.raises(SystemExit) as left:
            main.run()
        assert not left.value.code
        assert verdict_of(Run(again)) == verdict_of(whole[1])
        assert scores(again) == scores(whole[1].folder)
        assert (again / "report.html").is_file()


class TestBank:
    def test_controls_set_aside_are_whole_groups_and_are_not_audited(self, whole):
        asked, run = whole
        bank = {row["id"] for row in rows_of(run.evidence / "bank.parquet")}
        group = {
            f"control/{row['id']}": row["group"]
            for row in map(json.loads, asked["control"].read_text().splitlines())
        }
        assert len(bank) == 21  # Groups of three, until there are twenty.
        assert bank == {key for key in group if group[key] in {group[each] for each in bank}}
        audited = {row["id"] for row in rows_of(run.evidence / "records.parquet")}
        assert audited.isdisjoint(bank)
        assert {key for key in audited if key.startswith("control/")} == set(group) - bank
        scored = {f"{row['set']}/{row['id']}" for row in rows_of(run.scores_file)}
        assert scored == audited
        coverage = verdict_of(run)["coverage"]
        assert (coverage["set_aside"], coverage["control"]["scored"]) == (21, 99)

    def test_a_bank_of_its_own_leaves_every_control_audited(self, lab_pairs, sides, tmp_path):
        verdict = audit(
            target=lab_pairs.target, **sides, out=tmp_path / "run", signals=("contrast_loss",)
        )
        assert (verdict.coverage.set_aside, verdict.coverage.control.scored) == (0, 14)
        bank = rows_of(tmp_path / "run" / "evidence" / "bank.parquet")
        assert len(bank) == 8
        assert {row["id"].partition("/")[0] for row in bank} == {"bank"}

    def test_without_a_signal_that_needs_it_nothing_is_set_aside(self, lab_pairs, sides, tmp_path):
        del sides["bank"]
        verdict = audit(target=lab_pairs.target, **sides, out=tmp_path / "run", signals=("cosine",))
        assert (verdict.coverage.set_aside, verdict.coverage.control.scored) == (0, 14)

    @pytest.mark.parametrize("side", ["suspect", "control"])
    def test_an_audited_pair_that_is_in_the_bank_allows_no_answer(
        self, lab_pairs, sides, tmp_path, side
    ):
        row = json.loads(sides[side].read_text().splitlines()[0])
        with sides["bank"].open("a") as stream:
            stream.write(json.dumps(row | {"id": "copy"}) + "\n")
        verdict = audit(
            target=lab_pairs.target, **sides, out=tmp_path / "run", signals=("contrast_loss",)
        )
        (pair,) = verdict.validity.duplicate_pairs
        assert verdict.verdict == "inconclusive"
        assert (pair.suspect, pair.control) == (f"{side}/{row['id']}", "bank/copy")

    def test_dropping_the_copy_drops_it_from_the_audit_and_says_so(
        self, lab_pairs, sides, tmp_path
    ):
        row = json.loads(sides["suspect"].read_text().splitlines()[0])
        with sides["bank"].open("a") as stream:
            stream.write(json.dumps(row | {"id": "copy"}) + "\n")
        run = Run(tmp_path / "run")
        verdict = audit(
            target=lab_pairs.target,
            **sides,
            out=run.folder,
            signals=("contrast_loss",),
            drop_duplicates=True,
        )
        assert (verdict.validity.duplicates, verdict.coverage.suspect.failed) == (0, 1)
        assert ("contrast_loss", "suspect", row["id"]) not in scores(run.folder)
        # The pair of the bank stays in it, so nothing may say that it was left out.
        assert len(rows_of(run.evidence / "bank.parquet")) == 9
        (failure,) = rows_of(run.failures_file)
        assert (failure["set"], failure["id"]) == ("suspect", row["id"])

    def test_the_order_of_a_file_does_not_choose_the_bank(self, lab_pairs, sides, tmp_path):
        del sides["bank"]
        drawn = []
        for name in ("straight", "turned"):
            audit(target=lab_pairs.target, **sides, out=tmp_path / name, signals=("contrast_loss",))
            bank = rows_of(tmp_path / name / "evidence" / "bank.parquet")
            drawn.append({row["id"] for row in bank})
            lines = sides["control"].read_text().splitlines(keepends=True)
            sides["control"].write_text("".join(lines[::-1]))
        assert len(drawn[0]) == 2
        assert drawn[0] == drawn[1]


class TestTheSameNumbers:
    def test_whatever_the_batches_and_the_order_of_the_records(
        self, lab_pairs, sides, split, tmp_path
    ):
        found = {}
        for name, size, turn in (("one", 1, False), ("sixteen", 16, False), ("turned", 16, True)):
            for side in ("suspect", "control", "bank") if turn else ():
                lines = sides[side].read_text().splitlines(keepends=True)
                sides[side].write_text("".join(lines[::-1]))
            audit(
                target=lab_pairs.target,
                **sides,
                **split,
                options={"weak": {"spread": 0.0}},
                out=tmp_path / name,
                batch_size=size,
            )
            found[name] = scores(tmp_path / name)
        assert {key[0] for key in found["one"]} == USUAL
        assert None not in found["one"].values()
        for other in ("sixteen", "turned"):
            assert found[other].keys() == found["one"].keys()
            for key, value in found["one"].items():
                assert found[other][key] == pytest.approx(value, rel=1e-4, abs=1e-5), key

    def test_after_a_part_was_lost(self, whole, tmp_path):
        asked, run = whole
        again = tmp_path / "run"
        shutil.copytree(run.folder, again)
        kept, *lost = sorted((again / "evidence").glob("part-*.parquet"))
        assert lost
        for file in (*lost, again / "verdict.json", again / "scores.parquet"):
            file.unlink()
        before = kept.stat().st_mtime_ns
        audit(**asked, out=again)
        assert kept.stat().st_mtime_ns == before
        assert scores(again) == scores(run.folder)

    @pytest.mark.parametrize("change", [{"bank_size": 9}, {"bank": "suspect"}])
    def test_never_from_another_bank_in_the_same_folder(self, whole, tmp_path, change):
        asked, run = whole
        again = tmp_path / "run"
        shutil.copytree(run.folder, again)
        change = {name: asked.get(value, value) for name, value in change.items()}
        with pytest.raises(UserError, match="another bank"):
            audit(**asked | change, out=again)

    def test_from_the_command_line(self, lab_pairs, sides, tmp_path, monkeypatch, capsys):
        audit(target=lab_pairs.target, **sides, out=tmp_path / "api", options=["weak.spread=0"])
        arguments = {"target": lab_pairs.target, **sides, "set": "weak.spread=0"}
        command = ["lightleak", "audit", "--out", str(tmp_path / "cli")]
        command += [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as left:
            main.run()
        assert not left.value.code
        one, other = (pq.read_table(tmp_path / name / "scores.parquet") for name in ("api", "cli"))
        assert one.equals(other)


class PlainClip:
    """CLIP the plain way: one pair at a time, autograd, nothing of lightleak's."""

    def __init__(self, folder):
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float64).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.parameters = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.ndim >= 2 and (".layers." in name or "_projection." in name)
        }

    def embed(self, row, folder):
        image = Image.open(folder / row["image"]).convert("RGB")
        given = self.processor(images=[image], text=[row["text"]], return_tensors="pt")
        given["pixel_values"] = given["pixel_values"].double()
        said = self.model(**given)
        return [each[0] / each[0].norm() for each in (said.image_embeds, said.text_embeds)]

    def loss(self, row, folder, bank):
        image, text = self.embed(row, folder)
        scale = self.model.logit_scale.exp()
        by_text = torch.stack([image @ text, *(image @ other for _, other in bank)])
        by_image = torch.stack([image @ text, *(other @ text for other, _ in bank)])
        return -sum(torch.log_softmax(scale * each, 0)[0] for each in (by_text, by_image)) / 2

    def read(self, file, bank):
        """(−loss, gradients by name) of every record of a file."""
        found = []
        for row in map(json.loads, file.read_text().splitlines()):
            self.model.zero_grad(set_to_none=True)
            loss = self.loss(row, file.parent, bank)
            loss.backward()
            gradients = {name: each.grad.clone() for name, each in self.parameters.items()}
            found.append((-loss.item(), gradients))
        return found

    def bank(self, rows, folder):
        with torch.no_grad():
            return [self.embed(row, folder) for row in rows]


ASKED = {"signals": ("contrast_loss", "grad_norm", "gradaudit"), "dtype": "float64"}
MASK = {"strategy": "tau_or_topq", "tau": 0.1, "q": 0.9}


class TestGradients:
    """What is read of gradients equals plain autograd, through the whole audit."""

    def test_split_equals_the_published_protocol(self, lab_pairs, sides, split, tmp_path):
        audit(target=lab_pairs.target, **sides, **split, **ASKED, out=tmp_path / "run")
        plain = PlainClip(lab_pairs.target)
        rows = map(json.loads, sides["bank"].read_text().splitlines())
        bank = plain.bank(rows, sides["bank"].parent)
        files = {
            "suspect": sides["suspect"],
            "control": sides["control"],
            "member": split["calibration_members"],
            "nonmember": split["calibration_nonmembers"],
        }
        read = {side: plain.read(file, bank) for side, file in files.items()}
        members, nonmembers, suspects, controls = (
            [gradients for _, gradients in read[side]]
            for side in ("member", "nonmember", "suspect", "control")
        )
        cosines = naive.published_cosines(members, nonmembers, suspects + controls)
        expected = naive.published_scores(cosines, **MASK)
        found = list(scores(tmp_path / "run", "gradaudit").values())
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        everyone = [each for side in files for each in read[side]]
        found = {
            name: [
                scores(tmp_path / "run", name)[name, side, json.loads(line)["id"]]
                for side, file in files.items()
                for line in file.read_text().splitlines()
            ]
            for name in ("contrast_loss", "grad_norm")
        }
        norms = [-torch.cat([g.flatten() for g in each.values()]).norm() for _, each in everyone]
        np.testing.assert_allclose(
            found["contrast_loss"], [loss for loss, _ in everyone], rtol=1e-9
        )
        np.testing.assert_allclose(found["grad_norm"], norms, rtol=1e-7)

    def test_crossfit_against_controls_set_aside(self, lab_pairs, sides, tmp_path):
        del sides["bank"]
        audit(target=lab_pairs.target, **sides, **ASKED, out=tmp_path / "run")
        rows = rows_of(tmp_path / "run" / "scores.parquet")
        rows = [row for row in rows if row["signal"] == "gradaudit"]
        chosen = {row["id"] for row in rows_of(tmp_path / "run" / "evidence" / "bank.parquet")}
        plain = PlainClip(lab_pairs.target)
        controls = [json.loads(line) for line in sides["control"].read_text().splitlines()]
        aside = [row for row in controls if f"control/{row['id']}" in chosen]
        assert len(aside) == 2
        bank = plain.bank(aside, sides["control"].parent)
        kept = sides["control"].with_name("kept.jsonl")
        kept.write_text("".join(json.dumps(r) + "\n" for r in controls if r not in aside))
        read = plain.read(sides["suspect"], bank) + plain.read(kept, bank)
        expected = naive.crossed_scores(
            [gradients for _, gradients in read],
            [row["set"] == "suspect" for row in rows],
            [row["fold"] for row in rows],
            **MASK,
        )
        np.testing.assert_allclose([row["score"] for row in rows], expected, rtol=1e-6)


class TestMistakes:
    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            ({"signals": ("loss",)}, "not for a dual-encoder target; there are contrast_loss"),
            ({"primary": "mink"}, "not for a dual-encoder target; there are contrast_loss"),
            ({"options": ["zlib.k=1"]}, "no option 'k'"),
            ({"options": ["mink.k=0.1"]}, "not for a dual-encoder target"),
            ({"signals": ("cosin",)}, "Did you mean cosine"),
            ({"bank_size": 1}, "--bank-size"),
        ],
    )
    def test_of_a_dual_encoder(self, lab_pairs, sides, tmp_path, asked, said):
        with pytest.raises(UserError) as caught:
            audit(target=lab_pairs.target, **sides, **asked, out=tmp_path / "run")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            ({"signals": ("cosine",)}, "not for a generative target; there are aug_kl"),
            ({"signals": ("loss", "weak")}, "not for a generative target; there are aug_kl"),
            ({"signals": ("loss",), "bank": True}, "only a dual encoder takes a bank"),
        ],
    )
    def test_of_a_generative_target(self, sides, tmp_path, asked, said):
        tiny_llava(tmp_path / "llava", ["a kite"])
        bank = sides.pop("bank")
        given = {name: bank if name == "bank" else value for name, value in asked.items()}
        with pytest.raises(UserError) as caught:
            audit(target=tmp_path / "llava", **sides, **given, out=tmp_path / "run")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_too_few_controls_for_a_bank(self, lab_pairs, sides, subset, tmp_path):
        sides |= {"control": subset(lab_pairs.nonmembers, "few", 0, 9)}
        del sides["bank"]
        with pytest.raises(UserError, match="fewer than two usable pairs") as caught:
            audit(
                target=lab_pairs.target, **sides, out=tmp_path / "run", signals=("contrast_loss",)
            )
        assert "\n" not in str(caught.value)
