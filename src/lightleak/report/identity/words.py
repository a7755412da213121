"""What an identity verdict means, what it does not, and how its checks came out."""

from __future__ import annotations

from lightleak import statistics as st
from lightleak.report.identity.contents import Contents, People, Person
from lightleak.report.words import Check, Mark, p_value, percent, thousands
from lightleak.validity import IdentityVerdict

# From the weakest to the strongest.
TIERS = {
    "none": ("None", "No test counts here: the reasons below forbid an answer."),
    "observational": (
        "Observational",
        "Nobody drew lots for the names. Decoys of the same kind stand in for each; whether they "
        "were as likely a name for this face is an assumption.",
    ),
    "randomised": (
        "Randomised",
        "It is declared that lots decided what people are called in the data, as they decided the "
        "decoys, so that only training can tie a name to a face. This is the strongest design.",
    ),
}

SETS = {
    "suspect": ("Suspects", "may be in the data"),
    "known": ("Known", "known to be in the data"),
    "control": ("Controls", "known not to be in the data"),
}

# What one curve of each set shows.
CURVES = {
    "suspect": "Suspects: people found",
    "known": "Known to be in the data: people rightly found",
    "control": "Controls: people wrongly found",
}

GLOSSARY = {
    "Suspects, known, controls": "Suspects are the people who may be in the training data. Known "
    "people are in it for certain, and show what the test finds. Controls are for certain not in "
    "it, and show what it finds wrongly.",
    "Decoy": "A name of the same kind as the true one (script, gender, number of words, how "
    "common) that belongs to nobody on the photos.",
    "Template": "A sentence that a name is put into, as “a photo of …”.",
    "p-value": "Of the name: the share of the names, the true one among them, that rank at least "
    "as high on the person's photos. Of the face: the share of the people, this one among them, on "
    "whose photos the name stands out as far. Neither is the chance that the model does not know "
    "the person.",
    "q-value": "The share of wrong names to be expected if this person and everyone above were "
    "named (Benjamini and Hochberg). Only suspects have one.",
    "Recognised": "By a template: of all names it gave the photos, the true one came most often, "
    "and no other as often.",
    "Negative control": "The same test where it can find nothing: people known to be out, photos "
    "under the names of others, a model that cannot have seen them.",
    "95 % interval": "The range that a procedure gives which covers the true value in 95 of 100 "
    "audits; for shares of people the exact one of Clopper and Pearson.",
}


def not_shown(verdict: IdentityVerdict) -> list[str]:
    """What a reader might take the verdict to show, and it does not."""
    if verdict.verdict == "inconclusive":
        return _not_shown_inconclusive()
    if verdict.verdict == "no_evidence":
        return _not_shown_no_evidence(verdict)
    return _not_shown_exposed(verdict)


def _not_shown_exposed(verdict: IdentityVerdict) -> list[str]:
    rests_on = (
        "That lots were drawn as declared. The page takes the owner's word for it."
        if verdict.tier == "randomised"
        else "That nothing but training ties a name to a face. A name that suits a face by origin "
        "or age may fit better than its decoys do."
    )
    return [
        "Which photos were used. Those shown to the model need not be among them.",
        "That a photo and the name stood in one document, how they came there, or whether that "
        "was allowed.",
        "Anything about people who were not found. Not to be found is not to be absent.",
        rests_on,
        "Certainty about any one name. Of the names found, at most "
        f"{percent(verdict.cutoffs.false_discovery_rate)} are expected to be wrong.",
    ]


def _not_shown_no_evidence(verdict: IdentityVerdict) -> list[str]:
    return [
        "That none of these people is in the data. Absence of a trace is not absence.",
        "People whose trace is weaker than that of the known ones, as when there were few photos "
        "of them or the name was spelt otherwise.",
        "That their photos were not used without their names: the test sees only what ties the "
        "two.",
        "Anything about another model, or another version of this one: what was audited is the "
        "set of weights whose hash is recorded below.",
        f"Anything about other people than these {thousands(verdict.suspects.of)}.",
    ]


def _not_shown_inconclusive() -> list[str]:
    return [
        "That the model knows any of these people, even where a number below looks striking.",
        "That it does not. This does not clear the model.",
        "A fault of the model or of the photos. It is the comparison that cannot carry an answer; "
        "the reasons say what would have to change.",
        "Anything that may be quoted alone: no p-value on this page is a finding.",
    ]


def steps(contents: Contents) -> list[tuple[str, str, str]]:
    """The test, step by step: its name, its source, and what is done."""
    verdict = contents.verdict
    tested, decoys = verdict.suspects.of, verdict.decoys
    level = percent(verdict.cutoffs.false_discovery_rate)
    return [
        (
            "The name among decoys",
            "conformal p-value, Bates et al. 2023",
            "For each photo and template the true name is ranked by how well it fits, among its "
            "decoys: names of the same kind that belong to nobody on the photos. The mean of "
            "1/rank is compared with that of every decoy. To a model that does not know the "
            "person the true name is one name among others. p is the share of the names, the true "
            "one among them, that do at least as well.",
        ),
        ("The face among others", "", _face(contents)),
        (
            "Correct for many people",
            "Benjamini and Hochberg 1995",
            f"Of {_people(tested)} some do well by chance. Whoever has a q-value of at most "
            f"{level} is found: of those found, so many are expected to be found wrongly.",
        ),
        (
            "What can be resolved",
            "",
            f"Among {thousands(decoys.fewest)} decoys no p-value lies below "
            f"{p_value(decoys.smallest_p)}. "
            + _resolved(decoys.resolvable, tested)
            + (
                ""
                if contents.design == "randomised"
                else f" Among the photos of {decoys.others:,} others none lies below "
                f"{p_value(1 / (decoys.others + 1))}. " + _resolved(_least_faces(verdict), tested)
            ),
        ),
    ]


def _resolved(least: int, tested: int) -> str:
    if least > tested:
        return f"So among {_people(tested)} nobody can be found."
    if least <= 1:
        return f"That is enough to find one among {_people(tested)}."
    return f"So among {_people(tested)} at least {thousands(least)} must be found at once."


def _least_faces(verdict: IdentityVerdict) -> int:
    """How many must be found at once, as finely as the test on faces can tell."""
    level = verdict.cutoffs.false_discovery_rate
    return st.smallest_resolvable(verdict.suspects.of, verdict.decoys.others, level)


def _face(contents: Contents) -> str:
    if contents.design == "randomised":
        return "Not asked: lots decided the names, so a known name is no namesake's."
    verdict = contents.verdict
    return (
        "A known name may be a namesake's. So it is asked on whose photos the name stands out from "
        f"its decoys: on this person's, or as far on those of the {verdict.decoys.others:,} other "
        "people given. p is the share of the people, this one among them, on whose photos it "
        "stands out at least as far. The larger of both p-values decides."
    )


def checks(contents: Contents) -> list[Check]:
    """Every validity check, passed or not."""
    verdict = contents.verdict
    return [
        *_negative_controls(verdict),
        _enough_decoys(verdict),
        *_fair_decoys(verdict),
        *_enough_others(contents),
        _known(verdict),
        _coverage(verdict),
        *_read_whole(contents),
    ]


def _negative_controls(verdict: IdentityVerdict) -> list[Check]:
    name = "The test finds no more than chance where nothing can be found"
    if not verdict.controls:
        unknown = "No negative control was run: what the test finds wrongly is not known."
        return [Check(name, "not run", unknown)]
    return [
        Check(name, "failed" if each.fired else "passed", each.sentence)
        for each in verdict.controls
    ]


def _enough_decoys(verdict: IdentityVerdict) -> Check:
    name, decoys, tested = "There are enough decoys", verdict.decoys, verdict.suspects.of
    told = f"{thousands(decoys.fewest)} for each person"
    if decoys.resolvable > tested:
        return Check(name, "failed", f"{told}: too few to name anyone among {_people(tested)}.")
    if decoys.resolvable > 1:
        least = thousands(decoys.resolvable)
        return Check(name, "caution", f"{told}: nobody can be named unless {least} are at once.")
    return Check(name, "passed", f"{told}: enough to name one among {_people(tested)}.")


def _fair_decoys(verdict: IdentityVerdict) -> list[Check]:
    name = "Decoys are of the kind of the true names"
    if not verdict.decoys.warnings:
        return [Check(name, "passed", "Nothing was found that sets a true name apart from them.")]
    return [Check(name, "caution", each) for each in verdict.decoys.warnings]


def _enough_others(contents: Contents) -> list[Check]:
    if contents.design == "randomised":
        return []
    verdict = contents.verdict
    others = verdict.decoys.others
    least = _least_faces(verdict)
    enough = least <= verdict.suspects.of
    told = f"Each person's photos were compared with those of {others:,} others"
    rest = (
        ": too few to find anyone; give more with --controls"
        if not enough
        else f": nobody can be found unless {thousands(least)} are at once"
        if least > 1
        else ""
    )
    name = "A name can be told from a namesake's"
    mark: Mark = "failed" if not enough else "caution" if least > 1 else "passed"
    return [Check(name, mark, f"{told}{rest}.")]


def _known(verdict: IdentityVerdict) -> Check:
    name, known = "People who are in the data are found", verdict.known
    if known is None or known.ci95 is None:
        unknown = "Nobody known to be in the data was given (--known): who is missed is not known."
        return Check(name, "not run", unknown)
    told = (
        f"{known.count:,} of {known.of:,} people known to be in the data would be found alone, "
        f"95 % interval {percent(known.ci95[0])} to {percent(known.ci95[1])}"
    )
    if known.ci95[0] >= verdict.cutoffs.detection:
        return Check(name, "passed", f"{told}.")
    return Check(name, "caution", f"{told}: nothing can be read into not being found.")


def _coverage(verdict: IdentityVerdict) -> Check:
    counts = verdict.coverage
    whole = (counts.people_tested, counts.photos_used) == (counts.people, counts.photos)
    told = (
        f"{counts.people_tested:,} of {counts.people:,} people were tested, with "
        f"{counts.photos_used:,} of {counts.photos:,} photos."
    )
    rest = "" if whole else " The others are listed under failures; none counts as not found."
    return Check("All people and photos count", "passed" if whole else "caution", f"{told}{rest}")


def _read_whole(contents: Contents) -> list[Check]:
    cut = contents.verdict.coverage.truncated
    if not cut:
        return []
    told = (
        f"{cut:,} sentences were longer than the model reads, and were cut: names "
        "at their end may be missing."
    )
    return [Check("Every name was read whole", "caution", told)]


def outcome(person: Person, verdict: IdentityVerdict) -> str:
    """What the table says of a person beside the numbers."""
    if person.name_q_value is None:
        return "–"
    if person.found:
        return "found"
    if person.name_q_value > verdict.cutoffs.false_discovery_rate:
        return "not found"
    return "does not count" if verdict.tier == "none" else "name only"


def left_out(groups: list[People], file: str) -> str | None:
    """Who is not shown for lack of room; None when all are."""
    missing = [
        f"{group.left_out:,} of the {SETS[group.set][0].lower()}"
        for group in groups
        if group.left_out
    ]
    if not missing:
        return None
    return f"Left out for lack of room: {', '.join(missing)}; see {file}."


def declared(design: str) -> str:
    """How people came by the names that stand in the data, as the owner says."""
    return {
        "randomised": "lots decided what people are called in the data",
        "observational": "no random design declared",
    }[design]


def _people(number: int) -> str:
    return f"{number:,} {'person' if number == 1 else 'people'}"
