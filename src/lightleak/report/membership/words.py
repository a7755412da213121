"""What a membership verdict means, what it does not, and how its checks came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightleak import statistics as st
from lightleak.report.membership.contents import FALSE_DISCOVERY_RATE, Claims
from lightleak.report.words import Check, Mark, p_value, percent
from lightleak.validity import Design, Verdict
from lightleak.validity.verdict import (
    SHUFFLED,
    ControlFinding,
    InferenceFinding,
    Prevalence,
)

# From the weakest to the strongest.
TIERS = {
    "none": ("None", "No test counts here: the reasons below forbid an answer."),
    "observational": (
        "Observational",
        "No random draw between suspects and controls can be relied on. What can be learnt from "
        "these records themselves was adjusted for; what cannot be was not.",
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


def plainly(verdict: Verdict) -> list[tuple[str, str]]:
    """The verdict for a reader who knows no statistics: questions and answers."""
    primary = verdict.primary
    said = [
        (
            "What was compared?",
            f"{primary.n_suspect:,} records that may have been trained on, the suspects, with "
            f"{primary.n_control:,} of the same kind that are known not to have been, the "
            "controls. The model was shown each of them, and gave one number that says how "
            "familiar the record is to it.",
        )
    ]
    if primary.auc is not None:
        said.append(
            (
                "What was seen?",
                f"Of 100 pairs of one suspect and one control, the suspect is the more familiar "
                f"one in about {100 * primary.auc:.0f}. If training made no difference, it would "
                f"be about 50. {_without_model(verdict)}",
            )
        )
    return [*said, ("What follows?", _follows(verdict)), ("What does it rest on?", _rests(verdict))]


def _without_model(verdict: Verdict) -> str:
    blind = verdict.validity.blind_auc
    if blind is None:
        return "Whether the records differ by themselves could not be checked."
    told = f"A program that sees only the records, and never the model, gets {100 * blind:.0f}"
    if verdict.validity.differs:
        return f"{told}: the two sets differ by themselves, whatever the model was trained on."
    if any(each.fired for each in verdict.validity.controls):
        return f"{told}; yet another comparison, in which nothing may be found, found something."
    return f"{told}, which is no better than chance: as a whole the two sets look alike."


def _follows(verdict: Verdict) -> str:
    if verdict.verdict == "exposed":
        return (
            "The model treats the suspects differently from the controls, by more than chance "
            "and more than what the records themselves explain. The likely reason is that at "
            "least some were used to train it."
        )
    if verdict.verdict == "no_evidence":
        return (
            "Nothing was found, although a moderate effect would have been. So most of the "
            "suspects were probably not used in a way that left a trace; a few of them may be."
        )
    return (
        "Nothing, in either direction. A number can always be computed; here it cannot be told "
        "whether training is behind it. The reasons above say what stands in the way."
    )


def _rests(verdict: Verdict) -> str:
    return {
        "randomised": "On the declaration that lots decided which records could be trained on. If "
        "they did, only training can explain the difference.",
        "held_out": "On the declaration that the controls were set aside at random and never "
        "trained on. The records look as if that were so.",
        "observational": "On the controls being like the suspects in everything that matters. "
        "What a program can see of the records was taken into account; what it cannot was not.",
        "none": "No design was found that could carry an answer.",
    }[verdict.tier]


def stronger(verdict: Verdict, settings: Mapping[str, Any]) -> list[str]:
    """What would make the evidence stronger, the most useful first."""
    validity, cutoffs = verdict.validity, verdict.cutoffs
    found: list[str] = []
    if any(each.fired for each in validity.controls):
        found.append(
            "New controls, or a control model that is known to be older than the records: a "
            "comparison in which nothing may be found found something."
        )
    if validity.unread_fields:
        named = ", ".join(validity.unread_fields[:4])
        found.append(
            f"A look at what else is known of the records ({named}): it was not compared "
            "(--blind-field)."
        )
    if validity.duplicates:
        found.append("Leave out the records that stand on both sides (--drop-duplicates).")
    if validity.differs and validity.differences:
        named = "; ".join(each.sentence for each in validity.differences[:2])
        found.append(
            f"Other controls, from the same source and time as the suspects. These differ: {named}."
        )
    if not any(each.model for each in validity.controls):
        found.append(
            "A model that cannot have seen the suspects, such as the one that this was fine-tuned "
            "from (--base) or another of its kind (--control-target): what it shows, too, does "
            "not come from training on them."
        )
    least = validity.power.min_detectable_auc
    weak = least is None or least > cutoffs.detectable_auc
    if weak and verdict.verdict != "exposed":
        needed = st.minimum_set_size(cutoffs.detectable_auc, alpha=cutoffs.alpha)
        found.append(f"More records: about {needed:,} independent ones on each side.")
    if settings["design"] != "randomised":
        found.append(
            "Lots: where the owner decides by a random draw which records may be trained on, and "
            "keeps the others back, nothing but training can tell the two apart "
            "(--design randomised)."
        )
    if settings["design"] != "observational" and not settings.get("documentation"):
        found.append(
            "A document that says how suspects and controls came apart, from before the audit "
            "(--documentation); its hash would stand in this report."
        )
    found.append(
        "For the future: canaries, records planted by lot before the data is given away, which "
        "prove their use without comparing sets that somebody chose."
    )
    return found


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
        *_texts_alone(verdict),
        "How many were used, unless a share is stated. A part of them is enough for this result.",
        "How they came into the training, from whom, or whether that was allowed. Copies from "
        "elsewhere leave the same trace.",
        rests_on,
        "Certainty. Where the design holds and what differs can be learnt, the test finds about "
        f"{percent(verdict.cutoffs.alpha)} of models exposed that never saw their suspects.",
    ]


def _texts_alone(verdict: Verdict) -> list[str]:
    """Said where suspects gain no more from their own images than controls do."""
    pairs = next((each for each in verdict.validity.controls if each.name == SHUFFLED), None)
    if pairs is None or pairs.p_value is None or pairs.p_value <= verdict.cutoffs.alpha:
        return []
    return ["That the images were used: the texts by themselves may explain what was found."]


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
        _resemblance(verdict),
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
    if verdict.validity.unread_fields:
        fields = ", ".join(verdict.validity.unread_fields)
        return Check(
            name,
            "caution",
            f"{measured} Not looked at, though the records carry it: {fields} (--blind-field).",
        )
    if verdict.validity.differences:
        return Check(
            name, "caution", f"{measured} As a whole they look alike; single features differ."
        )
    return Check(name, "passed", f"{measured} No difference beyond chance was found.")


def _resemblance(verdict: Verdict) -> Check:
    name = "Enough controls resemble the suspects"
    share, limit = verdict.validity.effective_share, verdict.cutoffs.effective_share
    if share is None:
        return Check(name, "not possible", "There are too few records to weight them.")
    return Check(
        name,
        "passed" if share >= limit else "failed",
        f"Weighted to resemble the suspects, the controls are worth {percent(share)} of their "
        f"number; {percent(limit)} is asked for.",
    )


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
        # Where an effect was found, none was missed.
        "caution" if verdict.verdict == "exposed" else "failed",
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
    return [
        Check(
            f"{name}: {each.name}",
            _mark(each, verdict.cutoffs.alpha),
            each.sentence,
        )
        for each in verdict.validity.controls
    ] or [Check(name, "not run", "No negative control was run.")]


def _mark(control: ControlFinding, alpha: float) -> Mark:
    if control.p_value is None:
        return "not run" if control.sentence.startswith("Not run") else "not possible"
    if control.name == SHUFFLED:
        return "passed" if control.p_value <= alpha else "caution"
    return "failed" if control.fired else "passed"


@dataclass(frozen=True)
class Test:
    """One test of the primary signal, and whether it is the one that counts."""

    name: str
    asks: str
    source: str
    p_value: float | None
    counts: bool


def tests(verdict: Verdict) -> list[Test]:
    """Every test of the primary signal. When a check forbids an answer, none counts."""
    counting = None if verdict.tier == "none" else verdict.primary.test
    others = {name: verdict.primary.tests.get(name) for name in _OTHER_TESTS}
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
            counting == "residual" or verdict.tier == "held_out",
        ),
        *(
            Test(name, _OTHER_TESTS[name][0], _OTHER_TESTS[name][1], value, False)
            for name, value in others.items()
            if value is not None
        ),
    ]


_OTHER_TESTS = {
    "residual, linear": ("The residual test, by linear models alone.", "one of the two families"),
    "residual, trees": ("The residual test, by boosted trees alone.", "one of the two families"),
    "Mann–Whitney": ("What peers report: do they rank higher?", "Mann and Whitney 1947"),
    "Welch": ("What peers report: is their mean higher?", "Welch 1947"),
}


def robust(value: float) -> str:
    """How much hidden difference the adjusted test would withstand."""
    if value == 0:
        return "The residual test's estimate is not above nought: nothing has to explain it away."
    return (
        "A difference between the sets that the blind features miss would have to explain "
        f"{percent(value)} of what is left of both, the side and the score, to bring the residual "
        "test's estimate to nought (robustness value, Cinelli and Hazlett 2020)."
    )


def share(verdict: Verdict) -> str:
    """What share of the suspects was used, in a sentence."""
    found = verdict.prevalence
    if found is None:
        why = (
            "the sets differ by themselves"
            if verdict.validity.differs
            else "no test counts here"
            if verdict.tier == "none"
            else "folds were fitted apart and share no scale"
        )
        return f"Not estimated: {why}."
    low, high = found.ci95
    if found.estimate is None:
        return (
            f"At least {percent(low)}, with 95 % confidence. Without known members that the signal "
            "was not fitted on there is only this lower bound, which holds whatever members score."
        )
    return (
        f"{percent(found.estimate)}, 95 % interval {percent(low)} to {percent(high)}, beside the "
        "known members of the calibration. Where these were used otherwise than the suspects "
        "(more often, say) the share is off."
    )


def short_share(found: Prevalence | None) -> str:
    """The same in a cell."""
    if found is None:
        return "not estimated"
    low, high = found.ci95
    if found.estimate is None:
        return f"≥ {percent(low)}"
    return f"{percent(found.estimate)} [{percent(low)}, {percent(high)}]"


def inference(found: InferenceFinding) -> str:
    """Dataset inference, and how its own controls came out."""
    return (
        f"Dataset inference (Maini et al. 2024) over {len(found.signals)} signals: p "
        f"{p_value(found.p_value)}; controls against controls {p_value(found.control_p_value)}, "
        f"labels dealt anew {p_value(found.shuffled_p_value)}. It finds any difference between "
        "the sets, in either direction, and so never carries the verdict."
    )


def compared_with(verdict: Verdict) -> list[str]:
    """What signals that compare models were given, and what that is worth."""
    found = verdict.compared
    if found is None:
        return []
    reads = "signature" in verdict.signals
    if found.references:
        how = ""
        if found.recipe is not None:
            method = "LoRA" if found.recipe["method"] == "lora" else "full fine-tuning"
            how = (
                f" ({method}, epoch {found.epoch} of {found.recipe['epochs']}, learning rate "
                f"{found.recipe['learning_rate']:g})"
            )
        said = [
            f"{found.references} reference(s), trained by the auditor on random halves of what was "
            f"given to that{how}. Of the {found.records:,} audited records "
            f"{found.suspects_seen:,} suspects and {found.controls_seen:,} controls were learnt by "
            "some of them."
        ]
        if reads and verdict.signals["signature"].auc is not None:
            said.append("signature learns from the references: no label of the records enters it.")
    else:
        said = ["No references were given: no model of known membership stands behind this."]
        if reads:
            said.append(
                "signature is fitted on suspects and controls of other folds than it scores."
            )
    costs = "much" if found.references else "most"
    if reads and found.base is None:
        said.append(
            f"What the target was fine-tuned from is not known, which costs signature {costs} of "
            "its power."
        )
    elif reads and found.shares == "made":
        said.append(
            "signature also reads how much of each record is in what fine-tuning changed, solved "
            "for all of them together without a label."
        )
    elif reads:
        said.append(
            "How much of each record is in what fine-tuning changed was left out, which costs "
            f"signature {costs} of its power: {found.shares}."
        )
    return said


def endpoint(servers: Sequence[str]) -> str:
    """What it means that the target only answers."""
    named = (
        f"The server named what it ran: {', '.join(servers)}."
        if servers
        else "The server did not name what it ran."
    )
    changed = " So it did change while it was asked." if len(servers) > 1 else ""
    return (
        "The target is an endpoint. No weights could be hashed: the model behind an address may "
        f"change at any time, and nobody can ask this one again. {named}{changed}"
    )


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
