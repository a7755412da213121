"""`lightleak audit --references`: other models are asked about the same records, and compared."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from lightleak import audit, train_references
from lightleak.audits.judge import judge
from lightleak.audits.stored import load
from lightleak.cli import main
from lightleak.errors import UserError
from lightleak.records import content_key
from lightleak.records import load as load_records
from lightleak.report import report
from lightleak.report.comparison import compare
from lightleak.runs import Run, read_json, read_table
from report.page import Page

COMPARING = ("lira", "ratio", "rmia", "signature")


@pytest.fixture(scope="module")
def references(lab_lora, tmp_path_factory):
    out = tmp_path_factory.mktemp("references") / "four"
    train_references(
        base=lab_lora.base,
        suspect=lab_lora.members,
        control=lab_lora.nonmembers,
        like=lab_lora.adapter,
        out=out,
        count=4,
        epochs=3,
        train_batch=16,
        learning_rate=4e-3,
        warmup=0.0,
    )
    return out


def asked(lab_lora, out, **options):
    return audit(
        target=lab_lora.target,
        adapter=lab_lora.adapter,
        suspect=lab_lora.members,
        control=lab_lora.nonmembers,
        out=out,
        design="randomised",
        **options,
    )


@pytest.fixture(scope="module")
def audited(lab_lora, references, tmp_path_factory):
    out = tmp_path_factory.mktemp("audit") / "run"
    return asked(lab_lora, out, references=str(references), primary="lira"), Run(out)


def mean_losses(run, folder):
    """Mean log-likelihood by record, straight from the stored tokens of one model."""
    table = load(run, run.evidence / folder).table.to_pydict()
    return {key: np.mean(own) for key, own in zip(table["id"], table["logprob"], strict=True)}


def scores_of(run, name):
    rows = read_table(run.scores_file).to_pylist()
    return {f"{r['set']}/{r['id']}": r["score"] for r in rows if r["signal"] == name}


def test_who_was_in_which_reference_is_looked_up_by_content(audited, references, lab_lora):
    _, run = audited
    stored = read_json(run.evidence / "references.json")["trained on"]
    told = json.loads((references / "references.json").read_text())["membership"]
    for side, file in (("suspect", lab_lora.members), ("control", lab_lora.nonmembers)):
        for record in load_records(file).records:
            expected = told[content_key(record)]
            found = "".join(str(int(f"{side}/{record.id}" in each)) for each in stored.values())
            assert found == expected
            assert expected.count("1") == 2


def test_lira_and_ratio_are_those_of_the_stored_losses_of_all_models(audited):
    _, run = audited
    stored = read_json(run.evidence / "references.json")["trained on"]
    own, base = mean_losses(run, "."), mean_losses(run, "base")
    others = {name: mean_losses(run, name) for name in stored}
    ratio, lira = scores_of(run, "ratio"), scores_of(run, "lira")
    assert len(ratio) == len(lira) == 96

    def phi(loss):
        return loss - np.log(1 - np.exp(loss))

    sides = {True: {}, False: {}}
    for key in own:
        for side in sides:
            sides[side][key] = [
                phi(others[name][key]) for name, ids in stored.items() if (key in ids) is side
            ]
    spread = {
        side: np.sqrt(np.mean([np.var(each, ddof=1) for each in values.values()]))
        for side, values in sides.items()
    }
    for key, value in lira.items():
        inside, outside = (
            -0.5 * ((phi(own[key]) - np.mean(sides[s][key])) / spread[s]) ** 2 - np.log(spread[s])
            for s in (True, False)
        )
        assert value == pytest.approx(inside - outside, rel=1e-5)
        assert ratio[key] == pytest.approx(own[key] - base[key], rel=1e-5)


def test_the_comparing_signals_score_every_record_and_wrong_pairs_are_not_asked(audited):
    verdict, run = audited
    for name in COMPARING:
        assert verdict.signals[name].n_unscorable == 0
    controls = {each.name: each.sentence for each in verdict.validity.controls}
    assert "compares models" in controls["texts shuffled among the images"]
    assert controls["base"].startswith("The base, which is said not to have seen the suspects")
    assert not (run.evidence / "shuffled").exists()


def test_a_signature_taught_by_references_shares_one_scale_over_all_folds(audited):
    verdict, _ = audited
    rates = verdict.signals["signature"]
    assert "folds fitted apart" not in str(rates.tpr_at_fpr_reason)
    assert rates.prevalence is not None


def test_verdict_and_report_say_what_it_was_compared_with(audited, lab_lora):
    verdict, run = audited
    found = verdict.compared
    assert (found.references, found.epoch, found.recipe["learning_rate"]) == (4, 3, 4e-3)
    assert (found.suspects_seen, found.controls_seen, found.records) == (48, 48, 96)
    assert found.base == str(lab_lora.base)
    assert found.shares == "made"
    page = Page(report(run)).text
    assert "4 reference(s), trained by the auditor on random halves" in page
    assert "epoch 3 of 3, learning rate 0.004" in page
    assert "signature learns from the references" in page
    assert "solved for all of them together without a label" in page


def test_a_comparison_of_audits_with_and_without_references_says_so(audited, lab_lora, tmp_path):
    _, run = audited
    alone = tmp_path / "alone"
    asked(lab_lora, alone, signals=("ratio",), negative_controls=False)
    page = compare([run.folder, alone], tmp_path / "page.html")
    assert "Not the same other models compared with" in Page(page).text
    same = compare([alone, copied(alone, tmp_path)], tmp_path / "same.html")
    assert "Not the same" not in Page(same).text


def copied(folder, into):
    return Path(shutil.copytree(folder, into / "copy"))


def test_without_references_the_signature_is_fitted_across_folds_and_the_base_is_still_asked(
    lab_lora, tmp_path
):
    verdict = asked(
        lab_lora, tmp_path / "run", signals=("signature", "ratio"), negative_controls=False
    )
    assert "folds fitted apart" in str(verdict.signals["signature"].tpr_at_fpr_reason)
    assert verdict.signals["ratio"].n_unscorable == 0
    assert (verdict.compared.references, verdict.compared.recipe) == (0, None)


@pytest.mark.parametrize("name", ["lira", "rmia", "ratio"])
def test_a_comparison_that_lacks_its_models_is_refused_with_what_to_give(lab_tiny, tmp_path, name):
    with pytest.raises(UserError, match=r"compares the target with other models.*--references"):
        audit(
            target=lab_tiny.target,
            suspect=lab_tiny.members,
            control=lab_tiny.nonmembers,
            out=tmp_path / "run",
            signals=(name,),
        )


def test_other_references_than_a_run_began_with_are_refused(
    audited, references, lab_lora, tmp_path
):
    verdict, run = audited
    shutil.copytree(run.folder, tmp_path / "run")
    shutil.copytree(references, tmp_path / "moved")
    again = asked(lab_lora, tmp_path / "run", primary="lira", references=str(tmp_path / "moved"))
    assert again.signals["lira"].auc == verdict.signals["lira"].auc
    fewer = tmp_path / "fewer"
    shutil.copytree(references, fewer)
    told = json.loads((fewer / "references.json").read_text())
    told["references"][3]["finished"] = False
    (fewer / "references.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="registered with other references"):
        asked(lab_lora, tmp_path / "run", primary="lira", references=str(fewer))
    with pytest.raises(UserError, match=r"references\.json is missing"):
        asked(lab_lora, tmp_path / "new", primary="lira", references=str(tmp_path))


def test_a_run_whose_other_models_were_not_all_asked_is_not_judged(audited, tmp_path):
    _, run = audited
    for number, lost in enumerate(("shares/middle-reference-01.safetensors", "references.json")):
        copy = tmp_path / str(number)
        shutil.copytree(run.folder, copy)
        (copy / "evidence" / lost).unlink()
        with pytest.raises(UserError, match=r"not complete.*Run the same audit again"):
            judge(Run(copy))


def test_a_name_that_leads_out_of_the_run_is_refused(lab_lora, references, tmp_path):
    shutil.copytree(references, tmp_path / "refs")
    file = tmp_path / "refs" / "references.json"
    file.write_text(file.read_text().replace('"name": "reference-00"', '"name": "../../out"'))
    with pytest.raises(UserError, match="it is damaged"):
        asked(lab_lora, tmp_path / "run", primary="lira", references=str(tmp_path / "refs"))
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(lab_lora, references, tmp_path, capfd, monkeypatch):
    options = {
        "target": lab_lora.target,
        "adapter": lab_lora.adapter,
        "suspect": lab_lora.members,
        "control": lab_lora.nonmembers,
        "references": references,
        "signals": "lira,rmia",
        "primary": "lira",
        "design": "randomised",
        "out": tmp_path / "run",
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["lightleak", "audit", *given, "--no-negative-controls"])
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert ended.value.code == 0
    assert "lira" in capfd.readouterr().out
