"""The page of a probe says whether a trace was left, how surely, and what else was tried."""

import re
import time
from dataclasses import replace

import pytest

from lightleak.errors import UserError
from lightleak.report import report
from lightleak.validity import ProbingVerdict
from report.page import Page, squeeze
from report.synthetic_probe import EXPOSED, FIRED, NOTHING, TARGET, write_probe_run

HOSTILE = (
    """<script>document.title="owned"</script>"><img src=x onerror='alert(1)'> $x_{ \u202eabc"""
)
MAKERS = {"exposed": EXPOSED, "no_evidence": NOTHING, "inconclusive": FIRED}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    made = {name: write_probe_run(folder / name, how) for name, how in MAKERS.items()}
    for run in made.values():
        report(run)
    return made


@pytest.fixture(params=sorted(MAKERS))
def judged(request, runs):
    """One run of each verdict: its verdict and page."""
    run = runs[request.param]
    verdict = ProbingVerdict.read(run.verdict_file)
    assert verdict.verdict == request.param
    return verdict, Page(run.report_file)


@pytest.fixture(scope="module")
def exposed(runs):
    return Page(runs["exposed"].report_file)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """The page on a model that somebody else fine-tuned, without what such a run need not have."""
    folder = tmp_path_factory.mktemp("target") / "run"
    return Page(report(write_probe_run(folder, TARGET, design="observational", extras=False)))


def drawn(page):
    """What the figures of a page show, in words."""
    return [squeeze(attrs["aria-label"]) for tag, attrs in page.tags if tag == "svg"]


def drawn_of(page, start):
    return [label for label in drawn(page) if label.startswith(start)]


def test_the_first_things_said_are_the_finding_its_tier_and_every_reason(judged):
    verdict, page = judged
    first_screen = page.text[: page.text.index("How it was decided")]
    tier = {"randomised": "Randomised.", "none": "None."}[verdict.tier]
    for said in (verdict.sentence, tier, *verdict.reasons):
        assert squeeze(said) in first_screen


def test_every_page_says_that_decodable_is_neither_used_nor_told_and_absence_not_shown(judged):
    _, page = judged
    limits = page.text[page.text.index("What this does not show") : page.text.index("How it was")]
    assert "Decodable is not used" in limits
    assert "Not decodable is not absent" in limits
    assert "not that anybody can make the model tell the details" in limits


def test_what_else_is_not_shown_is_said_for_each_verdict(runs):
    texts = {name: Page(run.report_file).text for name, run in runs.items()}
    limits = {
        "exposed": "Which details were kept, or whose.",
        "no_evidence": "Gains of less than 13 points at one layer, which may be missed.",
        "inconclusive": "This does not clear the model",
    }
    for name, limit in limits.items():
        assert [other for other, text in texts.items() if limit in text] == [name]


def test_the_tiles_set_what_is_inside_against_what_the_answers_show(exposed):
    inside = "Seen told from unseen, inside the model 80 % 95 % interval 74 % to 86 % chance: 50 %"
    assert f"{inside}; language layer 4, capture location" in exposed.text
    assert "Gain on the model before, in points +30 95 % interval +24 to +36" in exposed.text
    assert "p-value that counts 0.004 at most 0.05 rejects chance; rate 1, 33" in exposed.text
    told = "Seen details preferred in the answers 51 % 95 % interval 50 % to 52 % before:"
    assert told in exposed.text


def test_where_a_control_fires_no_number_counts(runs):
    page = Page(runs["inconclusive"].report_file)
    assert "inside the model none counts" in page.text
    assert "p-value that counts none" in page.text
    assert "failed Nothing is found where nothing can be In rate 0, seen can be told" in page.text


def test_a_control_that_nearly_fires_is_a_caution(tmp_path):
    conditions = [replace(EXPOSED[0], p_value=0.03), *EXPOSED[1:]]
    page = Page(report(write_probe_run(tmp_path / "run", conditions)))
    assert "caution Nothing is found where nothing can be In rate 0" in page.text


def test_a_planted_trace_that_is_missed_is_a_failure(tmp_path):
    conditions = [
        replace(each, p_value=0.4) if each.kind == "planted" else each for each in NOTHING
    ]
    page = Page(report(write_probe_run(tmp_path / "run", conditions)))
    assert "failed A trace that was planted on purpose is found In planted" in page.text


def test_each_model_has_its_row_of_evidence(exposed):
    best = "language layer 4, capture location of 33"
    numbers = "80 % 74 % to 86 % before: 50 % +30 +24 to +36 +30 +24 to +36 13 points"
    assert exposed.row("rate 1") == f"rate 1 asked about 0.002 0.004 {best} {numbers}"
    assert exposed.row("planted").startswith("planted planted: must be found 0.001 – ")
    assert exposed.row("pixels").startswith("pixels control: nothing to find 0.31 – pixels")


def test_what_cannot_be_found_at_all_is_not_given_as_a_gain(tmp_path):
    page = Page(report(write_probe_run(tmp_path / "run", NOTHING, detectable=1.0)))
    assert page.row("rate 1").endswith("none")
    assert "found in 9 of 10 audits: none." in page.text


def test_accuracy_is_drawn_by_layer_for_each_rate_the_model_before_and_the_controls(exposed):
    rates, controls = drawn_of(exposed, "Accuracy by layer")
    for name in ("before fine-tuning 50 %", "rate 0 ", "rate 0.5 ", "rate 1 "):
        assert name in rates
    assert re.search(
        r"rate 1 7\d\.?\d? % \(7\d\.?\d? % to 8\d\.?\d? %\) in language layer 4", rates
    )
    for name in ("planted ", "random weights ", "pixels 51 % (45 % to 57 %) in pixels"):
        assert name in controls
    assert all(label.endswith("Chance is 50 %.") for label in (rates, controls))


def test_gains_are_shown_by_question_with_those_beyond_chance_marked(exposed):
    half, whole = drawn_of(exposed, "Gain by layer and question")
    counts = [int(re.search(r"(\d+) of 33 stand out", label).group(1)) for label in (half, whole)]
    assert 0 < counts[0] < counts[1] < 33
    assert "the surest, language layer 4, capture location, by +30 points" in whole


def test_the_gain_is_shown_for_each_seed_alone(exposed):
    (label,) = drawn_of(exposed, "Gain where it is surest")
    assert "rate 1, all +30 (+24 to +36); seed 0 +26 (+15 to +37); seed 1 +30" in label


def test_the_published_probe_stands_beside_ours_for_models_that_saw_nobody_too(exposed):
    (label,) = drawn_of(exposed, "Accuracy of two probes of the same states")
    nobody = "rate 0, published 99 % (97 % to 99.9 %); rate 0, people held out 51 % (45 % to 57 %)"
    assert nobody in label
    assert "needs only to recognise their details again" in exposed.text


def test_states_are_drawn_before_and_after_and_name_nobody(exposed):
    labels = [*drawn_of(exposed, "PCA of"), *drawn_of(exposed, "t-SNE of")]
    models = ("before fine-tuning", "rate 0.5", "rate 1", "planted")
    assert sorted(labels) == sorted(
        f"{method} of the states of 400 images, seen and unseen, {model}."
        for method in ("PCA", "t-SNE")
        for model in models
    )
    assert "invented person" not in exposed.source


def test_gradients_are_compared_over_batch_sizes_and_layers(exposed):
    sizes = "0.500 0.425 to 0.575 0.713 0.670 to 0.756 0.835 0.810 to 0.860"
    assert exposed.row("watermark").startswith(f"watermark the details put on the images {sizes}")
    assert exposed.row("watermark").endswith("+0.050 +0.045 to +0.056")
    assert exposed.row("original").count("1.000 1.000 to 1.000") == 5
    (label,) = drawn_of(exposed, "How far the gradient is turned, from batches of 1 to 16")
    for comparison in ("watermark 0.5 to", "image 0.35", "text 0.6", "other batch 0.9"):
        assert comparison in label
    assert len(drawn_of(exposed, "How far the details turn the gradient of each layer")) == 1


def test_answers_and_the_task_are_shown_before_and_after(exposed):
    same = "1 % 0 % to 2 % 1 % 0 % to 2 % 51 % 50 % to 52 % 51 % 50 % to 52 %"
    answers = exposed.text[exposed.text.index("What the answers show") :]
    assert f"before fine-tuning {same} rate 0.5 {same} rate 1 {same}" in answers
    assert f"rate 1 username {same}" in answers
    assert "before fine-tuning 42 % 40 % to 44 % – rate 0.5 81 % 79 % to 83 % +39" in answers


def test_legibility_is_told_in_numbers(exposed):
    seen = "names the person in 62 % of the images, 95 % interval 57 % to 67 %; 2.5 % by chance."
    assert f"{seen} A line of text is 11 pixels high." in exposed.text


def test_people_are_called_invented_only_where_they_were_made_up_here(exposed, target):
    assert "The people are invented" in exposed.text
    assert "invented" not in target.text


def test_a_model_that_somebody_else_tuned_has_a_page_without_what_was_not_run(target):
    assert "Gain on chance, in points +25" in target.text
    assert "The model before fine-tuning was not given" in target.text
    assert "not run A trace that was planted on purpose is found" in target.text
    absent = ("Whether the task is done as well", "The states, drawn", "How far details turn")
    assert not [title for title in absent if title in target.text]
    (curves,) = drawn_of(target, "Accuracy by layer")
    assert all(name in curves for name in ("target ", "pixels "))


@pytest.mark.parametrize("missing", ["probes.parquet", "output_view.parquet"])
def test_a_run_that_lacks_a_needed_file_is_refused(tmp_path, missing):
    run = write_probe_run(tmp_path / "run", TARGET, extras=False)
    (run.folder / missing).unlink()
    with pytest.raises(UserError, match=missing):
        report(run)


def test_an_image_is_embedded_only_when_asked_for(tmp_path):
    run = write_probe_run(tmp_path / "run", TARGET, extras=False, example=True)
    assert not [tag for tag, _ in Page(report(run)).tags if tag == "img"]
    shown = Page(report(run, show_images=True))
    (source,) = [attrs["src"] for tag, attrs in shown.tags if tag == "img"]
    assert source.startswith("data:image/jpeg;base64,")


def test_failures_are_listed(tmp_path):
    failed = {"id": "seen/p03-07-age", "stage": "states", "error": "it is truncated"}
    page = Page(report(write_probe_run(tmp_path / "run", TARGET, extras=False, failures=[failed])))
    assert page.row("p03-07-age") == "p03-07-age seen states it is truncated"
    assert "caution All images count" in page.text


def test_names_never_become_markup_or_formulas(tmp_path):
    conditions = [replace(each, name=f"{HOSTILE}{i}") for i, each in enumerate(EXPOSED)]
    failed = {"id": f"seen/{HOSTILE}", "stage": "states", "error": HOSTILE}
    run = write_probe_run(tmp_path / "run", conditions, failures=[failed], target=HOSTILE)
    page = Page(report(run))
    assert squeeze(HOSTILE) in page.text
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "iframe", "object", "link", "img"} & set(tags)
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_a_large_model_makes_a_page_that_can_still_be_sent(tmp_path):
    run = write_probe_run(tmp_path / "run", EXPOSED, blocks=40)
    started = time.process_time()
    page = Page(report(run))
    assert time.process_time() - started < 10
    assert len(page.source) < 1_500_000


def test_the_same_run_gives_the_same_page_that_fetches_nothing(runs):
    run = runs["exposed"]
    before = run.report_file.read_bytes()
    assert report(run.folder).read_bytes() == before
    page = Page(run.report_file)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    loading = ("src", "href", "xlink:href", "srcset", "action", "data")
    fetched = [a[n] for _, a in page.tags for n in loading if not (a.get(n) or "#").startswith("#")]
    assert fetched == []
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
