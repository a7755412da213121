"""What the page of an identity audit shows, read from the run folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lightleak.report.contents import blurred, thumbnail
from lightleak.runs import Run, read_json, read_table
from lightleak.validity import IdentityVerdict

SETS = ("suspect", "known", "control")
PEOPLE_LISTED, ROWS_DRAWN, TEMPLATES_SHOWN = 200, 40, 30
PEOPLE_PICTURED, PHOTOS_PICTURED, PHOTO = 40, 4, 96
# A true name beyond the second has p ≤ 0.05, one beyond the third p ≤ 0.01, about.
QUANTILES = (0.0, 0.95, 0.99, 1.0)

Floats = npt.NDArray[np.float64]
Key = tuple[str, str]


@dataclass(frozen=True)
class Person:
    """One person and what was found; as in people.parquet.

    Attributes:
        p_value: of the name among its decoys.
        face_p_value: of the photos among those of others; None where there are none.
        name_q_value, q_value: of the name alone, and of what decides; for suspects only.
        found: whether the verdict names this person.
    """

    set: str
    person: str
    name: str
    n_photos: int
    templates_correct: int
    member_published: bool
    member_majority: bool
    statistic: float
    p_value: float
    face_p_value: float | None
    name_q_value: float | None
    q_value: float | None
    found: bool

    @property
    def key(self) -> Key:
        """Who it is: two sets may call different people alike."""
        return self.set, self.person


@dataclass(frozen=True)
class People:
    """Those of one set that are shown, the surest first, and how many are left out."""

    set: str
    shown: tuple[Person, ...]
    left_out: int


@dataclass(frozen=True)
class Spread:
    """A person's statistic for the true name, and quantiles of it over the decoys."""

    true: float
    decoys: tuple[float, ...]


@dataclass(frozen=True)
class Pictures:
    """Some photos of a person as data URIs; None for one that cannot be read any more."""

    person: Person
    photos: tuple[str | None, ...]


@dataclass(frozen=True)
class Contents:
    """Everything that this page alone shows, but words and drawings.

    Attributes:
        people: all that were tested.
        templates: as asked.
        shares: of photos that a template gave the true name, by person.
        spreads: true name and decoys, by person; of those that are drawn.
        curve: rows of curve.parquet.
        nulls: p-values of the negative controls, in the order of the verdict.
        gallery: the first people with some photos.
    """

    verdict: IdentityVerdict
    design: str
    people: tuple[Person, ...]
    templates: tuple[str, ...]
    shares: Mapping[Key, tuple[float, ...]]
    spreads: Mapping[Key, Spread]
    curve: Sequence[Mapping[str, Any]]
    nulls: Sequence[Floats]
    gallery: tuple[Pictures, ...]

    def listed(self) -> list[People]:
        """People by set, as many as a table bears."""
        return by_set(self.people, PEOPLE_LISTED)

    def drawn(self) -> list[People]:
        """People by set, as many as a figure bears."""
        return by_set(self.people, ROWS_DRAWN)


def read(run: Run, *, show_images: bool) -> Contents:
    """Read a judged run.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    verdict = IdentityVerdict.read(run.verdict_file)
    table = read_table(run.people_file)
    people = _people(table.to_pylist(), verdict)
    asked = read_json(run.evidence / "asked.json")
    drawn = {each.key: each for group in by_set(people, ROWS_DRAWN) for each in group.shown}
    return Contents(
        verdict=verdict,
        design=run.manifest()["settings"]["design"],
        people=people,
        templates=tuple(asked["templates"]),
        shares=_shares(read_table(run.predictions_file), asked["templates"]),
        spreads=_spreads(read_table(run.decoys_file), drawn),
        curve=read_table(run.curve_file).to_pylist(),
        nulls=_nulls(table),
        gallery=_gallery(run, people[:PEOPLE_PICTURED], show_images),
    )


def _people(rows: Iterable[Mapping[str, Any]], verdict: IdentityVerdict) -> tuple[Person, ...]:
    """Suspects, then the others; in each set those found, then the surest."""
    counts = verdict.verdict == "exposed"
    columns = Person.__dataclass_fields__.keys()
    people = [
        Person(**{**{name: row[name] for name in columns}, "found": counts and bool(row["found"])})
        for row in rows
    ]
    return tuple(
        sorted(
            people,
            key=lambda one: (
                SETS.index(one.set),
                not one.found,
                one.p_value,
                -one.statistic,
                one.person,
            ),
        )
    )


def by_set(people: Sequence[Person], rows: int) -> list[People]:
    """So many people at most, and as many of each set as of another where it has them."""
    sets = {side: list(members) for side, members in groupby(people, lambda one: one.set)}
    each = next(
        share
        for share in range(rows, -1, -1)
        if sum(min(len(members), share) for members in sets.values()) <= rows
    )
    return [
        People(side, tuple(members[:each]), len(members[each:])) for side, members in sets.items()
    ]


def _shares(predictions: pa.Table, templates: Sequence[str]) -> dict[Key, tuple[float, ...]]:
    means = predictions.set_column(
        predictions.column_names.index("correct"), "correct", predictions["correct"].cast("int8")
    ).group_by(["set", "person", "template"])
    share = {
        (row["set"], row["person"], row["template"]): row["correct_mean"]
        for row in means.aggregate([("correct", "mean")]).to_pylist()
    }
    keys = dict.fromkeys((side, person) for side, person, _ in share)
    return {key: tuple(share[*key, each] for each in templates) for key in keys}


def _spreads(decoys: pa.Table, people: Mapping[Key, Person]) -> dict[Key, Spread]:
    found = {}
    columns = (decoys[name] for name in ("set", "person", "statistics"))
    for side, person, statistics in zip(*columns, strict=True):
        key = (side.as_py(), person.as_py())
        if key in people:
            # Whoever has no decoy is drawn as if all were at nought.
            values = np.append(statistics.values.to_numpy(), [] if len(statistics) else [0.0])
            quantiles = np.quantile(values, QUANTILES, method="inverted_cdf").tolist()
            found[key] = Spread(people[key].statistic, tuple(quantiles))
    return found


def _nulls(table: pa.Table) -> list[Floats]:
    columns = [table.filter(pc.equal(table["set"], "control"))["decisive_p_value"]] + [
        table[name]
        for name in ("shuffled_p_value", "control_target_p_value")
        if name in table.column_names
    ]
    found = [column.drop_null().to_numpy().astype(np.float64) for column in columns]
    return [p_values for p_values in found if p_values.size]


def _gallery(run: Run, people: Iterable[Person], show_images: bool) -> tuple[Pictures, ...]:
    table = read_table(run.evidence / "photos.parquet")
    files: dict[str, list[str]] = {}
    for row in table.to_pylist():
        files.setdefault(row["person"], []).append(row["file"])
    return tuple(
        Pictures(
            person,
            tuple(
                thumbnail(file, PHOTO) if show_images else blurred(file)
                for file in files["/".join(person.key)][:PHOTOS_PICTURED]
            ),
        )
        for person in people
    )
