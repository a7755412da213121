"""The page says what the run found, escapes what the records say, and carries nothing else."""

import json
import re
import shutil
from io import BytesIO
from urllib.request import urlopen

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lightleak import statistics as st
from lightleak.errors import UserError
from lightleak.report import report
from lightleak.report.membership.contents import PrimaryScores
from lightleak.report.membership.figures import curve
from lightleak.runs import Run
from lightleak.validity import Verdict
from report.page import Page, squeeze
from report.synthetic_run import exposed, inconclusive, no_evidence, write_run

MAKERS = {"exposed": exposed, "no_evidence": no_evidence, "inconclusive": inconclusive}
HOSTILE = """<script>document.title="owned"</script>"><img src=x onerror='alert(1)'> \u202eabc"""
UNUSABLE = [
    ("suspect/<b>bad", "image", f"it is truncated {HOSTILE}"),
    ("control/b2", "image", "no such file"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made = {name: make(folder / name) for name, make in MAKERS.items()}
    for run in made.values():
        report(run)
    return made


@pytest.fixture(params=sorted(MAKERS))
def judged(request, runs):
    """One run of each verdict: its name, verdict and page."""
    run = runs[request.param]
    verdict = Verdict.read(run.verdict_file)
    assert verdict.verdict == request.param
    return verdict, Page(run.report_file)


def test_the_first_things_said_are_the_finding_its_tier_and_every_reason(judged):
    verdict, page = judged
    names = {"exposed": "Exposed", "no_evidence": "No evidence", "inconclusive": "Inconclusive"}
    first_screen = page.text[: page.text.index("How it was decided")]
    tier = {"held_out": "Held-out.", "none": "None."}[verdict.tier]
    for said in (names[verdict.verdict], verdict.sentence, tier, *verdict.reasons):
        assert squeeze(said) in first_screen


def test_every_signal_stands_with_its_interval_rates_p_values_and_paper(judged):
    verdict, page = judged
    for name, finding in verdict.signals.items():
        row = page.row(f"{name} ")
        low, high = finding.auc_ci95
        assert f"{finding.auc:.3f} {low:.3f} to {high:.3f}" in row
        assert finding.source in row
        for rate, point in finding.tpr_at_fpr.items():
            expected = finding.tpr_at_fpr_reason.get(rate) or f"{round(100 * point.tpr, 1):g} %"
            assert expected in row


def test_what_is_not_shown_is_said_for_each_verdict(runs):
    texts = {name: Page(run.report_file).text for name, run in runs.items()}
    limits = {
        "exposed": "Which records were used. The finding is about the suspects as a set",
        "no_evidence": "Absence of a trace is not absence.",
        "inconclusive": "This is no acquittal",
    }
    for name, limit in limits.items():
        assert [other for other, text in texts.items() if limit in text] == [name]
    detectable = Verdict.read(runs["no_evidence"].verdict_file).validity.power.min_detectable_auc
    assert f"Effects smaller than AUC {detectable:.3f}" in texts["no_evidence"]


def test_no_p_value_counts_where_a_check_forbids_an_answer(runs):
    page = Page(runs["inconclusive"].report_file)
    assert page.row("Permutation test").endswith("0.0001 no")
    assert page.row("Residual test").endswith("< 0.0001 no")
    assert Page(runs["exposed"].report_file).row("Permutation test").endswith("0.0001 yes")


def test_failed_checks_are_marked_and_duplicates_listed(runs):
    page = Page(runs["inconclusive"].report_file)
    assert "failed The sets cannot be told apart without the model" in page.text
    assert "failed No record stands on both sides" in page.text
    assert page.row("1 7") == "1 7 same image file"
    assert "suspect texts are longer (median 41 against 18 characters)" in page.text
    assert "failed" not in Page(runs["exposed"].report_file).text


def test_an_auc_below_one_half_is_not_passed_over(tmp_path):
    run = write_run(tmp_path / "run", effect=-1.0, records=60)
    said = Page(report(run)).text
    assert "The AUC lies below 0.5: suspects score lower than controls beyond chance" in said


def test_the_highest_suspects_are_listed_with_what_may_be_claimed(runs):
    run = runs["exposed"]
    page = Page(run.report_file)
    claims = pq.read_table(run.claims_file).to_pylist()
    survivors = sum(claim["q_value"] <= 0.05 for claim in claims)
    assert f"{survivors} of {len(claims)} suspects have a q-value of at most 5 %" in page.text
    least = st.smallest_resolvable(300, 300, 0.05)
    assert f"none can be claimed unless at least {least} are at once" in page.text
    highest = max(claims, key=lambda claim: claim["score"])
    assert page.row(f"{highest['id']} a red kettle, number suspect/{highest['id']}")
    assert sum("a red kettle" in row for row in page.rows) == 20


def test_a_primary_signal_chosen_afterwards_is_exposed_as_such(tmp_path, runs):
    shutil.copytree(runs["exposed"].folder, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    changed = {**run.manifest(), "pre_registered_primary_signal": "zlib"}
    run.manifest_file.write_text(json.dumps(changed), encoding="utf-8")
    assert "Beware: zlib was named before the measuring" in Page(report(run)).text
    assert "Beware" not in Page(runs["exposed"].report_file).text


def test_a_ranking_under_another_verdict_accuses_no_record(runs):
    assert "It accuses no record." in Page(runs["inconclusive"].report_file).text
    assert "It accuses no record." not in Page(runs["exposed"].report_file).text


def test_every_failure_is_counted_and_named(tmp_path):
    run = write_run(tmp_path / "run", effect=0.0, records=60, unusable=UNUSABLE, empty=3)
    page = Page(report(run))
    total = pq.read_table(run.failures_file).num_rows
    assert f"{total} in all" in page.text
    assert "signal loss, suspect 3" in page.text
    assert page.row("b2") == "b2 control image no such file"
    assert "57 of 61 suspects and 60 of 61 controls were scored" in page.text


def test_controls_that_are_the_bank_of_negatives_are_told_from_those_scored(tmp_path, runs):
    shutil.copytree(runs["no_evidence"].folder, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    verdict = json.loads(run.verdict_file.read_text())
    verdict["coverage"]["set_aside"] = 60
    run.verdict_file.write_text(json.dumps(verdict))
    said = "60 more controls are the bank of negatives and are not scored."
    assert said in Page(report(run)).text
    assert "bank of negatives" not in Page(runs["no_evidence"].report_file).text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "run"
    texts = {f"suspect/{i}": HOSTILE if i % 2 else "x" * 10_000 for i in range(60)}
    difference = {"feature": "f", "sentence": HOSTILE, "auc": 0.9, "p_value_adjusted": 0.001}
    run = inconclusive(folder, texts=texts, unusable=UNUSABLE, differences=[difference])
    manifest = run.manifest()
    manifest["target"]["name"] = HOSTILE
    manifest["settings"]["suspect"] = HOSTILE
    run.manifest_file.write_text(json.dumps(manifest), encoding="utf-8")
    return Page(report(run))


def test_texts_of_records_are_shown_and_never_become_markup(hostile):
    assert squeeze(HOSTILE) in hostile.text
    assert "<b>bad" in hostile.text
    tags = [tag for tag, _ in hostile.tags]
    assert not {"script", "img", "iframe", "object", "link"} & set(tags)
    assert tags.count("b") == 1  # our own, in the header
    assert not [name for _, attrs in hostile.tags for name in attrs if name.startswith("on")]


def test_long_texts_are_cut_and_say_so(hostile):
    assert "(cut here; 10,000 characters in all)" in hostile.text
    assert "x" * 500 not in hostile.source


def test_nothing_is_fetched_from_anywhere(judged):
    _, page = judged
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    loading = ("src", "href", "xlink:href", "srcset", "action", "data")
    fetched = [a[n] for _, a in page.tags for n in loading if not (a.get(n) or "#").startswith("#")]
    assert fetched == []
    assert re.findall(r"url\((?!#)|@import", page.source) == []


def test_ids_of_the_figures_do_not_clash_and_each_says_what_it_shows(judged):
    verdict, page = judged
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(|href=")#([^)"]+)', page.source)
    assert used
    assert set(used) <= set(ids)
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg" and "role" in attrs]
    assert len(labels) == 8
    assert any(f"AUC {verdict.primary.auc:.3f}, 95 % interval" in label for label in labels)


def test_the_same_run_gives_the_same_page(runs):
    run = runs["exposed"]
    before = run.report_file.read_bytes()
    assert report(run.folder).read_bytes() == before
    assert len(before) < 1_500_000


def test_pictures_are_embedded_only_when_asked_for_and_may_be_missing(tmp_path):
    images = tmp_path / "images"
    run = write_run(tmp_path / "run", effect=0.9, records=30, images=images)
    assert "data:image" not in report(run).read_text()
    highest = pq.read_table(run.claims_file)["id"][0].as_py()
    (images / f"{highest}.png").unlink()
    pictures = [a["src"] for t, a in Page(report(run, show_images=True)).tags if t == "img"]
    assert len(pictures) == 19
    with urlopen(pictures[0]) as stream:
        picture = Image.open(BytesIO(stream.read()))
    assert (picture.format, picture.size) == ("JPEG", (128, 96))


def test_too_few_records_to_compare_still_make_a_page(tmp_path):
    page = Page(report(write_run(tmp_path / "run", effect=0.0, records=30, empty=30)))
    assert "Only 0 suspect records could be scored" in page.text
    assert "Too few records could be scored to compare the two sets" in page.text


def test_a_run_without_a_verdict_is_refused_with_what_to_do(tmp_path, runs):
    shutil.copytree(runs["inconclusive"].folder, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    run.verdict_file.unlink()
    run.report_file.unlink()
    with pytest.raises(UserError, match=r"no verdict yet.*Run the same audit again"):
        report(run)
    assert not run.report_file.exists()


def test_a_damaged_file_is_named(tmp_path, runs):
    shutil.copytree(runs["inconclusive"].folder, tmp_path / "run")
    scores = tmp_path / "run" / "scores.parquet"
    scores.write_bytes(scores.read_bytes()[:100])
    with pytest.raises(UserError, match=r"scores\.parquet: it is missing or damaged"):
        report(tmp_path / "run")


def test_scores_of_different_fits_are_compared_within_their_folds_only():
    rng = np.random.default_rng(0)
    folds = np.arange(800) % 2
    # The second fit scores everything lower by far, as another reference gradient may.
    suspect, control = rng.normal(1, 1, 800) - 50 * folds, rng.normal(0, 1, 800) - 50 * folds
    truth = st.auc_across_folds(suspect, control, folds, folds)
    alone = np.arange(800).astype(str)
    scores = PrimaryScores(truth, suspect, control, folds, folds, alone, alone, comparable=False)
    crossed = curve(scores, seed=0)
    assert np.trapezoid(crossed.tpr, crossed.fpr) == pytest.approx(truth.value, abs=0.01)
    assert st.auc(suspect, control) < truth.low
