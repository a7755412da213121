"""The verdict: what it holds, as written to verdict.json, and how it is reached.

`decide` is the whole rule, and reads only numbers that other files computed.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lightleak.errors import UserError

Finding = Literal["exposed", "no_evidence", "inconclusive"]
Tier = Literal["randomised", "held_out", "observational", "none"]
Design = Literal["randomised", "held-out", "observational"]
SCHEMA_VERSION = "2.0"
# Classifiers that see the records and no model, by what they look at.
BLIND_PARTS = ("text", "image", "joint", "trees")
# Level at which a single feature, or the permutation null, says that the sets differ.
_DIFFERS = 0.01
# What control models are called.
CONTROL_MODELS = ("base", "control target")
# The negative control that explains and never alarms.
SHUFFLED = "texts shuffled among the images"
CountingTest = Literal["permutation", "residual"]
Range = tuple[float, float]


class Part(BaseModel):
    """A part of verdict.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Cutoffs(Part):
    """The numbers that the rule turns on; recorded in the manifest and printed with the verdict."""

    alpha: float = Field(
        # Of 10,000 permutations none is rarer than 1 in 10,001.
        0.01,
        ge=0.001,
        lt=0.5,
        description="level of the test that counts",
    )
    blind_refuse: float = Field(
        0.90, gt=0.5, le=1, description="blind AUC from which nothing can be said"
    )
    blind_held_out: float = Field(
        0.55, gt=0.5, le=1, description="largest upper end of the blind interval in a hold-out"
    )
    detectable_auc: float = Field(
        0.60, gt=0.5, lt=1, description="AUC to be detectable for a null to count"
    )
    fewest_records: int = Field(
        20, ge=2, description="fewest scored records, and groups of them, on each side"
    )
    lopsided_failures: float = Field(
        0.05, ge=0, le=1, description="largest difference in failure rates"
    )
    effective_share: float = Field(
        0.20, ge=0, lt=1, description="least share of the controls that resembles the suspects"
    )
    control_alarm: float = Field(
        0.01, ge=0.001, lt=0.5, description="level at which a negative control alarms"
    )


class RateAtFpr(Part):
    """True-positive rate where at most so many controls are accused."""

    tpr: float
    ci95: Range
    fpr_ci95: Range


class Prevalence(Part):
    """Share of the suspects that was used.

    Without known members only a lower bound can be given: the estimate is null, and the interval
    reaches from the bound to 1.
    """

    estimate: float | None
    ci95: Range
    method: Literal["known members", "lower bound"]


class SignalFinding(Part):
    """One signal over all scored records."""

    auc: float | None
    auc_ci95: Range | None
    tpr_at_fpr: dict[str, RateAtFpr | None]
    tpr_at_fpr_reason: dict[str, str] = Field(description="why a rate is null")
    p_value: float | None
    p_value_holm: float | None = Field(description="Holm-adjusted over the signals shown")
    prevalence: Prevalence | None = Field(
        None, description="null where the sets differ by themselves or cannot be compared"
    )
    orientation: str
    n_unscorable: int
    source: str
    options: dict[str, Any]


class PrimaryFinding(Part):
    """The pre-registered signal, which alone carries the verdict."""

    signal: str
    auc: float | None
    auc_ci95: Range | None
    p_value: float | None = Field(description="permutation over the unit of assignment")
    p_value_adjusted: float | None = Field(description="residual test given the blind features")
    test: CountingTest = Field(description="which of the two counts")
    tests: dict[str, float | None] = Field(
        description="p-values of every test of the set; those that do not count are for comparison"
    )
    robustness: float | None = Field(
        description="share of what is left of side and score that an unseen difference would "
        "have to explain to bring the residual test's estimate to nought"
    )
    n_suspect: int
    n_control: int


class BlindFinding(Part):
    """How well the sides are told apart without the model, from one kind of feature."""

    auc: float
    auc_ci95: Range


class DifferenceFinding(Part):
    """A blind feature on which the sides differ."""

    feature: str
    sentence: str
    auc: float
    p_value_adjusted: float


class DuplicateFinding(Part):
    """Records that stand on both sides."""

    suspect: str
    control: str
    kind: str


class PowerFinding(Part):
    """What the sizes of the two sides could have detected.

    Groups are what is sampled together; a record without one is a group of its own.
    """

    min_detectable_auc: float | None
    suspect_groups: int
    control_groups: int


class ControlFinding(Part):
    """A negative control: a comparison in which nothing may be found, or one that explains.

    `p_value` is that of the test that counts; null where it could not be computed.
    """

    name: str
    sentence: str
    auc: float | None = None
    auc_ci95: Range | None = None
    p_value: float | None = None
    fired: bool = Field(
        False,
        description="whether it found what it may not, or was asked for and could not be "
        "compared: no answer then",
    )

    @property
    def model(self) -> bool:
        """Whether it is a model that cannot have seen the suspects."""
        return self.name in CONTROL_MODELS


class InferenceFinding(Part):
    """Dataset inference: all signals that need no fit, combined on one half, tested on the other.

    It finds any difference between the sets; beside the verdict, never behind it.
    """

    p_value: float
    control_p_value: float = Field(description="controls against controls: must not reject")
    shuffled_p_value: float = Field(description="with labels dealt anew: must not reject")
    signals: list[str]


class ValidityFinding(Part):
    """The checks behind the verdict."""

    blind_auc: float | None = Field(description="of the stronger of joint and trees")
    blind_auc_ci95: Range | None
    blind_p_value: float | None = Field(description="permutation null of the joint classifier")
    effective_share: float | None = Field(
        description="of the controls, once weighted to resemble the suspects"
    )
    blind: dict[str, BlindFinding]
    unread_fields: list[str] = Field(
        default_factory=list,
        description="entries of the records' meta that the blind baseline was not shown",
    )
    differences: list[DifferenceFinding]
    duplicates: int = Field(description="pairs of records that stand on both sides")
    duplicate_pairs: list[DuplicateFinding]
    power: PowerFinding
    controls: list[ControlFinding] = Field(description="negative controls")

    @property
    def differs(self) -> bool:
        """Whether the sets are known to differ by themselves, or nothing is known about it.

        One plain column may tell what thousands of terms drown, so a single feature counts, too.
        """
        if self.blind_auc_ci95 is None or self.blind_auc_ci95[0] > 0.5:
            return True
        single = [each.p_value_adjusted for each in self.differences]
        return min(single, default=1.0) <= _DIFFERS or (self.blind_p_value or 1.0) <= _DIFFERS

    @property
    def highest_blind(self) -> float:
        """The largest upper end of the intervals of the classifiers that see everything."""
        ends = [self.blind[name].auc_ci95[1] for name in ("joint", "trees") if name in self.blind]
        return max(ends, default=0.0 if self.blind_auc_ci95 is None else self.blind_auc_ci95[1])


class ComparedFinding(Part):
    """The other models that signals which compare models asked about the same records."""

    base: str | None = Field(description="what the target was fine-tuned from, where it is known")
    references: int = Field(description="models of known membership")
    recipe: dict[str, Any] | None = Field(description="how the references were trained")
    epoch: int | None = Field(description="of the references' training")
    suspects_seen: int = Field(description="suspects that some reference was trained on")
    controls_seen: int
    records: int = Field(description="suspects and controls")
    shares: str = Field(
        description="`made`, or why it was not solved how much of each record is in what "
        "fine-tuning changed"
    )


class SideCoverage(Part):
    """Records of one side."""

    attempted: int
    scored: int
    failed: int


class Coverage(Part):
    """Records attempted, scored by the primary signal, and failed."""

    attempted: int
    scored: int
    failed: int
    suspect: SideCoverage
    control: SideCoverage
    set_aside: int = Field(0, description="controls that are a dual encoder's bank of negatives")


class BaseVerdict(Part):
    """What every kind of audit ends in."""

    schema_version: str = SCHEMA_VERSION
    verdict: Finding
    tier: Tier
    reasons: list[str]

    @property
    def sentence(self) -> str:
        """The finding in one sentence that needs no statistics."""
        raise NotImplementedError

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read verdict.json.

        Raises:
            UserError: it is missing or does not follow the schema.
        """
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise UserError(
                f"no verdict can be read from it ({str(error).splitlines()[0]})", str(file)
            ) from error

    def _repr_html_(self) -> str:
        rows = "".join(f"<li>{html.escape(reason)}</li>" for reason in self.reasons)
        return (
            f"<div><strong>{self.verdict}</strong> (evidence: {self.tier})"
            f"<p>{html.escape(self.sentence)}</p><ul>{rows}</ul></div>"
        )


class Verdict(BaseVerdict):
    """What a membership audit found."""

    primary: PrimaryFinding
    signals: dict[str, SignalFinding]
    validity: ValidityFinding
    prevalence: Prevalence | None = Field(description="by the primary signal")
    dataset_inference: InferenceFinding | None
    compared: ComparedFinding | None = Field(
        None, description="null where no signal compares models"
    )
    coverage: Coverage
    cutoffs: Cutoffs

    @property
    def p_that_counts(self) -> float | None:
        """The p-value that decided; None where none may."""
        if self.tier == "none":
            return None
        primary = self.primary
        return _counting(self.tier, primary.test, primary.p_value, primary.p_value_adjusted)

    @property
    def sentence(self) -> str:
        """The finding in one sentence that needs no statistics."""
        n = f"{self.primary.n_suspect:,} suspect records"
        if self.verdict == "exposed":
            return (
                f"The model treats the {n} as it treats what it was trained on, and not as it "
                "treats comparable records that it was not: at least part of them was very "
                "likely used in training."
            )
        if self.verdict == "no_evidence":
            return (
                f"No evidence was found that the {n} were used in training, by a test that "
                "would have found a moderate effect. This does not show that none was used."
            )
        return (
            f"These data cannot support an answer about the {n}: neither that they were used in "
            "training nor that they were not."
        )


def json_schema(name: str = "verdict") -> dict[str, Any]:
    """The JSON Schema of verdict.json, as shipped with the package.

    Args:
        name: `verdict` for a membership audit, `identity` for an identity audit, `probing` for a
            probe.
    """
    text = resources.files("lightleak.validity").joinpath(f"{name}.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


@dataclass(frozen=True)
class Decision:
    """The verdict proper."""

    verdict: Finding
    tier: Tier
    reasons: tuple[str, ...]
    test: CountingTest


def decide(
    *,
    design: Design,
    primary: SignalFinding,
    primary_p_adjusted: float | None,
    validity: ValidityFinding,
    coverage: Coverage,
    cutoffs: Cutoffs,
) -> Decision:
    """Reach the verdict.

    First what forbids an answer; then which test counts under the declared design, if the data
    bear the design out; then its p-value, and whether a null result had the power to mean
    anything.
    """
    forbidding = _forbidding(primary, validity, coverage, cutoffs)
    tier, test, reasons = counting_test(design, validity, cutoffs)
    if forbidding:
        return Decision("inconclusive", "none", tuple(forbidding), test)
    p_value = _counting(tier, test, primary.p_value, primary_p_adjusted)
    if p_value is None:
        reasons.append("The test that counts could not be computed on these data.")
        return Decision("inconclusive", "none", tuple(reasons), test)
    if primary.auc is not None and primary.auc_ci95 is not None and primary.auc_ci95[1] < 0.5:
        reasons.append(
            f"Suspects score lower than controls (AUC {primary.auc:.3f}): a leak in the other "
            "direction, an error in the sign, or a difference between the sets. It is reported "
            "as it is and never turned round."
        )
        return Decision("inconclusive", tier, tuple(reasons), test)
    name = "permutation test" if test == "permutation" else "test adjusted for what differs"
    if tier == "held_out":
        name = "weaker of permutation and adjusted test"
    level = f"{p_words(p_value)}, at a level of {cutoffs.alpha:g}"
    if p_value <= cutoffs.alpha:
        reasons.append(f"The {name} rejects chance: {level}.")
        if validity.differs and not any(each.model for each in validity.controls):
            reasons.append(
                "No control model was run: a difference between the sets that is hard to learn "
                "from so many records, such as many rare words, could look the same."
            )
        return Decision("exposed", tier, tuple(reasons), test)
    reasons.append(f"The {name} does not reject chance: {level}.")
    if test == "residual" and validity.differs:
        reasons.append(
            "The sets differ by themselves, and adjusting for that costs power by an amount that "
            "is not known: nothing can be read into the absence of an effect."
        )
        return Decision("inconclusive", tier, tuple(reasons), test)
    detectable = validity.power.min_detectable_auc
    if detectable is not None and detectable <= cutoffs.detectable_auc:
        reasons.append(
            f"An effect of AUC {detectable:.3f} or more would have been found with 90 % "
            "probability (unadjusted; adjusting costs a little of that): no evidence at this "
            "power, which is not the same as not trained on."
        )
        return Decision("no_evidence", tier, tuple(reasons), test)
    reasons.append(
        "There are too few records to read anything into that: with these numbers only an AUC of "
        f"{detectable:.3f} would be found reliably, and {cutoffs.detectable_auc:.2f} is asked for."
        if detectable is not None
        else "There are too few records to read anything into that."
    )
    return Decision("inconclusive", tier, tuple(reasons), test)


def _counting(
    tier: Tier, test: CountingTest, permutation: float | None, residual: float | None
) -> float | None:
    """The p-value that decides. A small shift may hide below the blind interval's end: in a
    hold-out both tests must reject."""
    p_value = permutation if test == "permutation" else residual
    if tier == "held_out" and p_value is not None and residual is not None:
        return max(p_value, residual)
    return p_value


def _forbidding(
    primary: SignalFinding, validity: ValidityFinding, coverage: Coverage, cutoffs: Cutoffs
) -> list[str]:
    """Every reason why no answer may be given, whatever the p-value."""
    found: list[str] = []
    sides: Sequence[tuple[str, SideCoverage]] = (
        ("suspect", coverage.suspect),
        ("control", coverage.control),
    )
    for side, counts in sides:
        if counts.scored < cutoffs.fewest_records:
            found.append(
                f"Only {counts.scored} {side} records could be scored; "
                f"{cutoffs.fewest_records} are the least."
            )
    for side, groups in (
        ("suspect", validity.power.suspect_groups),
        ("control", validity.power.control_groups),
    ):
        if groups < cutoffs.fewest_records:
            found.append(
                f"The {side} records are only {groups} independent group(s); "
                f"{cutoffs.fewest_records} are the least."
            )
    rates = [counts.failed / max(1, counts.attempted) for _, counts in sides]
    if abs(rates[0] - rates[1]) > cutoffs.lopsided_failures:
        found.append(
            f"Failures fall on one side: {rates[0]:.0%} of the suspects and {rates[1]:.0%} of the "
            "controls could not be used, so what is left may differ for that reason alone."
        )
    if validity.duplicates:
        found.append(
            f"{validity.duplicates} pair(s) of records stand on both sides, or in the calibration "
            "or the bank as well, alike or nearly so: remove them from one and run again, or use "
            "--drop-duplicates."
        )
    if validity.blind_auc is None:
        found.append("The two sets are too small to check whether they differ by themselves.")
    elif validity.blind_auc >= cutoffs.blind_refuse:
        found.append(
            "The two sets can be told apart without the model (blind AUC "
            f"{validity.blind_auc:.3f}), so no score of the model can be attributed to training. "
            + " ".join(_as_sentence(each.sentence) for each in validity.differences[:3])
        )
    share = validity.effective_share
    apart = validity.blind_auc is None or validity.blind_auc >= cutoffs.blind_refuse
    # Where nothing overlaps there is nothing to weight either.
    if share is not None and share < cutoffs.effective_share and not apart:
        found.append(
            "Too few controls resemble the suspects: weighted to do so, they are worth "
            f"{share:.0%} of their number, and {cutoffs.effective_share:.0%} is asked for."
        )
    if primary.auc is None:
        found.append("The primary signal could not be computed.")
    found += [control.sentence for control in validity.controls if control.fired]
    return found


def counting_test(
    design: Design, validity: ValidityFinding, cutoffs: Cutoffs
) -> tuple[Tier, CountingTest, list[str]]:
    """The tier that the data bear out, the test that counts there, and why."""
    if validity.blind_auc is None or validity.blind_auc_ci95 is None:
        return "none", "residual", []
    low, high = validity.blind_auc_ci95
    blind = f"blind AUC {validity.blind_auc:.3f}, 95 % interval {low:.3f} to {high:.3f}"
    adjusted = "the test adjusts for what can be seen without the model."
    if design == "randomised":
        if not validity.differs:
            return (
                "randomised",
                "permutation",
                [f"A random draw was declared, and nothing contradicts it ({blind})."],
            )
        return (
            "observational",
            "residual",
            [f"A random draw was declared but the sets differ ({blind}): {adjusted}"],
        )
    if design == "held-out":
        highest = max(high, validity.highest_blind)
        if not validity.differs and highest <= cutoffs.blind_held_out:
            return "held_out", "permutation", [f"A random hold-out, and no shift found ({blind})."]
        return (
            "observational",
            "residual",
            [
                f"A hold-out was declared but a shift is not excluded ({blind}; no upper end, "
                f"here up to {highest:.3f}, may lie above {cutoffs.blind_held_out:.2f}): {adjusted}"
            ],
        )
    return "observational", "residual", [f"No random design was declared ({blind}): {adjusted}"]


def p_words(value: float) -> str:
    """A p-value in a sentence."""
    return "p < 0.0001" if value < 0.95e-4 else f"p = {value:.2g}"


def _as_sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."
