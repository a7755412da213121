"""The rule that turns numbers into a verdict, row by row."""

import json

import jsonschema
import pytest

from lightleak.errors import UserError
from lightleak.validity import Cutoffs, Verdict
from lightleak.validity.verdict import (
    BlindFinding,
    ControlFinding,
    Coverage,
    DifferenceFinding,
    PowerFinding,
    PrimaryFinding,
    SideCoverage,
    SignalFinding,
    ValidityFinding,
    counting_test,
    decide,
    json_schema,
)


def signal(p_value=0.5, auc=0.7, interval=(0.65, 0.75)):
    return SignalFinding(
        auc=auc,
        auc_ci95=interval,
        tpr_at_fpr={"0.01": None},
        tpr_at_fpr_reason={"0.01": "few"},
        p_value=p_value,
        p_value_holm=p_value,
        orientation="higher = more member-like",
        n_unscorable=0,
        source="somewhere",
        options={},
    )


def validity(
    blind=0.5,
    interval=(0.47, 0.53),
    duplicates=0,
    detectable=0.55,
    controls=(),
    groups=300,
    effective_share=0.9,
    single=0.03,
):
    return ValidityFinding(
        blind_auc=blind,
        blind_auc_ci95=interval,
        blind_p_value=0.5,
        effective_share=effective_share,
        blind={},
        differences=[
            DifferenceFinding(
                feature="length",
                sentence="Suspect texts are longer.",
                auc=0.9,
                p_value_adjusted=single,
            )
        ],
        duplicates=duplicates,
        duplicate_pairs=[],
        power=PowerFinding(
            min_detectable_auc=detectable, suspect_groups=groups, control_groups=300
        ),
        controls=[ControlFinding(name="base", **each) for each in controls],
    )


def coverage(suspect=(300, 300), control=(300, 300)):
    sides = {
        name: SideCoverage(attempted=attempted, scored=scored, failed=attempted - scored)
        for name, (attempted, scored) in (("suspect", suspect), ("control", control))
    }
    return Coverage(
        attempted=sum(each.attempted for each in sides.values()),
        scored=sum(each.scored for each in sides.values()),
        failed=sum(each.failed for each in sides.values()),
        **sides,
    )


def decided(design="observational", permutation=0.5, adjusted=0.5, **given):
    return decide(
        design=design,
        primary=given.pop("primary", signal(permutation)),
        primary_p_adjusted=adjusted,
        validity=validity(**given.pop("validity", {})),
        coverage=given.pop("coverage", coverage()),
        cutoffs=Cutoffs(),
    )


def test_without_a_declared_design_the_adjusted_test_counts():
    assert decided(permutation=1e-9, adjusted=0.4).verdict == "no_evidence"
    exposed = decided(permutation=0.9, adjusted=1e-4)
    assert (exposed.verdict, exposed.tier, exposed.test) == (
        "exposed",
        "observational",
        "residual",
    )


def test_a_random_draw_that_holds_needs_no_adjustment():
    result = decided("randomised", permutation=1e-4, adjusted=0.9)
    assert (result.verdict, result.tier) == ("exposed", "randomised")


def test_a_declared_random_draw_that_the_data_contradict_is_not_believed():
    shifted = {"blind": 0.62, "interval": (0.57, 0.67)}
    result = decided("randomised", permutation=1e-9, adjusted=0.3, validity=shifted)
    # A null under a shift that was adjusted for has a power that nobody knows.
    assert (result.verdict, result.tier, result.test) == (
        "inconclusive",
        "observational",
        "residual",
    )
    assert "the sets differ" in result.reasons[0]


def test_a_hold_out_counts_only_where_a_shift_is_excluded():
    small = {"blind": 0.5, "interval": (0.44, 0.56)}
    shifted = {"blind": 0.53, "interval": (0.512, 0.548)}
    assert decided("held-out", permutation=1e-4).tier == "held_out"
    assert decided("held-out", permutation=1e-4, validity=small).tier == "observational"
    assert decided("held-out", permutation=1e-4, validity=shifted).tier == "observational"


def test_a_hold_out_is_exposed_only_by_both_tests():
    assert decided("held-out", permutation=1e-4, adjusted=0.3).verdict == "no_evidence"
    assert decided("held-out", permutation=1e-4, adjusted=1e-3).verdict == "exposed"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"validity": {"blind": 0.93, "interval": (0.9, 0.95)}}, "told apart without the model"),
        ({"validity": {"blind": None, "interval": None}}, "too small to check"),
        ({"validity": {"duplicates": 2}}, "2 pair(s)"),
        ({"coverage": coverage(suspect=(300, 200))}, "Failures fall on one side: 33%"),
        ({"coverage": coverage(control=(12, 12))}, "Only 12 control records"),
        ({"validity": {"groups": 3}}, "only 3 independent group(s)"),
        ({"validity": {"effective_share": 0.19}}, "Too few controls resemble"),
        ({"primary": signal(None, None, None)}, "could not be computed"),
        (
            {"validity": {"controls": [{"fired": True, "sentence": "The base fires too."}]}},
            "The base fires too.",
        ),
    ],
)
def test_what_forbids_an_answer_does_so_whatever_the_p_value(given, reason):
    for design in ("observational", "held-out", "randomised"):
        result = decided(design, permutation=1e-12, adjusted=1e-12, **given)
        assert (result.verdict, result.tier) == ("inconclusive", "none")
        assert any(reason in each for each in result.reasons)


def test_a_shift_is_named_in_plain_words():
    result = decided(validity={"blind": 0.99, "interval": (0.98, 1.0)})
    assert "Suspect texts are longer." in result.reasons[0]


def test_no_evidence_needs_power():
    assert decided(validity={"detectable": 0.6}).verdict == "no_evidence"
    weak = decided(validity={"detectable": 0.61})
    assert (weak.verdict, weak.tier) == ("inconclusive", "observational")


def test_a_score_that_points_the_other_way_is_said_and_not_flipped():
    result = decided(primary=signal(0.999, 0.3, (0.25, 0.35)), adjusted=0.999)
    assert result.verdict == "inconclusive"
    assert any("never turned round" in each for each in result.reasons)


def test_a_control_that_did_not_fire_forbids_nothing():
    quiet = {"controls": [{"fired": False, "sentence": "The base is quiet."}]}
    assert decided(adjusted=1e-6, validity=quiet).verdict == "exposed"


@pytest.fixture
def verdict():
    return Verdict(
        verdict="exposed",
        tier="observational",
        reasons=["<script>alert(1)</script>"],
        primary=PrimaryFinding(
            signal="loss",
            auc=0.7,
            auc_ci95=(0.65, 0.75),
            p_value=0.001,
            p_value_adjusted=0.002,
            test="residual",
            tests={"permutation": 0.001},
            robustness=0.1,
            n_suspect=300,
            n_control=300,
        ),
        signals={"loss": signal()},
        validity=validity(),
        prevalence=None,
        dataset_inference=None,
        coverage=coverage(),
        cutoffs=Cutoffs(),
    )


def test_the_shipped_schema_is_the_verdicts_own(verdict):
    assert json_schema() == json.loads(json.dumps(Verdict.model_json_schema(mode="serialization")))
    jsonschema.validate(verdict.model_dump(mode="json"), json_schema())


def test_the_schema_refuses_a_verdict_that_is_none_of_the_three(verdict):
    wrong = verdict.model_dump(mode="json") | {"verdict": "guilty"}
    with pytest.raises(jsonschema.ValidationError, match="guilty"):
        jsonschema.validate(wrong, json_schema())


def test_reading_a_damaged_verdict_names_the_file(tmp_path):
    file = tmp_path / "verdict.json"
    file.write_text("{}")
    with pytest.raises(UserError, match=r"verdict\.json"):
        Verdict.read(file)


def test_a_notebook_shows_the_verdict_and_runs_nothing(verdict):
    shown = verdict._repr_html_()
    assert "exposed" in shown
    assert "<script>" not in shown


def test_a_level_that_no_permutation_could_reach_is_refused():
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.001"):
        Cutoffs(alpha=1e-5)


def test_one_plain_feature_that_differs_is_enough_to_disbelieve_a_random_draw():
    shifted = {"single": 1e-4}  # The classifiers drown it: their interval holds one half.
    result = decided("randomised", permutation=1e-9, adjusted=0.3, validity=shifted)
    assert (result.verdict, result.tier) == ("inconclusive", "observational")


def test_a_hold_out_needs_every_classifier_below_the_limit():
    trees = BlindFinding(auc=0.54, auc_ci95=(0.455, 0.62))
    given = validity().model_copy(update={"blind": {"trees": trees}})
    tier, _, reasons = counting_test("held-out", given, Cutoffs())
    assert tier == "observational"
    assert "0.620" in reasons[0]
