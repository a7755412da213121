"""The rule behind a probe's verdict: what forbids, what finds, what clears."""

from __future__ import annotations

import pytest

from lightleak.validity.probing import (
    ConditionFinding,
    LayerFinding,
    LegibilityFinding,
    ProbingCutoffs,
    decide_probing,
)

LEGIBLE = LegibilityFinding(accuracy=0.9, ci95=(0.8, 0.95), chance=0.025, line_height=15)
CUTOFFS = ProbingCutoffs()


def condition(name, kind, p_value, *, holm=None, detectable=0.1, rate=None):
    best = LayerFinding(
        tower="language",
        layer=2,
        field="age",
        accuracy=0.6,
        ci95=(0.5, 0.7),
        base_accuracy=0.5,
        delta=0.1,
        delta_ci95=(0.0, 0.2),
        selectivity=0.1,
        p_value=p_value,
    )
    return ConditionFinding(
        name=name,
        kind=kind,
        rate=rate,
        p_value=p_value,
        p_value_holm=holm,
        best=best,
        cells=10,
        detectable=detectable,
        sentence=f"{name} was tested.",
    )


def decide(*conditions, legibility=LEGIBLE, design="randomised"):
    return decide_probing(
        design=design, conditions=conditions, legibility=legibility, cutoffs=CUTOFFS
    )


FOUND = condition("rate 1", "tuned", 0.001, holm=0.002)
NOTHING = condition("rate 1", "tuned", 0.4, holm=0.8)
PLANTED = condition("planted", "planted", 0.001)
MISSED = condition("planted", "planted", 0.3)
QUIET = condition("rate 0", "control", 0.3)
FIRED = condition("rate 0", "control", 0.004)


def test_a_trace_beyond_chance_is_exposed():
    verdict, tier, reasons = decide(FOUND, PLANTED, QUIET)
    assert (verdict, tier) == ("exposed", "randomised")
    assert "rate 1 was tested." in reasons


def test_the_corrected_p_value_counts():
    barely = condition("rate 1", "tuned", 0.03, holm=0.06)
    assert decide(barely, PLANTED, QUIET)[0] == "no_evidence"


def test_a_control_that_finds_something_forbids_any_answer():
    verdict, tier, reasons = decide(FOUND, PLANTED, FIRED)
    assert (verdict, tier) == ("inconclusive", "none")
    assert "rate 0 was tested." in reasons[0]


def test_nothing_found_by_a_test_that_could_is_no_evidence():
    assert decide(NOTHING, PLANTED, QUIET)[0] == "no_evidence"


@pytest.mark.parametrize(
    ("conditions", "legibility", "reason"),
    [
        ((NOTHING, MISSED), LEGIBLE, "planted on purpose was not found"),
        ((NOTHING,), LEGIBLE, "what the test misses is unknown"),
        ((NOTHING, PLANTED), None, "not known"),
        (
            (NOTHING, PLANTED),
            LegibilityFinding(accuracy=0.03, ci95=(0.01, 0.06), chance=0.025, line_height=3),
            "nothing to be remembered",
        ),
        (
            (condition("rate 1", "tuned", 0.4, holm=0.4, detectable=0.4), PLANTED),
            LEGIBLE,
            "only a gain of 40 points",
        ),
    ],
)
def test_nothing_found_by_a_test_that_could_not_is_inconclusive(conditions, legibility, reason):
    verdict, _, reasons = decide(*conditions, legibility=legibility)
    assert verdict == "inconclusive"
    assert any(reason in each for each in reasons)


def test_without_lots_the_tier_is_observational():
    assert decide(FOUND, design="observational")[1] == "observational"
