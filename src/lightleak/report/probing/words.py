"""What a probe's verdict means, what it does not, and how its checks came out."""

from __future__ import annotations

from collections.abc import Sequence

from lightleak.report.probing.contents import Contents
from lightleak.report.words import Check, cut, percent, thousands
from lightleak.validity import ProbingVerdict
from lightleak.validity.probing import ConditionFinding, LayerFinding

# From the weakest to the strongest.
TIERS = {
    "none": ("None", "No test counts here: the reasons below forbid an answer."),
    "observational": (
        "Observational",
        "Nobody drew lots for whose details were seen. That seen and unseen people differ in "
        "nothing else is an assumption.",
    ),
    "randomised": (
        "Randomised",
        "Of every two people lots decided whose details were seen, so that only training "
        "can set the two groups apart. This is the strongest design.",
    ),
}

KINDS = {
    "tuned": "asked about",
    "planted": "planted: must be found",
    "control": "control: nothing to find",
}

COMPARISONS = {
    "watermark": "the details put on the images",
    "image": "images turned, mirrored, brightened",
    "text": "the same said in other words",
    "other batch": "another batch altogether",
    "original": "the same batch again",
}

METHODS = {"pca": "PCA", "tsne": "t-SNE"}

GLOSSARY = {
    "Details": "What is written on an image about a person and no task needs: user name, number, "
    "gender, age, time and place of the photo.",
    "Seen, unseen": "Seen are the people whose details were on images that the model was "
    "fine-tuned on; unseen are people of the same kind whose details were not.",
    "Rate": "The share of the training images that carried somebody's details.",
    "Probe": "A simple classifier that is shown what a layer of the model holds of an image and "
    "must tell whether the details on it are of somebody seen. A coin is right in 50 %.",
    "Layer, tower": "A model is a chain of layers: those of the vision tower take in the image, "
    "the projector hands it on, those of the language model take in the question and answer.",
    "Gain": "How much more often the probe is right with the fine-tuned model than with the same "
    "model before, in points of percent. Without a model before: than 50 %.",
    "Selectivity": "How much more often the probe is right than probes for groups put together by "
    "lot (Hewitt and Liang 2019). A probe that can learn anything has none.",
    "Planted": "A model in which a trace was made on purpose. A test that misses it cannot clear "
    "another model.",
    "p-value": "How often a gain at least this striking, at any layer and question, would come "
    "about if who was seen had left no trace. It is not the chance that there is none.",
    "Holm": "A p-value made larger because several fine-tuned models were asked about.",
    "95 % interval": "The range that a procedure gives which covers the true value in 95 of 100 "
    "audits; for probes over people, or pairs of people, drawn anew.",
}


# A share of right answers that any model may have by luck.
HARDLY = 0.05


def not_shown(verdict: ProbingVerdict) -> list[str]:
    """What a reader might take the verdict to show, and it does not."""
    always = [
        "Decodable is not used: that a probe reads something off the model's states does not show "
        "that the model acts on it.",
        "Not decodable is not absent: a trace may lie where no probe looked, or in a form that "
        "this one cannot read.",
        "A probe shows that the model's states go with who was seen, not that anybody can make the "
        "model tell the details.",
    ]
    return [*always, *_not_shown_of(verdict)]


def _not_shown_of(verdict: ProbingVerdict) -> list[str]:
    if verdict.verdict == "exposed":
        return [
            "Which details were kept, or whose. Seen and unseen are told apart as groups.",
            "Certainty. The test is built to find at most "
            f"{percent(verdict.cutoffs.alpha)} of models exposed in which nothing was left.",
        ]
    if verdict.verdict == "no_evidence":
        least = max(each.detectable for each in verdict.tuned)
        return [
            f"Gains of less than {points(least)} at one layer, which may be missed.",
            "That no single person is remembered. Only what the seen have in common is looked for.",
            "Anything about other data, other rates, or more training than this.",
        ]
    return [
        "That a trace was left, even where a number below looks striking.",
        "That none was. This does not clear the model.",
    ]


def people(contents: Contents) -> str:
    """Whose details they are."""
    if contents.verdict.tuned[0].rate is None:
        return "Whose details these are, the images' owner knows. This page names nobody."
    return (
        "The people are invented: their names, numbers and dates were made up by a generator of "
        "such data (Faker) and belong to nobody."
    )


def curve_caption(conditions: Sequence[ConditionFinding]) -> str:
    """What a figure of layer curves shows."""
    named = {
        kind: ", ".join(cut(each.name, 80) for each in conditions if each.kind == kind)
        for kind in KINDS
    }
    before = any(each.best.base_accuracy is not None for each in conditions)
    said = ""
    if named["tuned"]:
        said += f"Asked about: {named['tuned']}. "
        if before:
            said += "In grey the model before; the intervals of the gain allow for both. "
    if named["planted"]:
        said += f"Must be found: {named['planted']}. "
    if named["control"]:
        said += f"Nothing to find in: {named['control']}."
    return said


def steps(contents: Contents) -> list[tuple[str, str, str]]:
    """The test, step by step: its name, its source, and what is done."""
    verdict = contents.verdict
    each_side, seeds = verdict.coverage.personas, verdict.coverage.seeds
    tuned, cells = verdict.tuned, contents.tells.cells
    lots = " Lots decided which of the two." if verdict.tier == "randomised" else ""
    found = [
        (
            "Details that no task needs",
            "Ju et al. 2025, arXiv:2503.01208",
            f"{thousands(each_side)} people whose details were on training images stand against "
            f"{thousands(each_side)} whose details were not, in pairs.{lots}"
            + (
                f" There were {seeds} repeats (seeds), each with other people." if seeds > 1 else ""
            ),
        ),
        (
            "A probe at every layer",
            "ridge regression, Hoerl and Kennard 1970",
            "The same images are shown to the model with the details of the one and of the other, "
            "and it is asked for each detail. A linear probe learns from the states of one layer "
            "to tell seen from unseen. It is always scored on people that it did not learn from.",
        ),
        (
            "Against the model before",
            "",
            "The model before fine-tuning is probed alike, on the same images and people. Only "
            "what the fine-tuned model gains on it counts."
            if contents.tells.best.base_accuracy is not None
            else "The model before fine-tuning was not given: the gain is that on a coin, 50 %.",
        ),
        (
            "What chance can do",
            "max-T, Westfall and Young 1993",
            "All is repeated as if seen and unseen had been exchanged in some of the pairs. p is "
            f"the share of such exchanges in which the best of all {thousands(cells)} layers and "
            "questions stands out as far. People are exchanged, never images.",
        ),
    ]
    if len(tuned) > 1:
        chosen = f"p is made larger because {len(tuned)} fine-tuned models were asked about."
        found.append(("Several models", "Holm 1979", chosen))
    return found


def checks(contents: Contents) -> list[Check]:
    """Every validity check, passed or not."""
    verdict = contents.verdict
    return [
        *_controls(verdict),
        *_planted(verdict),
        _legible(verdict),
        *(_power(verdict, each) for each in verdict.conditions if each.kind != "control"),
        *_task(verdict),
        _coverage(verdict),
    ]


def _controls(verdict: ProbingVerdict) -> list[Check]:
    name = "Nothing is found where nothing can be"
    controls = [each for each in verdict.conditions if each.kind == "control"]
    if not controls:
        unknown = "No negative control was run: what the test finds wrongly is not known."
        return [Check(name, "not run", unknown)]
    cutoffs = verdict.cutoffs
    return [
        Check(
            name,
            "failed"
            if each.p_value <= cutoffs.control_alarm
            else "caution"
            if each.p_value <= cutoffs.alpha
            else "passed",
            each.sentence,
        )
        for each in controls
    ]


def _planted(verdict: ProbingVerdict) -> list[Check]:
    name = "A trace that was planted on purpose is found"
    planted = [each for each in verdict.conditions if each.kind == "planted"]
    if not planted:
        return [Check(name, "not run", "None was planted: what the test misses is not known.")]
    return [
        Check(name, "passed" if each.p_value <= verdict.cutoffs.alpha else "failed", each.sentence)
        for each in planted
    ]


def _legible(verdict: ProbingVerdict) -> Check:
    name, found = "The details can be read at the size that the model takes", verdict.legibility
    if found is None:
        return Check(name, "not run", "It was not measured: there may have been nothing to keep.")
    told = (
        f"A classifier that sees pixels alone names the person in {percent(found.accuracy)} of "
        f"the images, 95 % interval {percent(found.ci95[0])} to {percent(found.ci95[1])}; "
        f"{percent(found.chance)} by chance. A line of text is {found.line_height:.0f} pixels "
        "high."
    )
    return Check(name, "passed" if found.ci95[0] > found.chance else "failed", told)


def _power(verdict: ProbingVerdict, condition: ConditionFinding) -> Check:
    name, wanted = "There are enough people", verdict.cutoffs.detectable
    told = (
        f"In {condition.name}, the least gain at one layer that is found in 9 of 10 audits: "
        f"{found_from(condition)}. To count as no evidence it may be {points(wanted)} at most."
    )
    return Check(name, "passed" if condition.detectable <= wanted else "caution", told)


def found_from(condition: ConditionFinding) -> str:
    """The least gain that would be found; beyond a half there is none."""
    return "none" if condition.detectable > 0.5 else points(condition.detectable)


def _coverage(verdict: ProbingVerdict) -> Check:
    counts = verdict.coverage
    told = f"{thousands(counts.images)} images of each side were probed"
    told += f" for each of {counts.seeds} seeds." if counts.seeds > 1 else "."
    if counts.records_trained_on is not None and counts.records_of_the_task is not None:
        told += (
            f" {thousands(counts.records_trained_on)} records were trained on, and "
            f"{thousands(counts.records_of_the_task)} measure the task."
        )
    if counts.failed:
        told += f" {thousands(counts.failed)} failed and are listed below; none counts as wrong."
    fewer = counts.images_wanted is not None and counts.images < counts.images_wanted
    if fewer:
        told += f" {thousands(counts.images_wanted or 0)} were asked for; the records gave no more."
    return Check("All images count", "caution" if counts.failed or fewer else "passed", told)


def _task(verdict: ProbingVerdict) -> list[Check]:
    base = next((each for each in verdict.utility if each.condition == "base"), None)
    if base is None:
        return []
    told = (
        f"Before fine-tuning {percent(base.accuracy)} of its questions are answered rightly, 95 % "
        f"interval {percent(base.ci95[0])} to {percent(base.ci95[1])}."
    )
    able = base.ci95[0] > HARDLY
    rest = "" if able else " A model that cannot do its task says little of one that can."
    return [Check("The model can do its task", "passed" if able else "caution", told + rest)]


def points(difference: float) -> str:
    """0.1234 → "12.3 points", which does not break over lines."""
    return f"{round(100 * difference, 1):g}\N{NO-BREAK SPACE}points".replace("-", "−")


def gained(difference: float) -> str:
    """0.1234 → "+12.3"; −0.1 → "−10"."""
    rounded = round(100 * difference, 1)
    return f"{rounded:+g}".replace("-", "−") if rounded else "0"


def cosine(value: float | None, sign: str = "") -> str:
    """Three decimals; a batch without a gradient has none."""
    return "–" if value is None else f"{value:{sign}.3f}".replace("-", "−")


def place(tower: str, layer: int) -> str:
    """A layer as people call it."""
    if (tower, layer) == ("language", 0):
        return "embeddings"
    return f"{tower} layer {layer}" if tower in ("vision", "language") else tower


def question(field: str) -> str:
    """What the model was asked for; at the image side it is asked nothing."""
    return "image alone" if field == "image" else field.replace("_", " ")


def where(best: LayerFinding) -> str:
    """A layer and question in words."""
    return f"{place(best.tower, best.layer)}, {question(best.field)}"


def counted(condition: ConditionFinding) -> float:
    """The p-value that decides."""
    holm = condition.p_value_holm
    return condition.p_value if holm is None else holm


def model(condition: str) -> str:
    """A condition as people call it."""
    return "before fine-tuning" if condition == "base" else condition
