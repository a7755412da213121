"""The cheap half of an identity audit: from stored affinities to people, curves and verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import stats

from lightleak import statistics as st
from lightleak.audits.settings import IdentitySettings
from lightleak.errors import UserError
from lightleak.evidence.readings import Floats, Integers
from lightleak.runs import (
    EvidenceStore,
    Progress,
    Run,
    Silent,
    read_json,
    read_table,
    write_json,
    write_table,
)
from lightleak.signals.identity import (
    TOP,
    majority,
    reciprocal_ranks,
    recognised,
    share_at_least,
    standing_out,
    sub_samples,
    votes,
)
from lightleak.validity.identity import (
    CONTROL_ALARM,
    ControlFinding,
    DecoyFinding,
    IdentityVerdict,
    PeopleCoverage,
    PersonFound,
    PublishedFinding,
    RateFinding,
    decide_identity,
)

# The published curve: 1, 3, 5 … 29, 30 photos, 20 subsets of each size.
_SIZES = (*range(1, 30, 2), 30)
_REPEATS = 20


@dataclass(frozen=True)
class Fitted:
    """How well names fit photos, and who is who.

    Attributes:
        people, sets, true_names: of each person with a usable photo.
        names: all names; decoys first.
        n_decoys: how many of them are decoys, of all strata.
        own: (people,) the index of each person's true name.
        strata, candidate: (names,).
        shown: (photos,) which person.
        photos: (photos,) file names.
        mean: (names, photos) fit over all templates.
        own_fit: (people, photos, templates) how well each true name fits each photo.
        top: by stratum the fits and names of the decoys that fit best, (photos, templates, k).
        predicted: (photos, templates) the candidate that fits best.
        truncated: sentences that had to be cut.
    """

    people: list[str]
    sets: NDArray[np.str_]
    true_names: list[str]
    names: list[str]
    n_decoys: int
    own: Integers
    strata: Integers
    candidate: NDArray[np.bool_]
    shown: Integers
    photos: list[str]
    mean: NDArray[np.float32]
    own_fit: Floats
    top: dict[int, tuple[Floats, Integers]]
    predicted: Integers
    truncated: int

    def photos_of(self, person: int) -> Integers:
        """Which photos show a person."""
        return np.flatnonzero(self.shown == person)

    def decoys_of(self, person: int) -> Integers:
        """The names that stand in for a person's own."""
        return np.flatnonzero(self.strata[: self.n_decoys] == self.strata[self.own[person]])

    def rank(self, photos: Integers, person: int) -> Ranked:
        """A person's name among its decoys, by photos that need not be of that person."""
        decoys, (values, names) = self.decoys_of(person), self.top[self.strata[self.own[person]]]
        ranks = reciprocal_ranks(
            values[photos],
            np.searchsorted(decoys, names[photos]),
            self.own_fit[person, photos],
            len(decoys),
        )
        return Ranked(ranks, self.mean[np.ix_(np.r_[self.own[person], decoys], photos)])

    @cached_property
    def ranked(self) -> list[Ranked]:
        """Each person's name among its decoys, on the person's own photos."""
        return [self.rank(self.photos_of(i), i) for i in range(len(self.people))]

    def face_p_value(self, shown: int, person: int) -> float | None:
        """The share of people whose photos suit a person's name as well as those of `shown` do.

        `shown` is the person, or somebody else to see what the test makes of that; whose name it
        is counts as no other. Of others no more photos are taken than there are of `shown`: the
        mean of many strays less, so that few photos would stand out by their number alone. None
        where there are no others.
        """
        level, spread = self._levels[int(self.strata[self.own[person]])]
        standing = standing_out(self.mean[self.own[person]].astype(np.float64), level, spread)
        photos = self.photos_of(shown)
        others = [
            np.random.default_rng(k).permutation(self.photos_of(k))[: len(photos)]
            for k in range(len(self.people))
            if k not in (shown, person)
        ]
        if not others:
            return None
        by_person = [standing[each].mean() for each in (photos, *others)]
        return float(st.conformal_p_values(by_person[:1], by_person[1:])[0])

    @cached_property
    def _levels(self) -> dict[int, tuple[Floats, Floats]]:
        """By stratum, the mean and the standard deviation of its decoys' fits with each photo."""
        decoys = self.strata[: self.n_decoys]
        flat = np.zeros(self.mean.shape[1])
        levels: dict[int, tuple[Floats, Floats]] = {}
        levels |= dict.fromkeys(np.unique(self.strata).tolist(), (flat, flat))
        for stratum in np.unique(decoys).tolist():
            fits = self.mean[: self.n_decoys][decoys == stratum]
            level = fits.mean(axis=0, dtype=np.float64), fits.std(axis=0, dtype=np.float64)
            levels[stratum] = level
        return levels


@dataclass(frozen=True)
class Ranked:
    """A name, then its decoys, photo by photo: reciprocal ranks and mean fits, (1 + decoys, k)."""

    ranks: Floats
    fits: NDArray[np.float32]

    def p_value(self) -> float:
        """The share of names that do as well as this one."""
        return float(self.p_values(np.ones((self.ranks.shape[1], 1), dtype=bool))[0])

    def p_values(self, chosen: NDArray[np.bool_]) -> Floats:
        """(subsets,) likewise for subsets of the photos, (k, subsets)."""
        share = chosen / chosen.sum(axis=0)
        # Rounded, so that equal ranks stay equal however the products were summed.
        ranks = np.round(self.ranks @ share, 12)
        return share_at_least(ranks, self.fits.astype(np.float64) @ share)


def judge_identity(run: Run, progress: Progress | None = None) -> IdentityVerdict:
    """Test every person and decide, from what is stored.

    Writes people, predictions, decoys, curve, failures and verdict.

    Raises:
        UserError: the run has no complete evidence yet.
    """
    settings = IdentitySettings.read(**run.manifest()["settings"])
    with (progress or Silent()).stage("Testing people", 1) as advance:
        fitted = load(run.evidence)
        table = _people(fitted, settings)
        if settings.control_target is not None:
            other = load(run.evidence / "control-target")
            table = _with_other_model(table, other, settings)
        write_table(run.people_file, pa.table(table))
        write_table(run.predictions_file, _predictions(run, fitted))
        write_table(run.decoys_file, _decoys(fitted))
        write_table(run.curve_file, _curve(fitted, settings))
        unusable = read_table(run.evidence / "unusable.parquet")
        write_table(run.failures_file, unusable)
        verdict = _verdict(run, settings, fitted, table)
        write_json(run.verdict_file, verdict.model_dump(mode="json"))
        advance(1)
    return verdict


def load(folder: Path) -> Fitted:
    """Read the stored affinities.

    Raises:
        UserError: they are not complete, or damaged.
    """
    try:
        return _load(folder)
    except (OSError, pa.ArrowInvalid, KeyError, IndexError, ValueError, TypeError) as error:
        raise UserError(
            f"its evidence is missing or damaged ({str(error).partition(chr(10))[0]})",
            str(folder.parent),
            "Run the same audit again: it goes on where it was.",
        ) from error


def _load(folder: Path) -> Fitted:
    names = read_table(folder / "names.parquet")
    people = read_table(folder / "people.parquet").to_pydict()
    photos = read_table(folder / "photos.parquet").to_pydict()
    asked = read_json(folder / "asked.json")
    n_templates, parts = len(asked["templates"]), asked["parts"]
    n_people, n_photos = len(people["person"]), len(photos["photo"])
    n_decoys = names.num_rows - n_people
    strata = names["stratum"].to_numpy()
    mean = np.full((names.num_rows, n_photos), np.nan, np.float32)
    truncated = 0
    for part in _parts(folder, "mean", parts):
        truncated += int(part.schema.metadata[b"truncated"])
        mean[part["name"].to_numpy()] = np.stack(part["affinities"].to_numpy())
    if np.isnan(mean).any():
        raise UserError(
            f"how {int(np.isnan(mean).any(axis=1).sum())} names fit is not a number",
            str(folder.parent),
            "Is the model intact, and its precision wide enough?",
        )
    own_fit = np.zeros((n_people, n_templates, n_photos))
    for part in _parts(folder, "own", parts):
        fits = np.stack(part["affinities"].to_numpy()).reshape(-1, n_templates, n_photos)
        own_fit[part["name"].to_numpy() - n_decoys] = fits
    shape = (n_photos, n_templates)
    # A name that nothing can stand in for is compared with no decoy.
    none = np.zeros((*shape, 0)), np.zeros((*shape, 0), np.int64)
    tops: dict[int, tuple[Floats, Integers]] = {}
    for part in _parts(folder, "top", parts):
        stratum = int(strata[part["name"][0].as_py()[0]])
        tops[stratum] = _best(part, shape, TOP, tops.get(stratum))
    best = None
    for part in _parts(folder, "best", parts):
        best = _best(part, shape, 1, best)
    if best is None:
        raise KeyError("no candidate was tried")
    place = {key: i for i, key in enumerate(people["person"])}
    shown = np.array([place[key] for key in photos["person"]], dtype=np.int64)
    kept = np.unique(shown)  # People none of whose photos the model took are failures.
    return Fitted(
        people=[people["person"][i] for i in kept],
        sets=np.array([people["set"][i] for i in kept]),
        true_names=[people["name"][i] for i in kept],
        names=names["name"].to_pylist(),
        n_decoys=n_decoys,
        own=n_decoys + kept,
        strata=strata,
        candidate=names["candidate"].to_numpy(zero_copy_only=False),
        shown=np.searchsorted(kept, shown),
        photos=photos["photo"],
        mean=mean,
        own_fit=own_fit[kept].transpose(0, 2, 1),
        top={int(stratum): tops.get(int(stratum), none) for stratum in np.unique(strata)},
        predicted=best[1][..., 0],
        truncated=truncated,
    )


def _parts(folder: Path, stage: str, parts: dict[str, list[int]]) -> Iterator[pa.Table]:
    store = EvidenceStore(folder)
    for index in parts.get(stage, []):
        yield read_table(store.file(stage, index))


def _best(
    part: pa.Table, shape: tuple[int, int], count: int, before: tuple[Floats, Integers] | None
) -> tuple[Floats, Integers]:
    """The names that fit best of a block and of those before it; of equals the first."""
    at = part["photo"].to_numpy(), part["template"].to_numpy()
    lists = [np.stack(part[column].to_numpy()) for column in ("affinity", "name")]
    found = [np.zeros((*shape, each.shape[1]), each.dtype) for each in lists]
    for array, each in zip(found, lists, strict=True):
        array[at] = each
    values, names = found
    if before is not None:
        values = np.concatenate([before[0], values], axis=2)
        names = np.concatenate([before[1], names], axis=2)
    order = np.argsort(-values, axis=2, kind="stable")[..., :count]
    return np.take_along_axis(values, order, 2), np.take_along_axis(names, order, 2)


# -- each person -------------------------------------------------------------------------------


def _people(fitted: Fitted, settings: IdentitySettings) -> dict[str, list[Any]]:
    """One row a person, by column."""
    rows = [_person(fitted, settings, i) for i in range(len(fitted.people))]
    # People in and people out are not part of the question: only suspects are corrected for.
    suspects = np.flatnonzero(fitted.sets == "suspect")
    for column, p_column in (("name_q_value", "p_value"), ("q_value", "decisive_p_value")):
        adjusted = st.benjamini_hochberg([rows[i][p_column] for i in suspects]).adjusted
        by_row = dict(zip(suspects.tolist(), adjusted.tolist(), strict=True))
        for i, row in enumerate(rows):
            row[column] = by_row.get(i)
    for row in rows:
        q_value = row["q_value"]
        row["found"] = q_value and q_value <= settings.cutoffs.false_discovery_rate
    return {key: [row[key] for row in rows] for key in rows[0]}


def decisive(settings: IdentitySettings, name: float, face: float | None) -> float:
    """The p-value that decides of a person: the name's, or the larger of name's and face's.

    Where lots decided the names, no namesake can have put one into the data.
    """
    if settings.design == "randomised":
        return name
    return 1.0 if face is None else max(name, face)


def _person(fitted: Fitted, settings: IdentitySettings, i: int) -> dict[str, Any]:
    photos = fitted.photos_of(i)
    predicted, own = fitted.predicted[photos], int(fitted.own[i])
    by_template = recognised(predicted, own)
    ranked = fitted.ranked[i]
    p_value, face = ranked.p_value(), fitted.face_p_value(i, i)
    decoys = fitted.decoys_of(i)
    voted = votes(predicted, np.r_[own, decoys[fitted.candidate[decoys]]]).max(axis=1)
    return {
        "person": fitted.people[i].partition("/")[2],
        "name": fitted.true_names[i],
        "set": str(fitted.sets[i]),
        "n_photos": len(photos),
        "templates_correct": int(by_template.sum()),
        "member_published": bool(by_template.sum() >= settings.cutoffs.tau),
        "member_majority": bool(majority(predicted, own).sum() >= settings.cutoffs.tau),
        "statistic": float(ranked.ranks[0].mean()),
        "p_value": p_value,
        "n_decoys": len(decoys),
        "face_p_value": face,
        "decisive_p_value": decisive(settings, p_value, face),
        "votes": int(voted[0]),
        "votes_p_value": float((1 + (voted[1:] >= voted[0]).sum()) / len(voted)),
        "shuffled_p_value": _shuffled(fitted, settings.seed, i),
    }


def _shuffled(fitted: Fitted, seed: int, i: int) -> float | None:
    """The larger of both p-values of a person's photos under the next person's name, in a ring."""
    ring = np.random.default_rng([seed, 5]).permutation(len(fitted.people))
    if len(ring) < 2:
        return None
    other = int(ring[(int(np.flatnonzero(ring == i)[0]) + 1) % len(ring)])
    face = fitted.face_p_value(i, other)
    return None if face is None else max(fitted.rank(fitted.photos_of(i), other).p_value(), face)


def _with_other_model(
    table: dict[str, list[Any]], other: Fitted, settings: IdentitySettings
) -> dict[str, list[Any]]:
    """Add each person's decisive p-value under a model that cannot have seen them."""
    by_person = {
        key: decisive(settings, other.ranked[i].p_value(), other.face_p_value(i, i))
        for i, key in enumerate(other.people)
    }
    keys = [f"{side}/{key}" for side, key in zip(table["set"], table["person"], strict=True)]
    return {**table, "control_target_p_value": [by_person.get(key) for key in keys]}


# -- what is written ---------------------------------------------------------------------------


def _predictions(run: Run, fitted: Fitted) -> pa.Table:
    templates = read_json(run.evidence / "asked.json")["templates"]
    photo, template = (index.ravel() for index in np.indices(fitted.predicted.shape))
    names = pa.array(fitted.names)
    own = fitted.own[fitted.shown[photo]]
    return pa.table(
        {
            "person": [fitted.people[fitted.shown[i]].partition("/")[2] for i in photo],
            "set": [str(fitted.sets[fitted.shown[i]]) for i in photo],
            "photo": [fitted.photos[i] for i in photo],
            "template": [templates[j] for j in template],
            "predicted": names.take(pa.array(fitted.predicted.ravel())),
            "correct": fitted.predicted.ravel() == own,
        }
    )


def _decoys(fitted: Fitted) -> pa.Table:
    """Each person's statistic for every decoy, to draw."""
    ranks = [each.ranks for each in fitted.ranked]
    return pa.table(
        {
            "person": [key.partition("/")[2] for key in fitted.people],
            "set": fitted.sets.tolist(),
            "statistics": [each[1:].mean(axis=1).astype(np.float32) for each in ranks],
        }
    )


def _curve(fitted: Fitted, settings: IdentitySettings) -> pa.Table:
    """Share of each set that is found from so many photos: mean and deviation over subsets."""
    rows: list[dict[str, Any]] = []
    for size in _SIZES:
        for side in ("suspect", "control", "known"):
            in_set: list[int] = np.flatnonzero(fitted.sets == side).tolist()
            chosen = [i for i in in_set if len(fitted.photos_of(i)) >= size]
            if not chosen:
                continue
            found = np.array([_found(fitted, settings, i, size) for i in chosen])
            shares = found.mean(axis=0)
            for rule, share in zip(("published", "majority", "p_value"), shares.T, strict=True):
                rows.append(
                    {
                        "n_photos": size,
                        "set": side,
                        "rule": rule,
                        "people": len(chosen),
                        "rate": float(share.mean()),
                        "sd": float(share.std(ddof=1)),
                    }
                )
    return pa.Table.from_pylist(rows)


def _found(
    fitted: Fitted, settings: IdentitySettings, i: int, size: int
) -> list[tuple[bool, bool, bool]]:
    """For each random subset of a person's photos: found by each rule."""
    photos, own = fitted.photos_of(i), int(fitted.own[i])
    subsets = sub_samples(len(photos), size, _REPEATS, settings.seed)
    p_values = fitted.ranked[i].p_values(subsets)
    predicted = [fitted.predicted[photos[subset]] for subset in subsets.T]
    return [
        (
            bool(recognised(each, own).sum() >= settings.cutoffs.tau),
            bool(majority(each, own).sum() >= settings.cutoffs.tau),
            bool(p_value <= settings.cutoffs.alpha),
        )
        for each, p_value in zip(predicted, p_values, strict=True)
    ]


# -- the verdict -------------------------------------------------------------------------------


def _verdict(
    run: Run, settings: IdentitySettings, fitted: Fitted, table: dict[str, list[Any]]
) -> IdentityVerdict:
    asked = read_json(run.evidence / "asked.json")
    cutoffs = settings.cutoffs
    column = {key: np.array(values) for key, values in table.items()}
    suspects, controls, knowns = (column["set"] == s for s in ("suspect", "control", "known"))
    n, names_q = int(suspects.sum()), column["name_q_value"][suspects]
    kept = ("person", "name", "p_value", "q_value", "face_p_value")
    found = [
        PersonFound(**{key: table[key][i] for key in kept})
        for i in np.flatnonzero(suspects)
        if table["found"][i]
    ]
    # People without any decoy have p = 1 and are warned of; they say nothing of the others.
    tried = column["n_decoys"][suspects]
    fewest = int(tried[tried > 0].min()) if (tried > 0).any() else 0
    lots = settings.design == "randomised"
    negative = _negative_controls(column, cutoffs.alpha, fewest, uniform=lots)
    # As if no other suspect were found: the strictest that the correction can be.
    alone = cutoffs.false_discovery_rate / n
    known = rate(column["decisive_p_value"][knowns] <= alone) if knowns.any() else None
    named = rate([q <= cutoffs.false_discovery_rate for q in names_q])
    decoys = DecoyFinding(
        fewest=fewest,
        others=len(fitted.people) - 1,
        strata=asked["strata"],
        warnings=asked["warnings"],
        smallest_p=1 / (fewest + 1),
        resolvable=st.smallest_resolvable(n, fewest, cutoffs.false_discovery_rate),
    )
    verdict, tier, reasons = decide_identity(
        design=settings.design,
        found=found,
        named=named,
        known=known,
        controls=negative,
        decoys=decoys,
        cutoffs=cutoffs,
    )
    unusable = read_table(run.evidence / "unusable.parquet").to_pylist()
    return IdentityVerdict(
        verdict=verdict,
        tier=tier,
        reasons=reasons,
        found=found,
        suspects=rate(column["found"][suspects]),
        named=named,
        known=known,
        published=PublishedFinding(
            names=int(fitted.candidate.sum()),
            templates=fitted.predicted.shape[1],
            suspects=rate(column["member_published"][suspects]),
            majority=rate(column["member_majority"][suspects]),
            controls=rate(column["member_published"][controls]) if controls.any() else None,
        ),
        controls=negative,
        decoys=decoys,
        coverage=PeopleCoverage(
            people=len(read_table(run.evidence / "people.parquet"))
            + sum(row["stage"] == "person" for row in unusable),
            people_tested=len(fitted.people),
            photos=asked["photos given"],
            photos_used=len(fitted.photos),
            truncated=fitted.truncated,
        ),
        cutoffs=cutoffs,
    )


def rate(hits: Sequence[bool] | NDArray[np.bool_]) -> RateFinding:
    """A share of people with its exact interval."""
    of, count = len(hits), int(np.sum(hits))
    if not of:
        return RateFinding(count=0, of=0, rate=None, ci95=None)
    estimate = st.clopper_pearson(count, of)
    return RateFinding(count=count, of=of, rate=estimate.value, ci95=(estimate.low, estimate.high))


def _negative_controls(
    column: dict[str, NDArray[Any]], alpha: float, decoys: int, *, uniform: bool
) -> list[ControlFinding]:
    """People and names that cannot be found, put to the rule that decides.

    The larger of two p-values is not `uniform`, only never too small.
    """
    out = column["set"] == "control"
    tried = [
        ("people known to be out", column["decisive_p_value"][out], uniform),
        ("photos under somebody else's name", column["shuffled_p_value"], False),
    ]
    if "control_target_p_value" in column:
        other = column["control_target_p_value"]
        tried.append(("a model that cannot know them", other, uniform))
    findings = []
    for name, found, is_uniform in tried:
        p_values = np.array([p for p in found if p is not None], dtype=np.float64)
        if len(p_values):
            findings.append(_negative_control(name, p_values, alpha, decoys, is_uniform))
    return findings


def _negative_control(
    name: str, p_values: Floats, alpha: float, decoys: int, uniform: bool
) -> ControlFinding:
    hits = int((p_values <= alpha).sum())
    # People share their decoys, so that their p-values err together: not a binomial count.
    below = int(np.floor(alpha * (decoys + 1)))
    by_chance = stats.betabinom(len(p_values), below, decoys + 1 - below) if below else None
    excess = float(by_chance.sf(hits - 1)) if by_chance else float(hits == 0)
    fired = excess <= CONTROL_ALARM
    share = f"Negative control, {name}: {hits} of {len(p_values)} have p ≤ {alpha:g}"
    return ControlFinding(
        name=name,
        rejected=rate(p_values <= alpha),
        p_excess=excess,
        p_uniform=float(stats.kstest(p_values, "uniform").pvalue) if uniform else None,
        fired=fired,
        sentence=(
            f"{share}, more than chance allows (p = {excess:.2g}): the test finds what is not "
            "there, so nothing that it finds counts."
            if fired
            else f"{share}, as chance allows."
        ),
    )
