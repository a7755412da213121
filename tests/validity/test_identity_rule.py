"""The rule that turns people found into a verdict, row by row."""

import json

import pytest

from lightleak import statistics as st
from lightleak.validity import IdentityCutoffs, IdentityVerdict
from lightleak.validity.identity import (
    ControlFinding,
    DecoyFinding,
    PersonFound,
    RateFinding,
    decide_identity,
)
from lightleak.validity.verdict import json_schema


def rate(count, of):
    estimate = st.clopper_pearson(count, of)
    return RateFinding(count=count, of=of, rate=estimate.value, ci95=(estimate.low, estimate.high))


def control(fired):
    return ControlFinding(
        name="people known to be out",
        rejected=rate(9 if fired else 1, 20),
        p_excess=1e-6 if fired else 0.6,
        p_uniform=None,
        fired=fired,
        sentence=f"The control {'fired' if fired else 'is quiet'}.",
    )


def decided(design="observational", *, found=0, named=None, known=None, fired=False, **decoys):
    person = PersonFound(person="a", name="A B", p_value=0.001, q_value=0.01, face_p_value=0.01)
    about = {"fewest": 999, "others": 999, "smallest_p": 0.001, "resolvable": 1} | decoys
    return decide_identity(
        design=design,
        found=[person] * found,
        named=rate(found if named is None else named, 20),
        known=known,
        controls=[control(False), control(fired)],
        decoys=DecoyFinding(strata=[], **{"warnings": []} | about),
        cutoffs=IdentityCutoffs(),
    )


@pytest.mark.parametrize("design", ["observational", "randomised"])
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"fired": True}, "The control fired."),
        ({"fewest": 19, "smallest_p": 0.05, "resolvable": 21}, "With 19 decoys"),
    ],
)
def test_what_forbids_an_answer_does_so_whoever_was_found(design, given, reason):
    verdict, tier, reasons = decided(design, found=12, known=rate(30, 30), **given)
    assert (verdict, tier) == ("inconclusive", "none")
    assert len(reasons) == 1
    assert reason in reasons[0]


def test_as_many_decoys_as_the_people_need_are_enough():
    assert decided(found=20, resolvable=20)[0] == "exposed"


@pytest.mark.parametrize(
    ("design", "tier"), [("observational", "observational"), ("randomised", "randomised")]
)
def test_people_found_are_exposed_on_the_tier_of_the_design(design, tier):
    assert decided(design, found=3)[:2] == ("exposed", tier)


def test_a_name_known_with_another_face_exposes_nobody():
    verdict, tier, reasons = decided(found=0, named=4, known=rate(30, 30))
    assert (verdict, tier) == ("inconclusive", "observational")
    assert "0 of these 4 also fit their person's photos" in reasons[-1]
    assert "namesake" in reasons[-1]


def test_too_few_other_faces_are_said_with_how_many_it_takes():
    # All four at once have q = 20/4 of the smallest p: with 99 others that is 5 %.
    _, _, reasons = decided(found=0, named=4, others=98)
    assert "at least 99 other people are needed" in reasons[-1]
    assert "399 to find any one person alone. There are 98" in reasons[-1]
    assert not any("are needed" in each for each in decided(named=4, others=99)[2])


def test_names_drawn_by_lot_need_no_faces():
    assert not any("namesake" in each for each in decided("randomised", found=3, others=0)[2])


@pytest.mark.parametrize("design", ["observational", "randomised"])
def test_nobody_found_means_something_only_where_others_would_be(design):
    assert decided(design, known=rate(28, 30))[:2] == ("no_evidence", design)
    verdict, _, reasons = decided(design, known=rate(16, 30))
    assert verdict == "inconclusive"
    assert "16 of 30 people known to be in the data would be found" in reasons[-1]
    verdict, _, reasons = decided(design)
    assert verdict == "inconclusive"
    assert "--known" in reasons[-1]


def test_the_lower_end_of_the_interval_decides_whether_others_would_be_found():
    # 22 of 30: the interval begins at 54 %; 21 of 30: at 51 %; 20 of 30: at 47 %.
    assert [decided(known=rate(n, 30))[0] for n in (20, 21)] == ["inconclusive", "no_evidence"]


def test_warnings_about_decoys_stand_among_the_reasons():
    assert (
        "Three decoys are missing." in decided(found=1, warnings=["Three decoys are missing."])[2]
    )


def test_the_shipped_schema_is_the_verdicts_own():
    own = IdentityVerdict.model_json_schema(mode="serialization")
    assert json_schema("identity") == json.loads(json.dumps(own))
