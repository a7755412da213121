"""Build servers and code scanning read the same finding as people do."""

import shutil
from xml.etree import ElementTree

import pytest
from pydantic_sarif.model import StaticAnalysisResultsFormatSarifVersion210JsonSchema as SarifLog

from lightleak.report.formats import checks, junit, sarif
from lightleak.runs import Run, write_json
from lightleak.validity import IdentityVerdict, ProbingVerdict, Verdict
from report import synthetic_run
from report.synthetic_people import write_people_run
from report.synthetic_probe import EXPOSED, FIRED, NOTHING, write_probe_run

SETS = {"suspect": 12, "known": 12, "control": 20}
MAKERS = {
    "exposed": (60, {"sets": SETS, "known": 6}, EXPOSED),
    "no_evidence": (230, {"sets": SETS}, NOTHING),
    "inconclusive": (60, {"sets": SETS, "known": 6, "fired": True}, FIRED),
}
HOSTILE = "</failure>]]> \"quoted\" & 'so' \x00\x1b[31m\ud800\ufffe <b>"


def with_subject(run, name, subject):
    """The run as if it had been asked about something of this name."""
    manifest = run.manifest()
    manifest["settings"][name] = str(subject)
    write_json(run.manifest_file, manifest)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By finding, a verdict and its run for each kind of audit, membership first."""
    made = {}
    for name, (records, people, conditions) in MAKERS.items():
        folder = tmp_path_factory.mktemp(name)
        membership = getattr(synthetic_run, name)(folder / "membership", records=records)
        identity = write_people_run(folder / "people", **people)
        probing = write_probe_run(folder / "probe", conditions)
        made[name] = [
            (Verdict.read(membership.verdict_file), membership),
            (
                IdentityVerdict.read(identity.verdict_file),
                with_subject(identity, "people", "photos"),
            ),
            (ProbingVerdict.read(probing.verdict_file), with_subject(probing, "data", "vqa.jsonl")),
        ]
    return made


@pytest.fixture(params=sorted(MAKERS))
def judged(request, runs):
    assert {verdict.verdict for verdict, _ in runs[request.param]} == {request.param}
    return request.param, runs[request.param]


@pytest.fixture
def exposed(runs, tmp_path):
    """One that may be changed."""
    verdict, run = runs["exposed"][0]
    return verdict, Run(shutil.copytree(run.folder, tmp_path / "run"))


def test_only_no_evidence_passes_as_a_test(judged):
    name, found = judged
    outcome = {"exposed": "failure", "inconclusive": "error", "no_evidence": "system-out"}[name]
    for verdict, run in found:
        suite = ElementTree.fromstring(junit(verdict, run, {})).find("testsuite")
        assert [each.tag for each in suite.find("testcase")] == [outcome]
        said = suite.find(f"testcase/{outcome}")
        assert verdict.sentence in said.get("message", said.text)
        assert all(reason in said.text for reason in verdict.reasons)
        counts = {each: int(suite.get(each)) for each in ("tests", "failures", "errors", "skipped")}
        assert counts == {
            "tests": len(suite.findall("testcase")),
            "failures": len(suite.findall("testcase/failure")),
            "errors": len(suite.findall("testcase/error")),
            "skipped": len(suite.findall("testcase/skipped")),
        }
        if name == "no_evidence":
            assert counts["failures"] == counts["errors"] == 0


def test_every_check_of_the_page_is_a_test_and_one_not_run_is_skipped(judged):
    marks = {"failed": "failure", "not possible": "error", "not run": "skipped"}
    for verdict, run in judged[1]:
        suite = ElementTree.fromstring(junit(verdict, run, {}))
        cases = [each for each in suite.iter("testcase") if "validity" in each.get("classname")]
        told = [(each.get("name"), each[0].tag) for each in cases]
        assert told == [(each.name, marks.get(each.mark, "system-out")) for each in checks(run)]


def test_texts_of_strangers_stay_texts(exposed):
    verdict, run = exposed
    hostile = verdict.model_copy(update={"reasons": [HOSTILE]})
    suite = ElementTree.fromstring(junit(hostile, run, {HOSTILE: HOSTILE}).encode())
    legal = HOSTILE
    for character in "\x00\x1b\ud800\ufffe":
        legal = legal.replace(character, "\ufffd")
    assert suite.find(".//testcase/failure").text == legal
    gate = suite.findall(".//testcase")[-1]
    assert (gate.get("name"), gate.find("failure").get("message")) == (legal, legal)


def test_a_log_follows_the_standard_and_holds_the_finding(judged):
    name, found = judged
    level = {"exposed": "error", "inconclusive": "warning", "no_evidence": "note"}[name]
    for verdict, run in found:
        log = sarif(verdict, run)
        SarifLog.model_validate(log)
        (only,) = log["runs"]
        (result,) = only["results"]
        assert result["level"] == level
        assert only["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        for said in (verdict.sentence, *verdict.reasons):
            assert said in result["message"]["text"]
        assert result["properties"]["tier"] == verdict.tier
    verdict, _ = found[0]
    assert sarif(*found[0])["runs"][0]["results"][0]["properties"]["auc"] == verdict.primary.auc


def test_a_result_lies_at_the_suspects_and_tells_no_path_outside(exposed, tmp_path, monkeypatch):
    def uri(suspect):
        log = sarif(verdict, with_subject(run, "suspect", suspect))
        (artifact,) = log["runs"][0]["artifacts"]
        return artifact["location"]["uri"]

    verdict, run = exposed
    monkeypatch.chdir(tmp_path)
    assert uri("data/my records.jsonl") == "data/my%20records.jsonl"
    assert uri(tmp_path / "data" / "mine.jsonl") == "data/mine.jsonl"
    assert uri("../secret/place/mine.jsonl") == "mine.jsonl"


def test_the_same_question_asked_again_is_the_same_result(runs, exposed):
    def fingerprints(verdict, run):
        return sarif(verdict, run)["runs"][0]["results"][0]["partialFingerprints"]

    verdict, run = exposed
    before = fingerprints(verdict, run)
    assert fingerprints(*runs["no_evidence"][0]) == before
    assert fingerprints(verdict, with_subject(run, "suspect", "others.jsonl")) != before
