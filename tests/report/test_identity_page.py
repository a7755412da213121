"""The page of an identity audit says whom the model knows, and shows nobody's face unasked."""

import json
import re
import time
from io import BytesIO
from urllib.request import urlopen

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lightleak.errors import UserError
from lightleak.report import report
from lightleak.report.contents import blurred
from lightleak.validity import IdentityVerdict
from report.page import Page, squeeze
from report.synthetic_people import write_people_run

HOSTILE = """<script>document.title="owned"</script>"><img src=x onerror='alert(1)'> \u202eabc"""
MAKERS = {
    "exposed": {"sets": {"suspect": 12, "control": 20}, "known": 6, "namesakes": 1},
    "no_evidence": {"sets": {"suspect": 12, "known": 12, "control": 20}},
    "inconclusive": {"sets": {"suspect": 12, "control": 20}, "known": 6, "fired": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    made = {name: write_people_run(folder / name, **how) for name, how in MAKERS.items()}
    for run in made.values():
        report(run)
    return made


@pytest.fixture(params=sorted(MAKERS))
def judged(request, runs):
    """One run of each verdict: its verdict and page."""
    run = runs[request.param]
    verdict = IdentityVerdict.read(run.verdict_file)
    assert verdict.verdict == request.param
    return verdict, Page(run.report_file)


@pytest.fixture(scope="module")
def exposed(runs):
    return Page(runs["exposed"].report_file)


def test_the_first_things_said_are_the_finding_its_tier_and_every_reason(judged):
    verdict, page = judged
    first_screen = page.text[: page.text.index("How it was decided")]
    tier = {"observational": "Observational.", "none": "None."}[verdict.tier]
    for said in (verdict.sentence, tier, *verdict.reasons):
        assert squeeze(said) in first_screen


def test_what_is_not_shown_is_said_for_each_verdict(runs):
    texts = {name: Page(run.report_file).text for name, run in runs.items()}
    limits = {
        "exposed": "Which photos were used. Those shown to the model need not be among them.",
        "no_evidence": "That their photos were not used without their names",
        "inconclusive": "This does not clear the model",
    }
    for name, limit in limits.items():
        assert [other for other, text in texts.items() if limit in text] == [name]


def test_the_tiles_give_counts_with_intervals(exposed):
    assert "People found 6 of 12 95 % interval 21.1 % to 78.9 %" in exposed.text
    named = "Names known, perhaps a namesake's 7 of 12 smallest q-value of a name 0.0017"
    assert named in exposed.text
    control = "0 % 0 of 20, 95 % interval 0 % to 16.8 %; people known to be out"
    assert f"False alarms in a control, p at most 0.05 {control}" in exposed.text
    assert "Decoys for each person 999 no p-value below 0.001" in exposed.text


def test_the_table_tells_people_found_from_namesakes_and_from_the_rest(exposed):
    known = "4 0.001 0.001 0.002 2 of 3 member member"
    assert exposed.row("Suspect Number 0") == f"Suspect Number 0 p0 ✓ found {known}"
    assert "p6 name only 4 0.001 0.5 0.86 0 of 3 no no" in exposed.row("Suspect Number 6")
    assert "p7 not found" in exposed.row("Suspect Number 7")
    assert "p0 – 4 0.068 0.5 –" in exposed.row("Control Number 0")


def test_where_a_control_fires_nobody_is_named(runs):
    page = Page(runs["inconclusive"].report_file)
    assert "does not count" in page.row("Suspect Number 0")
    assert "✓" not in page.text
    assert "People found none counts" in page.text
    assert "Names known, perhaps a namesake's none counts" in page.text
    title = "The test finds no more than chance where nothing can be found"
    assert f"failed {title} Negative control, people" in page.text
    assert "It names nobody." in page.text


def test_the_heat_map_gives_each_template_its_share_of_the_photos(exposed):
    assert exposed.row("✓ Suspect Number 0") == "✓ Suspect Number 0 100 75 2"
    header = next(row for row in map(squeeze, exposed.rows) if "the name alone" in row)
    assert header == "Person the name alone a photo of … … in a suit templates that recognise"
    shades = [attrs.get("style") for tag, attrs in exposed.tags if tag == "td"]
    assert (shades.count("--s:100"), shades.count("--s:75")) == (6, 6)


def test_the_true_name_is_drawn_where_it_lies_among_the_decoys(runs, exposed):
    statistics = pq.read_table(runs["exposed"].decoys_file)["statistics"][0].as_py()
    best = max(statistics)
    label = next(a["aria-label"] for _, a in exposed.tags if a.get("class") == "track")
    assert label.startswith("True name 0.7; 95 % of the decoys at most ")
    assert label.endswith(f"the best {best:.4g}")
    strip = exposed.source[exposed.source.index('class="track"') :]
    left, width = re.search(r'class="all" style="left:(.*?)%;width:(.*?)%"', strip).groups()
    true = re.search(r'class="true found" style="left:(.*?)%"', strip).group(1)
    assert float(left) + float(width) < float(true) <= 100


def drawn(page):
    """What the figures of a page show, in words."""
    return [squeeze(attrs["aria-label"]) for tag, attrs in page.tags if tag == "svg"]


def test_each_set_has_its_curve_by_three_rules(runs):
    for name, run in runs.items():
        labels = drawn(Page(run.report_file))
        curves = [label for label in labels if ", with 3 photos: p-value " in label]
        assert len(curves) == len(MAKERS[name]["sets"])
        assert "Controls: people wrongly found, with 3 photos: p-value 3 %" in curves[-1]
        assert all("published" in label and "majority" in label for label in curves)


def test_each_negative_control_stands_with_its_rate_tests_and_plot(exposed):
    row = exposed.row("people known to be out")
    assert row == "people known to be out 0 of 20 95 % interval 0 % to 16.8 % 0.61 0.37 passed"
    other = exposed.row("photos under somebody else's name")
    assert other.endswith("0.61 – passed")
    assert "20 p-values of people known to be out: 0 % are at most 0.05." in drawn(exposed)
    assert "the curve belongs below" in exposed.text


def test_the_published_rule_is_shown_with_its_want_of_error_control(exposed):
    assert "This rule has no error control: with 3 templates there are 3 chances" in exposed.text
    row = exposed.row("Published at least 1 of 3 templates")
    assert "6 of 12 95 % interval 21.1 % to 78.9 % 0 of 20 95 % interval 0 % to 16.8 %" in row


def test_what_limits_the_decoys_is_a_caution(tmp_path):
    warned = {"sets": {"suspect": 3, "control": 20}, "warnings": ["Invented names stand in."]}
    page = Page(report(write_people_run(tmp_path / "run", **warned)))
    assert "caution Decoys are of the kind of the true names Invented names stand in." in page.text
    assert "passed A name can be told from a namesake's" in page.text


def test_failures_are_told_by_set(tmp_path):
    failures = [("suspect/marie/1.png", "photo", "it is truncated"), ("control/x", "person", "?")]
    run = write_people_run(tmp_path / "run", sets={"suspect": 2}, failures=failures)
    page = Page(report(run))
    assert page.row("marie/1.png") == "marie/1.png suspect photo it is truncated"
    assert "person, control 1" in page.text


def test_one_person_without_controls_makes_a_page_that_says_what_is_missing(tmp_path):
    page = Page(report(write_people_run(tmp_path / "run", sets={"suspect": 1}, known=1)))
    assert "The model knows the name." in page.text
    alarms = "False alarms in a control, p at most 0.05"
    assert f"{alarms} not known no negative control was run" in page.text
    assert "failed A name can be told from a namesake's" in page.text
    assert "name only" in page.row("Suspect Number 0")


def test_too_few_decoys_are_said_to_name_nobody(tmp_path):
    run = write_people_run(tmp_path / "run", sets={"suspect": 12, "control": 9}, decoys=19)
    page = Page(report(run))
    assert "19 for each person: enough to name one" not in page.text
    assert "12 must be found at once" in page.text


def test_names_in_any_script_are_shown_and_never_become_markup(tmp_path):
    names = {"suspect/p0": HOSTILE, "suspect/p1": "محمد الأمين", "suspect/p2": "王" * 5000}
    failures = [(f"suspect/{HOSTILE}", "photo", HOSTILE)]
    run = write_people_run(
        tmp_path / "run",
        sets={"suspect": 3, "control": 20},
        known=3,
        names=names,
        failures=failures,
        warnings=[HOSTILE],
        photos=tmp_path,
    )
    page = Page(report(run))
    assert squeeze(HOSTILE) in page.text
    assert '<bdi dir="auto">محمد الأمين</bdi>' in page.source
    assert "王" * 100 not in page.source
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "iframe", "object", "link"} & set(tags)
    assert tags.count("b") == 1  # our own, in the header
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def pictures(page):
    """The pictures that a page embeds."""
    found = []
    for tag, attrs in page.tags:
        if tag == "img":
            with urlopen(attrs["src"]) as stream:
                found.append(Image.open(BytesIO(stream.read())))
    return found


def test_faces_are_embedded_only_when_asked_for(tmp_path):
    sets = {"suspect": 2, "control": 2}
    run = write_people_run(tmp_path / "run", sets=sets, photos=tmp_path)
    (tmp_path / "suspect" / "p0" / "1.png").unlink()
    shown = pictures(Page(report(run)))
    assert len(shown) == 15
    assert {max(each.size) for each in shown} == {7}
    asked = pictures(Page(report(run, show_images=True)))
    assert {(each.format, each.size) for each in asked} == {("JPEG", (80, 96))}
    assert "cannot be read" in Page(run.report_file).text


def test_a_blurred_photo_carries_its_averages_and_nothing_else(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (140, 70, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    stowaway = Image.Exif()
    stowaway[0x010E] = "a description with the face in it" * 20
    file = tmp_path / "face.jpg"
    photo.save(file, icc_profile=b"face" * 99, exif=stowaway, comment="face" * 99, quality=95)
    with urlopen(blurred(str(file))) as stream:
        encoded = stream.read()
    small = Image.open(BytesIO(encoded))
    small.load()
    assert (small.size, small.info) == ((4, 7), {})
    assert len(encoded) < 250
    with Image.open(file) as whole:
        stored = np.asarray(whole.convert("RGB"), dtype=float)
    corner = stored[:20, :17].mean(axis=(0, 1))
    assert np.abs(np.asarray(small)[0, 0] - corner).max() < 6


def test_many_people_are_cut_for_room_and_that_is_said(tmp_path):
    run = write_people_run(
        tmp_path / "run", sets={"suspect": 60, "control": 60}, known=30, photos=tmp_path
    )
    started = time.monotonic()
    page = Page(report(run, show_images=True))
    assert time.monotonic() - started < 10
    assert len(page.source) < 2_000_000
    assert sum(a.get("class") == "track" for _, a in page.tags) == 40
    assert "40 of the suspects, 40 of the controls; see decoys.parquet" in page.text
    assert "The first 40 of 120 people." in page.text


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


def test_a_run_of_a_kind_without_a_page_is_refused(tmp_path):
    run = write_people_run(tmp_path / "run", sets={"suspect": 1})
    run.manifest_file.write_text(json.dumps({**run.manifest(), "kind": "tarot"}))
    with pytest.raises(UserError, match="no page is known for a run of the kind 'tarot'"):
        report(run)
