"""What a membership verdict means, what it does not, and how its checks came out."""

from __future__ import annotations

from dataclasses import dataclass

from lightleak import statistics as st
from lightleak.report.membership.contents import FALSE_DISCOVERY_RATE, Claims
from lightleak.report.words import Check, Mark, p_value, percent
from lightleak.validity import Design, Verdict

# From the weakest to the strongest.
TIERS = {
    "none": ("None", "No test counts here: the reasons below forbid an answer."),
    "observational": (
        "Observational",
        "No random draw between suspects and controls can be relied on. What can be seen in the "
        "records themselves was measured and adjusted for; what cannot be seen was not.",
    ),
    "held_out": (
        "Held-out",
        "The controls are declared to have been held out at random, and the two sets could not "
        "be told apart without the model.",
    ),
    "randomised": (
        "Randomised",
        "It is declared that lots decided which records could be trained on, so that only "
        "training can set the two sets apart. This is the strongest design.",
    ),
}

GLOSSARY = {
    "Suspects, controls": "Suspects are the records that may have been trained on. Controls are "
    "records of the same kind that are known not to have been. Every number compares the two.",
    "Signal": "One number a record, read off the model; a higher one is more like a record that "
    "was trained on. One signal was named before anything was measured: the primary one. It alone "
    "carries the verdict.",
    "AUC": "The chance that a suspect drawn at random scores higher than a control drawn at "
    "random. 0.5 is a coin toss, 1 is perfect separation.",
    "TPR at 1 % FPR": "The share of suspects that is recognised when at most 1 % of the controls "
    "would be accused wrongly.",
    "95 % interval": "The range that a procedure gives which covers the true value in 95 of 100 "
    "audits. It may be wider than usual where scores share fitted parts.",
    "p-value": "How often a result at least this strong would come about if the model had not "
    "been trained on the suspects and the design held. It is not the chance of innocence.",
    "Holm": "A p-value made larger because several signals were tried.",
    "q-value": "For one record: the share of wrong claims to be expected if it and every record "
    "above it were claimed.",
    "Blind baseline": "Classifiers that see the records and never the model. What they can tell "
    "apart, no score of the model can be credited for.",
}


def not_shown(verdict: Verdict) -> list[str]:
    """What a reader might take the verdict to show, and it does not."""
    if verdict.verdict == "inconclusive":
        return _not_shown_inconclusive()
    if verdict.verdict == "no_evidence":
        return _not_shown_no_evidence(verdict)
    return _not_shown_exposed(verdict)


def _not_shown_exposed(verdict: Verdict) -> list[str]:
    rests_on = {
        "randomised": "That lots were drawn as declared. The page takes the owner's word for it.",
        "held_out": "That the controls were kept out of training. The page takes the owner's word "
        "for it; it shows only that they look like the suspects.",
        "observational": "That every difference between suspects and controls was adjusted for. "
        "One that the measured features miss, or affect in ways that are hard to learn from so "
        "many records, could look the same.",
        "none": "",
    }[verdict.tier]
    return [
        "Which records were used. The finding is about the suspects as a set; for single records "
        "see the list further down, and its limits.",
        "How many were used, unless a share is stated. A part of them is enough for this result.",
        "How they came into the training, from whom, or whether that was allowed. Copies from "
        "elsewhere leave the same trace.",
        rests_on,
        "Certainty. The test is built to find at most "
        f"{percent(verdict.cutoffs.alpha)} of models exposed that never saw their suspects.",
    ]


def _not_shown_no_evidence(verdict: Verdict) -> list[str]:
    return [
        "That the model was not trained on the suspects. Absence of a trace is not absence.",
        f"Effects smaller than AUC {verdict.validity.power.min_detectable_auc:.3f}: these may be "
        "missed, as when few of the suspects were used, or were seen once among very "
        "many.",
        "Anything about another model, or another version of this one: what was audited is the "
        "set of weights whose hash is recorded below.",
        "Anything about other records than these suspects.",
        "What another way of measuring might find. Only the primary signal counts here.",
    ]


def _not_shown_inconclusive() -> list[str]:
    return [
        "That the suspects were used in training, even where a number below looks striking.",
        "That they were not used. This is no acquittal, and no half of one.",
        "A fault of the model or of the suspects. It is the comparison that cannot carry an "
        "answer; the reasons say what would have to change.",
        "Anything that may be quoted alone: no p-value or AUC on this page is a finding.",
    ]


def checks(verdict: Verdict, blind_unknown: str | None) -> list[Check]:
    """Every validity check, passed or not."""
    return [
        _blind(verdict, blind_unknown),
        _duplicates(verdict),
        _power(verdict),
        _coverage(verdict),
        *_negative_controls(verdict),
    ]


def _blind(verdict: Verdict, unknown: str | None) -> Check:
    name = "The sets cannot be told apart without the model"
    value, interval = verdict.validity.blind_auc, verdict.validity.blind_auc_ci95
    if value is None or interval is None:
        return Check(name, "not possible", f"It could not be checked: {unknown or 'too few.'}")
    measured = f"Blind AUC {value:.3f} (95 % interval {interval[0]:.3f} to {interval[1]:.3f})."
    limit = verdict.cutoffs.blind_refuse
    if value >= limit:
        return Check(name, "failed", f"{measured} From {limit:.2f} on nothing can be said.")
    if interval[0] > 0.5:
        return Check(
            name, "caution", f"{measured} They differ beyond chance; the residual test adjusts."
        )
    return Check(name, "passed", f"{measured} No difference beyond chance was found.")


def _duplicates(verdict: Verdict) -> Check:
    name = "No record stands on both sides"
    count = verdict.validity.duplicates
    if count:
        return Check(name, "failed", f"Pairs that are alike or nearly so: {count:,}.")
    return Check(name, "passed", "Neither equal nor nearly equal images or texts were found.")


def _power(verdict: Verdict) -> Check:
    name = "There are enough records"
    cutoffs, least = verdict.cutoffs, verdict.validity.power.min_detectable_auc
    wanted = f"AUC {cutoffs.detectable_auc:.2f}"
    if least is None:
        return Check(name, "not possible", "There are too few records to find any effect.")
    found = f"An effect of AUC {least:.3f} or more is found with 90 % probability"
    if least <= cutoffs.detectable_auc:
        return Check(name, "passed", f"{found}; {wanted} is asked for.")
    needed = st.minimum_set_size(cutoffs.detectable_auc, alpha=cutoffs.alpha)
    return Check(
        name,
        "failed",
        f"{found}, a smaller one is not; {wanted} is asked for, which takes about {needed:,} "
        "records on each side.",
    )


def _coverage(verdict: Verdict) -> Check:
    coverage, cutoffs = verdict.coverage, verdict.cutoffs
    sides = {"suspects": coverage.suspect, "controls": coverage.control}
    told = " and ".join(
        f"{side.scored:,} of {side.attempted:,} {name}" for name, side in sides.items()
    )
    rates = [side.failed / max(1, side.attempted) for side in sides.values()]
    lopsided = abs(rates[0] - rates[1]) > cutoffs.lopsided_failures
    few = any(side.scored < cutoffs.fewest_records for side in sides.values())
    mark: Mark = "failed" if lopsided or few else "caution" if coverage.failed else "passed"
    why = {
        "failed": " Failures fall on one side."
        if lopsided
        else f" At least {cutoffs.fewest_records} are needed on each side.",
        "caution": " The others are listed under failures; none counts as 0.",
        "passed": "",
    }[mark]
    told = f"{told} were scored.{why} {set_aside(verdict)}".rstrip()
    return Check("All records count, on both sides alike", mark, told)


def set_aside(verdict: Verdict) -> str:
    """Which controls served another end; empty when none did."""
    count = verdict.coverage.set_aside
    if not count:
        return ""
    return f"{count:,} more controls are the bank of negatives and are not scored."


def _negative_controls(verdict: Verdict) -> list[Check]:
    name = "Where nothing can be found, nothing is"
    controls = verdict.validity.controls
    if not controls:
        return [Check(name, "not run", "No negative control was run.")]
    return [
        Check(name, "failed" if each.get("fired") else "passed", each["sentence"])
        for each in controls
    ]


@dataclass(frozen=True)
class Test:
    """One of the two tests of the primary signal, and whether it is the one that counts."""

    name: str
    asks: str
    source: str
    p_value: float | None
    counts: bool


def tests(verdict: Verdict) -> list[Test]:
    """Both tests. When a check forbids an answer, neither counts."""
    counting = None if verdict.tier == "none" else verdict.primary.test
    return [
        Test(
            "Permutation test",
            "Would suspects score this high if the labels were dealt anew?",
            "Phipson and Smyth 2010",
            verdict.primary.p_value,
            counting == "permutation",
        ),
        Test(
            "Residual test",
            "Do they still, once what the records show without the model is accounted for?",
            "generalised covariance measure, Shah and Peters 2020",
            verdict.primary.p_value_adjusted,
            counting == "residual",
        ),
    ]


def below_half(verdict: Verdict) -> str | None:
    """What to make of suspects that score lower than controls; None when they do not."""
    value, interval = verdict.primary.auc, verdict.primary.auc_ci95
    if value is None or interval is None or value >= 0.5:
        return None
    lower = (
        "lower than controls beyond chance: a leak in the other direction, an error of sign, or "
        "a difference between the sets"
        if interval[1] < 0.5
        else "lower than controls, within chance"
    )
    return (
        f"The AUC lies below 0.5: suspects score {lower}. It is shown as it is. Turning a signal "
        "round after seeing the result would make any signal look good."
    )


def about_records(verdict: Verdict, claims: Claims) -> list[str]:
    """What may be said of single records, and what stands in the way."""
    level = percent(FALSE_DISCOVERY_RATE)
    said = [
        f"{claims.surviving:,} of {claims.tested:,} suspects have a q-value of at most {level} "
        "(Benjamini and Hochberg).",
        f"Ranked among {claims.controls:,} controls, no record can have a p-value below "
        f"{p_value(1 / (claims.controls + 1))}; "
        + (
            f"so none can be claimed unless at least {claims.resolvable:,} are at once."
            if claims.resolvable <= claims.tested
            else "so no record can be claimed alone, however high it scores. More controls would "
            "change that."
        ),
    ]
    if verdict.verdict != "exposed":
        said.append("Under this verdict the list is a ranking. It accuses no record.")
    if verdict.primary.test == "residual":
        said.append(
            "These p-values compare suspects with controls as they are: they are not adjusted for "
            "differences between the two."
        )
    return said


def registration(verdict: Verdict, registered: str) -> str:
    """Whether the signal that carries the verdict was named before anything was measured."""
    signal = verdict.primary.signal
    if signal == registered:
        return f"The signal that carries the verdict, {signal}, was named before the measuring."
    return (
        f"Beware: {registered} was named before the measuring, and this verdict is carried by "
        f"{signal}, which was put in its place afterwards. Its p-value is not what it seems."
    )


def declared(design: Design) -> str:
    """How the owner says that suspects and controls came apart."""
    return {
        "randomised": "randomised: lots decided",
        "held-out": "held out at random",
        "observational": "no random design declared",
    }[design]
