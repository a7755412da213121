"""The verdict of an identity audit: what it holds, and how it is reached.

`decide_identity` is the whole rule, and reads only numbers that other files computed.
"""

from __future__ import annotations

import math

from pydantic import Field

from lightleak.validity.verdict import BaseVerdict, Finding, Part, Range, Tier

# The level of a test that asks whether a negative control found more than chance would.
CONTROL_ALARM = 0.01


def percent(share: float) -> str:
    """A share as people write it: 5 %."""
    return f"{100 * share:.3g} %"


class IdentityCutoffs(Part):
    """The numbers that the rule turns on."""

    alpha: float = Field(
        0.05, gt=0, lt=0.5, description="level at which negative controls are counted"
    )
    false_discovery_rate: float = Field(
        0.05, gt=0, lt=0.5, description="expected share of wrong names among the people found"
    )
    tau: int = Field(1, ge=1, description="templates that must recognise a person, as published")
    detection: float = Field(
        0.5, gt=0, lt=1, description="share of known people to be found for a null to count"
    )


class PersonFound(Part):
    """One person whom the target knows."""

    person: str
    name: str
    p_value: float = Field(description="the name against decoys")
    face_p_value: float | None = Field(description="the photos against those of other people")
    q_value: float = Field(description="Benjamini-Hochberg over the people asked about")


class RateFinding(Part):
    """A share of people, with its exact interval."""

    count: int
    of: int
    rate: float | None
    ci95: Range | None


class PublishedFinding(Part):
    """The published attack among the same people."""

    names: int = Field(description="among how many names each photo was given one")
    templates: int
    suspects: RateFinding = Field(description="people recognised by at least tau templates")
    majority: RateFinding = Field(description="likewise by the earlier rule, half of the photos")
    controls: RateFinding | None = Field(description="likewise of people known to be out")


class ControlFinding(Part):
    """One negative control: people or names that cannot be found, put to the same test."""

    name: str
    rejected: RateFinding = Field(description="p-values at most alpha")
    p_excess: float | None = Field(description="beta-binomial: as many or more by chance")
    p_uniform: float | None = Field(description="Kolmogorov-Smirnov: the p-values are uniform")
    fired: bool
    sentence: str


class DecoyFinding(Part):
    """The names that true names are compared with."""

    fewest: int = Field(description="decoys of the person that has fewest")
    others: int = Field(description="other people whose photos each is compared with")
    strata: list[str]
    warnings: list[str]
    smallest_p: float
    resolvable: int = Field(description="people that must be found at once before any can be")


class PeopleCoverage(Part):
    """People and photos given, and those that could be used."""

    people: int
    people_tested: int
    photos: int
    photos_used: int
    truncated: int = Field(description="sentences longer than the model reads")


class IdentityVerdict(BaseVerdict):
    """What an identity audit found."""

    found: list[PersonFound]
    suspects: RateFinding = Field(description="people found")
    named: RateFinding = Field(description="people whose name is known, perhaps with another face")
    known: RateFinding | None = Field(description="people known to be in who would be found alone")
    published: PublishedFinding
    controls: list[ControlFinding]
    decoys: DecoyFinding
    coverage: PeopleCoverage
    cutoffs: IdentityCutoffs

    @property
    def sentence(self) -> str:
        """The finding in one sentence that needs no statistics."""
        tested = f"{self.suspects.of:,} {'person' if self.suspects.of == 1 else 'people'}"
        if self.verdict == "exposed":
            how = "very likely" if self.tier == "randomised" else "probably"
            if self.suspects.of == 1:
                return (
                    "The model knows this person by name: it ties the photos to the name and not "
                    f"to names that nobody taught it. Photos of the person were {how} in its "
                    "training data, with the name."
                )
            return (
                f"The model knows {self.suspects.count:,} of the {tested} by name: it ties their "
                "photos to their names and not to names that nobody taught it. Photos of theirs "
                f"were {how} in its training data, with their names."
            )
        if self.verdict == "no_evidence":
            return (
                f"The model was not found to know any of the {tested} by name, by a test that "
                "finds people who are known to be in its data. This does not show that none is."
            )
        if self.tier != "none" and self.named.count:
            if self.named.of == 1:
                return (
                    "The model knows the name. Whether it knows the face or only a namesake, these "
                    "data cannot say."
                )
            return (
                f"The model knows {self.named.count:,} of {self.named.of:,} names. Whether it "
                "knows their faces or only namesakes, these data cannot say."
            )
        return (
            f"These data cannot support an answer about the {tested}: neither that the model "
            "knows anyone by name nor that it does not."
        )


def decide_identity(
    *,
    design: str,
    found: list[PersonFound],
    named: RateFinding,
    known: RateFinding | None,
    controls: list[ControlFinding],
    decoys: DecoyFinding,
    cutoffs: IdentityCutoffs,
) -> tuple[Finding, Tier, list[str]]:
    """Reach the verdict: what forbids an answer first, then who was found, then the power."""
    forbidding = [control.sentence for control in controls if control.fired]
    alone = math.ceil(named.of / cutoffs.false_discovery_rate - 1e-9) - 1
    if decoys.resolvable > named.of:
        forbidding.append(
            f"With {decoys.fewest} decoys no p-value lies below {decoys.smallest_p:.2g}, which is "
            f"too coarse to name anyone among {named.of} people: give {alone} decoys or more."
        )
    if forbidding:
        return "inconclusive", "none", forbidding
    lots = design == "randomised"
    tier: Tier = "randomised" if lots else "observational"
    reasons = [
        "Names were declared to be drawn by lot, like the decoys."
        if lots
        else "Nobody drew lots for the names. Decoys stand in for them; that the model has read "
        "decoys as often as the true names is an assumption, which the test on faces does not need."
    ]
    reasons += decoys.warnings
    reasons.append(
        f"{named.count} of {named.of} names fit better than their decoys beyond chance: of those "
        f"at most {percent(cutoffs.false_discovery_rate)} are expected to be there wrongly."
        if named.count and named.of > 1
        else "The name fits better than its decoys beyond chance."
        if named.count
        else "No name fits better than its decoys beyond chance."
    )
    if named.count and not lots:
        reasons.append(_about_faces(len(found), named, decoys.others, cutoffs))
    if found:
        return "exposed", tier, reasons
    if named.count:
        return "inconclusive", tier, reasons
    if known is None or known.ci95 is None:
        reasons.append(
            "Whether people who are in the data would be found is not known: nothing can be read "
            "into the absence of findings. Give people known to be in it with --known."
        )
        return "inconclusive", tier, reasons
    power = (
        f"{known.count} of {known.of} people known to be in the data would be found, 95 % "
        f"interval {percent(known.ci95[0])} to {percent(known.ci95[1])}"
    )
    if known.ci95[0] >= cutoffs.detection:
        return "no_evidence", tier, [*reasons, f"{power}."]
    reasons.append(f"{power}: too few to read anything into the absence of findings.")
    return "inconclusive", tier, reasons


def _about_faces(found: int, named: RateFinding, others: int, cutoffs: IdentityCutoffs) -> str:
    """Whether the names that are known may be those of namesakes."""
    # All that are named could be found at once at best.
    needed = math.ceil(named.of / (cutoffs.false_discovery_rate * named.count) - 1e-9) - 1
    alone = math.ceil(named.of / cutoffs.false_discovery_rate - 1e-9) - 1
    if others < needed:
        return (
            f"To tell whether a known name is tied to this face or to a namesake's, photos of at "
            f"least {needed} other people are needed, even if all that are known can be tied; "
            f"{alone} to find any one person alone. There are {others}: give photos of people "
            "known to be out with --controls."
        )
    if named.of == 1:
        fits = "also fits" if found else "does not fit"
        return f"It {fits} this person's photos better than those of {others} others."
    rest = "; the rest may be known from a namesake" if found < named.count else ""
    return (
        f"{found} of these {named.count} also fit their person's photos better than photos of "
        f"{others} others{rest}. The correction holds for both tests together."
    )
