"""A gate trips where its condition holds or cannot be computed; mistakes in it are said early."""

import json
from xml.etree import ElementTree

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from lightleak.cli.gate import finish, parse
from lightleak.errors import UserError
from lightleak.validity import IdentityVerdict, ProbingVerdict, Verdict
from report import synthetic_run
from report.synthetic_people import write_people_run
from report.synthetic_probe import EXPOSED, write_probe_run

MISTAKES = {
    "exposd": "Did you mean exposed?",
    "verdict == exposd": "Did you mean exposed?",
    "verdct == exposed": "Did you mean verdict?",
    "tier == held-out": "are understood",
    "tier in (randomised, heldout)": "Did you mean held_out?",
    "primary.acu > 0.6": "Did you mean auc?",
    "primry.auc > 0.6": "Did you mean primary?",
    "signals.los.auc > 0.6": "Did you mean loss?",
    "primary.auc > high": "primary.auc is a number, and high is a word",
    "verdict > 0.5": "verdict is a word, and 0.5 is a number",
    "tier > held_out": "neither above nor below",
    "primary > 0.5": "Name a part of it",
    "primary.auc": "no condition",
    "primary.auc_ci95[2] > 0.5": "no such part",
    "primary.auc > True": "are understood",
    "primary.auc is 1": "are understood",
    "primary.auc + 1 > 1.6": "are understood",
    "verdict = exposed": "cannot be read",
    "": "cannot be read",
    "(" * 500: "cannot be read",
    "not " * 9000 + "exposed": "cannot be read",
    "__import__('os').abort()": "are understood",
    "verdict.__class__ == exposed": "no such part",
    "primary.__class__.__mro__[0] == x": "unknown",
    "(lambda: exposed)()": "are understood",
    "[each for each in signals]": "are understood",
    "f'{verdict}' == exposed": "are understood",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic_run.exposed(tmp_path_factory.mktemp("gate") / "run", records=60)


@pytest.fixture(scope="module")
def verdict(run):
    """Exposed, held-out, AUC about 0.75; no share of the suspects could be estimated."""
    found = Verdict.read(run.verdict_file).model_copy(update={"prevalence": None})
    assert (found.verdict, found.tier) == ("exposed", "held_out")
    assert 0.65 < found.primary.auc < 0.85
    return found


@pytest.mark.parametrize(
    "expression",
    [
        "exposed",
        "inconclusive or exposed",
        "verdict == exposed",
        "verdict != no_evidence",
        "verdict == 'exposed'",
        "not inconclusive",
        "primary.auc > 0.6 and tier in (randomised, held_out)",
        "tier in (held_out)",
        "tier not in (randomised, observational)",
        "0.6 < primary.auc <= 1",
        "primary.auc > -1",
        "primary.auc_ci95[0] > validity.blind_auc",
        'signals["loss"].tpr_at_fpr["0.05"].tpr > 0',
        "primary.p_value <= cutoffs.alpha",
        "primary.signal == loss",
    ],
)
def test_a_gate_trips_where_its_condition_holds_and_not_where_its_contrary_does(
    verdict, expression
):
    assert parse(expression, Verdict).trips(verdict)
    assert parse(f"not ({expression})", Verdict).trips(verdict) is None


def test_the_reason_names_what_was_read(verdict):
    reason = parse("primary.auc > 0.6 and exposed", Verdict).trips(verdict)
    assert reason == f"primary.auc is {verdict.primary.auc:.4g}, verdict is exposed"


@pytest.mark.parametrize(
    "expression",
    [
        "prevalence.ci95[0] > 0.2",
        "not prevalence.ci95[0] > 0.2",
        "prevalence.estimate in (0, 1)",
        "exposed and prevalence.ci95[0] > 0.2",
        "inconclusive or prevalence.ci95[0] > 0.2",
        "validity.duplicate_pairs[0].kind == text",
    ],
)
def test_what_cannot_be_computed_trips(verdict, expression):
    reason = parse(expression, Verdict).trips(verdict)
    assert "is null" in reason
    assert "cannot be computed" in reason


def test_a_null_that_could_not_change_the_answer_does_not_trip(verdict):
    assert parse("inconclusive and prevalence.ci95[0] > 0.2", Verdict).trips(verdict) is None


@pytest.mark.parametrize(("expression", "said"), MISTAKES.items(), ids=[*range(len(MISTAKES))])
def test_a_mistake_is_a_users_error_before_there_is_a_verdict(expression, said):
    with pytest.raises(UserError, match="--fail-if") as mistake:
        parse(expression, Verdict)
    assert said in str(mistake.value)


WORDS = "exposed verdict primary . auc [ 0 1 ] ( ) , > == != in not and or - + : lambda = 'x' ~"


@given(st.one_of(st.text(), st.lists(st.sampled_from(WORDS.split())).map(" ".join)))
def test_no_text_does_anything_but_be_understood_or_refused(verdict, text):
    try:
        gate = parse(text, Verdict)
    except UserError:
        return
    gate.trips(verdict)


def test_names_are_those_of_the_audit(tmp_path):
    people = write_people_run(tmp_path / "p", sets={"suspect": 12, "control": 20}, known=6)
    found = IdentityVerdict.read(people.verdict_file)
    assert parse("suspects.count > 0", IdentityVerdict).trips(found)
    probe = ProbingVerdict.read(write_probe_run(tmp_path / "t", EXPOSED).verdict_file)
    assert parse("conditions[0].p_value <= 1", ProbingVerdict).trips(probe)
    with pytest.raises(UserError):
        parse("primary.auc > 0.6", IdentityVerdict)


def test_a_tripped_gate_ends_with_3_and_a_line_after_the_files_are_written(
    verdict, run, tmp_path, capfd
):
    files = tmp_path / "junit.xml", tmp_path / "log.sarif"
    gates = [parse(each, Verdict) for each in ("primary.auc > 0.6", "inconclusive")]
    with pytest.raises(typer.Exit) as ended:
        finish(verdict, run.folder, gates, *files)
    assert ended.value.exit_code == 3
    auc = f"{verdict.primary.auc:.4g}"
    said = f"lightleak: --fail-if primary.auc > 0.6: tripped, primary.auc is {auc}\n"
    assert capfd.readouterr().err == said
    cases = ElementTree.parse(files[0]).iter("testcase")
    gates = {
        each.get("name"): each.find("failure") for each in cases if "gate" in each.get("classname")
    }
    assert gates["primary.auc > 0.6"].get("message") == f"primary.auc is {auc}"
    assert gates["inconclusive"] is None
    assert json.loads(files[1].read_text())["version"] == "2.1.0"


def test_without_a_tripped_gate_nothing_is_said(verdict, run, capfd):
    finish(verdict, run.folder, [parse("no_evidence", Verdict)], None, None)
    assert capfd.readouterr().err == ""
