"""What the negative controls found, from what is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from lightleak.audits.gather_controls import PLANNED, shuffled_folder
from lightleak.audits.set_tests import SetTests
from lightleak.audits.settings import AuditSettings
from lightleak.audits.stored import Compared, Measured, compared, load, score
from lightleak.evidence.readings import Floats
from lightleak.runs import Run, read_json
from lightleak.validity.verdict import SHUFFLED, ControlFinding, CountingTest, p_words

# Random halves of the controls that are compared with each other; the residual test is slow.
HALVES = {"permutation": 20, "residual": 3}


@dataclass(frozen=True)
class ControlScores:
    """Scores of the primary signal elsewhere than on the audited pairs at the target; (n,) each.

    Attributes:
        models: by control model.
        shuffled: by model, "" being the target, of the images with other texts.
    """

    models: dict[str, Floats]
    shuffled: dict[str, Floats]

    @staticmethod
    def covers(values: Floats, data: Compared, settings: AuditSettings) -> bool:
        """Whether a control model scored enough of the compared records, on both sides alike."""
        scored = np.isfinite(values[data.rows])
        sides = [scored[data.suspect], scored[~data.suspect]]
        if min(int(each.sum()) for each in sides) < settings.cutoffs.fewest_records:
            return False
        apart = abs(float(sides[0].mean() - sides[1].mean()))
        return apart <= settings.cutoffs.lopsided_failures


def control_scores(run: Run, settings: AuditSettings, measured: Measured) -> ControlScores:
    """Read what the control passes left, in the order of `measured`; NaN where there is none."""
    planned = run.evidence / PLANNED
    names = read_json(planned)["models"] if planned.is_file() else []
    return ControlScores(
        {name: _aligned(run, settings, measured, name.replace(" ", "-")) for name in names},
        {
            name: _aligned(run, settings, measured, shuffled_folder(name))
            for name in ("", "base")
            if any((run.evidence / shuffled_folder(name)).glob("part-*.parquet"))
        },
    )


def _aligned(run: Run, settings: AuditSettings, measured: Measured, folder: str) -> Floats:
    other = load(run, run.evidence / folder)
    scores = score(settings, other, settings.primary)
    by_id = dict(zip(other.ids, scores.tolist(), strict=True))
    return np.array([by_id.get(key, math.nan) for key in measured.ids])


def find(
    tests: SetTests,
    measured: Measured,
    scores: Floats,
    controls: ControlScores,
    test: CountingTest,
) -> list[ControlFinding]:
    """Every negative control that could be run, by the test that counts for the target."""
    settings = tests.settings
    audited = compared(measured, scores)
    found = [
        _control_model(tests, compared(measured, values), name, test)
        if controls.covers(values, audited, settings)
        else _not_compared(name)
        for name, values in controls.models.items()
    ]
    found.append(_halves(tests, audited, test))
    if "" in controls.shuffled:
        found.append(_pairs(tests, measured, scores, controls))
    elif settings.negative_controls and settings.fitted(tests.signal):
        why = "Not run: the primary signal is fitted, and a fit on wrong pairs is another signal."
        found.append(ControlFinding(name=SHUFFLED, sentence=why))
    elif settings.negative_controls and settings.only([tests.signal]).asks:
        why = "Not run: for other prompts every answer would have to be asked for again."
        found.append(ControlFinding(name=SHUFFLED, sentence=why))
    elif settings.negative_controls and settings.only([tests.signal]).across:
        why = (
            "Not run: the primary signal compares models, and only the target was to be asked "
            "about wrong pairs."
        )
        found.append(ControlFinding(name=SHUFFLED, sentence=why))
    return found


def _tails(tests: SetTests, data: Compared, test: CountingTest) -> tuple[float, float] | None:
    """p-values that suspects score higher, and lower."""
    if not data.enough():
        return None
    if test == "permutation":
        lower = replace(data, scores=-data.scores)
        return tests.permutation(data), tests.permutation(lower)
    residual = tests.residual(data)
    return None if residual is None else (residual.p_value, residual.p_value_below)


def _control_model(
    tests: SetTests, data: Compared, name: str, test: CountingTest
) -> ControlFinding:
    """A model that cannot have seen the suspects must not set them apart, in either direction."""
    tails, area = _tails(tests, data, test), tests.auc(data)
    if area is None or tails is None:
        return _not_compared(name)
    if not np.ptp(data.scores):
        return ControlFinding(
            name=name,
            sentence=f"The {name} scores all records alike, since {tests.signal} compares with it: "
            "this shows nothing.",
        )
    p_value = min(1.0, 2 * min(tails))
    fired = p_value <= tests.settings.cutoffs.control_alarm
    measured = f"(AUC {area.value:.3f}; by the test that counts {p_words(p_value)}, two-sided)"
    sentence = (
        f"The {name}, which is said not to have seen the suspects, sets them apart from the "
        f"controls as well {measured}: what the target shows need not come from training."
        if fired
        else f"The {name}, which is said not to have seen the suspects, does not set them apart "
        f"{measured}."
    )
    return ControlFinding(
        name=name,
        sentence=sentence,
        auc=area.value,
        auc_ci95=(area.low, area.high),
        p_value=p_value,
        fired=fired,
    )


def _not_compared(name: str) -> ControlFinding:
    sentence = (
        f"The {name} was to be asked about the same records, and could not score enough of them "
        "on both sides alike: what it would have shown is not known."
    )
    return ControlFinding(name=name, sentence=sentence, fired=True)


def _halves(tests: SetTests, data: Compared, test: CountingTest) -> ControlFinding:
    """Controls against controls: random halves must differ no more often than the level allows."""
    name = "controls against controls"
    own = data.where(~data.suspect)
    units = np.unique(own.groups)
    level = tests.settings.cutoffs.control_alarm
    rejected = tried = 0
    for draw in range(HALVES[test]):
        random = np.random.default_rng([tests.settings.seed, 5, draw])
        half = random.permutation(units)[: units.size // 2]
        tails = _tails(tests, replace(own, suspect=np.isin(own.groups, half)), test)
        if tails is not None:
            tried += 1
            rejected += tails[0] <= level
    if not tried:
        return ControlFinding(name=name, sentence="There are too few controls to halve them.")
    chance = float(stats.binom.sf(rejected - 1, tried, level))
    told = f"{rejected} of {tried} random halves of the controls were told apart at {level:g}"
    return ControlFinding(
        name=name,
        sentence=f"{told}, more than chance allows: on these data the test alarms too often."
        if chance <= level
        else f"{told}, as chance allows.",
        p_value=chance,
        fired=chance <= level,
    )


def _pairs(
    tests: SetTests, measured: Measured, scores: Floats, controls: ControlScores
) -> ControlFinding:
    """Whether the target knows the pairs, or each half by itself; explains, and never forbids.

    Of every record, how far its score falls when the image gets another text; less how far it
    falls at the base, where there is one.
    """
    fall = scores - controls.shuffled[""]
    by = "more than on a wrong one"
    if {"base"} <= controls.models.keys() & controls.shuffled.keys():
        fall = fall - (controls.models["base"] - controls.shuffled["base"])
        by += ", and more than at the base"
    pairs, halves = compared(measured, fall), compared(measured, controls.shuffled[""])
    area, apart = tests.auc(pairs), tests.auc(halves)
    if area is None or apart is None:
        return ControlFinding(name=SHUFFLED, sentence="Too few pairs could be shuffled.")
    p_value = tests.permutation(pairs)
    wrong = (
        f"With wrong images the suspects' texts are told apart with AUC {apart.value:.3f} "
        f"[{apart.low:.3f}, {apart.high:.3f}]."
    )
    measured_words = f"(AUC {area.value:.3f} [{area.low:.3f}, {area.high:.3f}], {p_words(p_value)})"
    knows = p_value <= tests.settings.cutoffs.alpha
    return ControlFinding(
        name=SHUFFLED,
        sentence=(
            f"Suspects score higher on the true pair {by}, and by more than controls do "
            f"{measured_words}: the target tells their pairs, not only their texts, unless the "
            f"sets differ in what their images add. {wrong}"
            if knows
            else f"Suspects gain no more from the true pair than controls do {measured_words}: "
            f"what sets them apart, if anything does, may be the texts by themselves. {wrong}"
        ),
        auc=area.value,
        auc_ci95=(area.low, area.high),
        p_value=p_value,
    )
