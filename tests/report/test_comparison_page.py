"""Several audits on one page: their numbers as they are, and what forbids comparing them."""

import csv
import json

import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from lightleak.cli.compare import compare as command
from lightleak.errors import UserError
from lightleak.report.comparison import compare
from lightleak.validity import Cutoffs, Verdict
from lightleak.validity.verdict import (
    Coverage,
    PowerFinding,
    Prevalence,
    PrimaryFinding,
    SideCoverage,
    SignalFinding,
    ValidityFinding,
)
from report.page import Page, squeeze

KNOWN = Prevalence(estimate=0.48, ci95=(0.39, 0.57), method="known members")
BOUND = Prevalence(estimate=None, ci95=(0.21, 1.0), method="lower bound")


def signal(auc, prevalence):
    """What one signal found."""
    return SignalFinding(
        auc=auc,
        auc_ci95=(auc - 0.04, auc + 0.04),
        tpr_at_fpr={},
        tpr_at_fpr_reason={},
        p_value=0.002,
        prevalence=prevalence,
        orientation="higher = more member-like",
        n_unscorable=0,
        source="",
        options={},
        p_value_holm=0.004,
    )


def write_run(folder, *, aucs=(0.71, 0.66), prevalence=KNOWN, blind=0.5, finished=True, **changes):
    """The two files of a finished audit that a comparison reads."""
    names = ("loss", "mink")
    refused = blind >= 0.9
    scored = SideCoverage(attempted=400, scored=400, failed=0)
    found = dict(zip(names, (signal(auc, prevalence) for auc in aucs), strict=True))
    primary = changes.pop("primary", "loss")
    verdict = Verdict(
        verdict="inconclusive" if refused else "exposed",
        tier="none" if refused else changes.pop("tier", "held_out"),
        reasons=[],
        primary=PrimaryFinding(
            signal=primary,
            auc=found[primary].auc,
            auc_ci95=found[primary].auc_ci95,
            p_value=0.002,
            p_value_adjusted=0.0073,
            test="permutation",
            tests={},
            robustness=0.12,
            n_suspect=400,
            n_control=399,
        ),
        signals=found,
        validity=ValidityFinding(
            blind_auc=blind,
            blind_auc_ci95=(blind - 0.03, blind + 0.03),
            blind_p_value=0.4,
            effective_share=None,
            blind={},
            differences=[],
            duplicates=0,
            duplicate_pairs=[],
            power=PowerFinding(min_detectable_auc=0.57, suspect_groups=400, control_groups=399),
            controls=[],
        ),
        prevalence=prevalence,
        dataset_inference=None,
        coverage=Coverage(attempted=800, scored=800, failed=0, suspect=scored, control=scored),
        cutoffs=Cutoffs(alpha=changes.pop("alpha", 0.01)),
    )
    manifest = {
        "kind": changes.pop("kind", "membership"),
        "command": "lightleak audit",
        "settings": {"protocol": "split", "options": {}},
        "target": {"name": changes.pop("target", "kettle-7b"), "dtype": "torch.float32"},
        "hashes": {
            "suspect records": changes.pop("suspects", "9d43"),
            "control records": "77aa",
            "member records": "01cd",
        },
        "versions": {"lightleak": changes.pop("version", "0.1.0")},
        "started": "2030-01-02T03:04:05+00:00",
        "finished": "2030-01-02T03:14:05+00:00" if finished else None,
    }
    assert not changes
    folder.mkdir()
    (folder / "verdict.json").write_text(verdict.model_dump_json(), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.fixture
def generations(tmp_path):
    """Three audits of a model as it grew."""
    return [
        write_run(tmp_path / "small", aucs=(0.55, 0.52), prevalence=BOUND, target="kettle-1b"),
        write_run(tmp_path / "middle", target="kettle-7b"),
        write_run(tmp_path / "large", blind=0.93, prevalence=None, target="kettle-70b"),
    ]


def figures(page):
    """What the two drawings say to those who cannot see them."""
    return [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]


def test_an_estimate_a_lower_bound_and_neither_are_told_apart(generations, tmp_path):
    page = Page(compare(generations, tmp_path / "page.html"))
    shares, _ = figures(page)
    assert "loss (primary), small: at least 21 %" in squeeze(shares)
    assert "loss (primary), middle: 48 %, 39 % to 57 %" in squeeze(shares)
    assert "loss (primary), large: not estimated: the sets differ by themselves" in squeeze(shares)
    assert "≥ 21 %" in squeeze(page.source)
    assert page.row("large").count("not estimated: the sets differ by themselves") == 1


def test_a_share_of_which_nothing_is_known_is_no_half(tmp_path):
    unknown = Prevalence(estimate=0.5, ci95=(0, 1), method="known members")
    runs = [write_run(tmp_path / "a", prevalence=unknown), write_run(tmp_path / "b")]
    page = Page(compare(runs, tmp_path / "page.html"))
    assert "loss (primary), a: nothing can be told" in figures(page)[0]
    assert "50 %" not in squeeze(page.row("a kettle"))


def test_rows_stand_in_the_order_given_with_verdict_numbers_and_blind_baseline(
    generations, tmp_path
):
    page = Page(compare(generations[::-1], tmp_path / "page.html"))
    rows = [row for row in map(squeeze, page.rows) if " kettle-" in row and "400 + 399" in row]
    assert [row.split()[0] for row in rows] == ["large", "middle", "small"]
    assert "Exposed Held-out" in rows[1]
    assert "0.710 0.670 to 0.750 loss 0.500 0.470 to 0.530" in rows[1]
    assert "Inconclusive None" in rows[0]
    assert "Exposed: middle and small. Inconclusive: large." in page.text


def test_the_p_value_is_the_one_that_the_verdict_rests_on(generations, tmp_path):
    page = Page(compare(generations, tmp_path / "page.html"))
    assert page.row("middle").endswith("0.0073")  # A hold-out asks both tests to reject.
    assert page.row("large").endswith("none")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"suspects": "other"}, "failed Not the same suspects a against b. "),
        ({"primary": "mink"}, "failed Not the same primary signal a (loss) against b (mink). "),
        ({"tier": "randomised"}, "caution Not the same evidence tier a (held-out) against b"),
        ({"version": "0.2.0"}, "Not the same version of lightleak a (0.1.0) against b (0.2.0). "),
        ({"prevalence": BOUND}, "way to the share a (known members) against b (lower bound). "),
        ({"alpha": 0.05}, "caution Not the same cut-offs a against b. "),
        ({"suspects": None}, "not possible Perhaps not the same suspects"),
    ],
)
def test_what_forbids_comparing_is_said_before_any_number(tmp_path, change, said):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", **change)]
    page = Page(compare(runs, tmp_path / "page.html"))
    assert said in page.text[: page.text.index("How much was used")]
    alike = [write_run(tmp_path / "c"), write_run(tmp_path / "d", target="another")]
    assert "Not the same" not in Page(compare(alike, tmp_path / "alike.html")).text


def test_the_table_for_further_work_has_a_row_a_run_and_signal(generations, tmp_path):
    files = {"csv": tmp_path / "t.csv", "parquet": tmp_path / "t.parquet"}
    compare(generations, tmp_path / "page.html", labels=["1", "7", "70"], **files)
    rows = pq.read_table(files["parquet"]).to_pylist()
    assert [(row["run"], row["signal"]) for row in rows] == [
        (run, name) for run in ("1", "7", "70") for name in ("loss", "mink")
    ]
    small, middle, large = rows[::2]
    assert (small["prevalence"], small["prevalence_low"]) == (None, 0.21)
    assert (middle["prevalence"], middle["prevalence_method"]) == (0.48, "known members")
    assert (large["prevalence_low"], large["counting_p_value"]) == (None, None)
    assert middle["counting_p_value"] == 0.0073
    with files["csv"].open(encoding="utf-8") as stream:
        read = list(csv.DictReader(stream))
    assert [row["auc"] for row in read] == [str(row["auc"]) for row in rows]


def test_a_hostile_name_is_text_and_the_page_carries_no_script(tmp_path):
    hostile = """<script>x</script>"><img src=x onerror='alert(1)'> $\\frac$"""
    runs = [write_run(tmp_path / "a", target=hostile), write_run(tmp_path / "b")]
    page = Page(compare(runs, tmp_path / "page.html", labels=[hostile, "b"]))
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert "<script>x</script>" in page.text
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_same_runs_give_the_same_page(generations, tmp_path):
    first = compare(generations, tmp_path / "1.html").read_bytes()
    assert compare(generations, tmp_path / "2.html").read_bytes() == first


def test_runs_that_cannot_be_compared_are_refused_in_one_line(tmp_path):
    good = write_run(tmp_path / "a")
    (tmp_path / "deep").mkdir()
    cases = {
        "two runs or more are wanted": [good],
        "manifest.json is missing": [good, tmp_path / "nowhere"],
        "this run is given twice": [good, tmp_path / "deep" / ".." / "a"],
        "two runs are called 'a'": [good, write_run(tmp_path / "deep" / "a")],
        "this run is not finished": [good, write_run(tmp_path / "b", finished=False)],
        "only membership audits are compared": [good, write_run(tmp_path / "c", kind="identity")],
    }
    for said, runs in cases.items():
        with pytest.raises(UserError, match=said):
            compare(runs, tmp_path / "page.html")
    with pytest.raises(UserError, match=r"1 label\(s\) for 2 runs"):
        compare([good, tmp_path / "b"], tmp_path / "page.html", labels=["one"])
    assert not (tmp_path / "page.html").exists()


def test_the_command_writes_page_and_table(generations, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(command)
    labels = [part for name in ("1B", "7B", "70B") for part in ("--label", name)]
    done = CliRunner().invoke(app, [*map(str, generations), *labels, "--csv", "t.csv"])
    assert done.exit_code == 0, done.output
    assert "48 %, 39 % to 57 %" in squeeze(done.output)
    assert Page(tmp_path / "compare.html").row("70B")
    assert (tmp_path / "t.csv").read_text(encoding="utf-8").count("7B") == 2


def test_a_comparison_never_takes_the_place_of_what_it_compares(generations, tmp_path):
    inside = generations[0] / "report.html"
    for given in (
        {"out": inside},
        {"out": tmp_path},
        {"out": tmp_path / "page.html", "csv": tmp_path / "page.html"},
    ):
        with pytest.raises(UserError, match=r"run folder|a folder|one file"):
            compare(generations, **given)
    assert not inside.is_file()
