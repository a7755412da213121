"""A judged run for other programs: JUnit XML for build servers, SARIF for code scanning."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from lightleak import __version__
from lightleak.report import identity, membership, probing
from lightleak.report.words import Check
from lightleak.runs import Run
from lightleak.runs.folder import fingerprint
from lightleak.validity import IdentityVerdict, ProbingVerdict, Verdict
from lightleak.validity.verdict import BaseVerdict

# What becomes of a test case; what is not named passes. Nothing unknown may read as a pass.
_OUTCOMES = {
    "exposed": "failure",
    "inconclusive": "error",
    "failed": "failure",
    "not possible": "error",
    "not run": "skipped",
}
_LEVELS = {"exposed": "error", "inconclusive": "warning", "no_evidence": "note"}
_RULES = {
    "membership": "The model was trained on the suspect records.",
    "identity": "The model knows people by name.",
    "probing": "The model carries a trace of personal details that were on its training images.",
}
# The setting that says what the model was asked about.
_SUBJECTS = ("suspect", "people", "data", "seen")
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(verdict: BaseVerdict, run: Run, gates: Mapping[str, str | None]) -> str:
    """A run as one test suite of JUnit XML: the verdict, each validity check, each gate.

    `exposed` is a failure and `inconclusive` an error, so that only `no_evidence` passes; a check
    that was not run is skipped.

    Args:
        verdict: the run's.
        run: whose checks are read.
        gates: by expression, why each trips; None where it does not.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    manifest = run.manifest()
    suite = ElementTree.Element("testsuite", name="lightleak", timestamp=manifest["started"][:19])
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in (("target", manifest["target"]["name"]), ("tier", verdict.tier)):
        ElementTree.SubElement(properties, "property", name=name, value=_legal(value))
    said = "\n".join((verdict.sentence, *verdict.reasons))
    _case(suite, f"{run.kind}.verdict", verdict.verdict, verdict.verdict, said)
    for check in checks(run):
        _case(suite, f"{run.kind}.validity", check.name, check.mark, check.sentence)
    for expression, reason in gates.items():
        mark = "passed" if reason is None else "failed"
        _case(suite, f"{run.kind}.gate", expression, mark, reason or "")
    for outcome in ("failure", "error", "skipped"):
        count = len(suite.findall(f"testcase/{outcome}"))
        suite.set("skipped" if outcome == "skipped" else f"{outcome}s", str(count))
    suite.set("tests", str(len(suite.findall("testcase"))))
    whole = ElementTree.Element("testsuites")
    whole.append(suite)
    ElementTree.indent(whole)
    return ElementTree.tostring(whole, encoding="unicode") + "\n"


def checks(run: Run) -> list[Check]:
    """Every validity check of a judged run, as on its page."""
    if run.kind == "identity":
        return identity.words.checks(identity.contents.read(run, show_images=False))
    if run.kind == "probing":
        return probing.words.checks(probing.contents.read(run, show_images=False))
    contents = membership.contents.read(run, show_images=False)
    return membership.words.checks(contents.verdict, contents.blind_unknown)


def _case(suite: ElementTree.Element, group: str, name: str, mark: str, said: str) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=group, name=_legal(name))
    outcome = _OUTCOMES.get(mark)
    if outcome is None:
        ElementTree.SubElement(case, "system-out").text = _legal(said)
        return
    first, _, rest = _legal(said).partition("\n")
    ElementTree.SubElement(case, outcome, type=mark, message=first).text = rest or None


def _legal(text: str) -> str:
    """Without the characters that no XML may hold, escaped or not."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def sarif(verdict: BaseVerdict, run: Run) -> dict[str, Any]:
    """A run as a log of SARIF 2.1.0 with one result: the verdict.

    The result lies at what the model was asked about, named from the current folder, and has the
    same fingerprint in every run that asks the same about a target of the same name.

    Source: OASIS Standard, Static Analysis Results Interchange Format 2.1.0.
    """
    manifest = run.manifest()
    settings = manifest["settings"]
    subject = next(settings[name] for name in _SUBJECTS if settings.get(name))
    asked = {"kind": run.kind, "target": manifest["target"]["name"], "subject": subject}
    location = {"uri": _relative(subject), "index": 0}
    rules = [{"id": kind, "shortDescription": {"text": text}} for kind, text in _RULES.items()]
    result = {
        "ruleId": run.kind,
        "ruleIndex": list(_RULES).index(run.kind),
        "level": _LEVELS[verdict.verdict],
        "message": {"text": " ".join((verdict.sentence, *verdict.reasons))},
        "locations": [{"physicalLocation": {"artifactLocation": location}}],
        "partialFingerprints": {"asked/v1": fingerprint(asked)},
        "properties": {"verdict": verdict.verdict, "tier": verdict.tier, **dict(_numbers(verdict))},
    }
    driver = {"name": "lightleak", "version": __version__, "rules": rules}
    return {
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": driver},
                "artifacts": [{"location": location, "roles": ["analysisTarget"]}],
                "results": [result],
            }
        ],
    }


def _relative(subject: str) -> str:
    """From the current folder, as a URI; of what lies outside, the name alone."""
    path = Path(subject).resolve()
    inside = path.is_relative_to(Path.cwd())
    return quote(path.relative_to(Path.cwd()).as_posix() if inside else path.name)


def _numbers(verdict: BaseVerdict) -> Iterator[tuple[str, Any]]:
    """The numbers that the verdict rests on."""
    match verdict:
        case Verdict():
            yield from verdict.primary.model_dump(mode="json").items()
        case IdentityVerdict():
            yield from verdict.suspects.model_dump(mode="json").items()
        case ProbingVerdict():
            for each in verdict.tuned:
                yield f"p_value, {each.name}", each.p_value
