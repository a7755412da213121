"""Decoys: names that nobody has shown to be in the data, to compare a true name with.

The p-value of a person counts the decoys that a target likes as much as the true name. It is
valid only if, were the person unknown to the target, the true name might as well have been one of
the decoys. So a decoy shares the true name's stratum, which depends on nothing but the name and
the gender (script, number of words, frequency), and within it every name of the lists is equally
likely, none twice. A name drawn in that way, as the lab's are, can be exchanged with its decoys.
Drawing by frequency would break this: the name drawn first would tend to be the commonest.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from lightleak.errors import UserError
from lightleak.records.people import Gender, clean_name, name_key, table_rows

PROVIDERS = "faker.providers.person"
DEFAULT_LOCALE = "en_US"
# These write the family's name first, and often without a space.
FAMILY_FIRST = ("Han", "Hangul")
MOST_WORDS = 3
WORD_COUNTS = ("", "one word", "two words", "three words or more")
# With 19 decoys the smallest p-value is 0.05.
FEWEST_DECOYS = 19
LISTED_NAMES = 5
# The lists hold some phrases and some dirt.
NO_WORD = re.compile(r"[\s\d.,;˜(){}/]")

# Of males, of females and of all: each word with its frequency.
_Lists = dict[Gender | None, dict[str, float]]


@dataclass(frozen=True)
class TrueName:
    """The name of a person and, when it was given, the gender."""

    name: str
    gender: Gender | None = None


@dataclass(frozen=True)
class Stratum:
    """What a true name shares with its decoys; None where it makes no difference.

    Attributes:
        script: of most of the letters, as Unicode calls it: "Latin", "Arabic", "Han" …
        source: where the decoys come from.
        gender: of the first given name.
        words: 1, 2, or 3 for three and more.
        frequency: common when every word is in the more frequent half of its list.
    """

    script: str
    source: str
    gender: Gender | None = None
    words: int | None = None
    frequency: Literal["common", "uncommon"] | None = None

    def __str__(self) -> str:
        words = WORD_COUNTS[self.words or 0]
        parts = (f"{self.script} script", self.gender, words, self.frequency, self.source)
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class DecoySet:
    """Decoys for a sequence of true names.

    Attributes:
        names: the decoys; no two, nor one and a true name, differ by case alone.
        strata: for each decoy the position of its stratum in `described`.
        of: likewise for each true name; its decoys are those of the same stratum.
        described: the strata.
        known: for each true name whether it could have been drawn as its own decoy; when not, a
            stranger's name is compared with listed names. A user's file is taken at its word.
        warnings: what limits the comparison, in sentences.
    """

    names: tuple[str, ...]
    strata: tuple[int, ...]
    of: tuple[int, ...]
    described: tuple[Stratum, ...]
    known: tuple[bool, ...]
    warnings: tuple[str, ...]


def draw(
    names: Sequence[TrueName], count: int, *, seed: int, taken: Collection[str] = ()
) -> DecoySet:
    """Draw decoys for true names from the name lists of the package Faker.

    A name's decoys come from the locale in its script that lists most of its words, en_US before
    others. Each stratum has a random stream of its own, so the order of the names is irrelevant.
    Without a gender it is that of the list in which the first given name is more frequent; where
    neither is, decoys are of both.

    Args:
        names: the true names.
        count: decoys in each stratum.
        seed: at least 0.
        taken: other names that must not be drawn.

    Raises:
        UserError: no list is in a name's script, or a stratum holds fewer than `count` names.
    """
    pools = [_pool(each.name, count) for each in names]
    strata = [pool.stratum(each) for pool, each in zip(pools, names, strict=True)]
    pool_of = dict(zip(strata, pools, strict=True))
    described = sorted(pool_of, key=str)
    used = {name_key(each.name) for each in names} | {name_key(name) for name in taken}
    drawn: dict[str, str] = {}
    for stratum in described:
        drawn |= pool_of[stratum].sample(stratum, count, seed=seed, used=used | drawn.keys())
    known = tuple(
        pool.holds(each.name, stratum)
        for pool, each, stratum in zip(pools, names, strata, strict=True)
    )
    strangers = [each.name for each, is_known in zip(names, known, strict=True) if not is_known]
    warnings = (
        f"Words that stand in no list of their kind are in {len(strangers)} of {len(names)} names, "
        f"whose decoys may not be exchangeable with them: {_listed(strangers)}.",
    )
    return DecoySet(
        names=tuple(drawn.values()),
        strata=tuple(number for number in range(len(described)) for _ in range(count)),
        of=tuple(described.index(stratum) for stratum in strata),
        described=tuple(described),
        known=known,
        warnings=warnings if strangers else (),
    )


def draw_names(count: int, *, seed: int) -> tuple[str, ...]:
    """Draw distinct names "First Last" from the lists of en_US, each equally likely.

    What `draw` gives for such a name is exchangeable with it.

    Raises:
        UserError: there are fewer than `count` names.
    """
    pool = next(each for each in _pools()["Latin"] if each.locale == DEFAULT_LOCALE)
    return tuple(pool.sample(Stratum("Latin", pool.source, words=2), count, seed=seed).values())


def from_file(
    file: str | Path, names: Sequence[TrueName], *, taken: Collection[str] = ()
) -> DecoySet:
    """Read decoys from a text file with one name a line, or a CSV file with a column `name`.

    A decoy serves every person whose name is in the same script.

    Args:
        file: UTF-8; its suffix .csv makes it a CSV file.
        names: the true names.
        taken: other names that must not be decoys.

    Raises:
        UserError: the file cannot be read, or holds no name that can be a decoy.
    """
    path = Path(file)
    true = {name_key(each.name) for each in names}
    others = {name_key(name) for name in taken}
    decoys, left_out = _sift(_lines(path), true, others)
    if not decoys:
        raise UserError("no name in it can be a decoy", str(path), "Check that it is the file.")
    scripts = [_script(name) for name in decoys]
    true_scripts = [_script(each.name) for each in names]
    ordered = sorted({*scripts, *true_scripts})
    number_of = {script: number for number, script in enumerate(ordered)}
    warnings = [
        f"Names in {path.name} left out as {why}: {count}." for why, count in left_out.items()
    ]
    available = Counter(scripts)
    warnings += [
        f"Decoys in {script} script: {available[script]}. A p-value of 0.05 needs {FEWEST_DECOYS}: "
        f"{_listed([each.name for each in names if _script(each.name) == script])}."
        for script in sorted(set(true_scripts))
        if available[script] < FEWEST_DECOYS
    ]
    return DecoySet(
        names=tuple(decoys),
        strata=tuple(number_of[script] for script in scripts),
        of=tuple(number_of[script] for script in true_scripts),
        described=tuple(Stratum(script, f"from {path.name}") for script in ordered),
        known=(True,) * len(names),
        warnings=tuple(warnings),
    )


@dataclass(frozen=True)
class _Word:
    """One word of a list; no gender when it serves both, or the list has none."""

    text: str
    gender: Gender | None
    common: bool


@dataclass(frozen=True)
class _Pool:
    """The words of one locale by their `name_key`; `ranked` when their frequencies are known."""

    locale: str
    script: str
    given: Mapping[str, _Word]
    family: Mapping[str, _Word]
    ranked: bool

    @property
    def source(self) -> str:
        return f"from the name lists of {self.locale}"

    def size(self, words: int) -> int:
        """How many names can be made of so many words, whatever their gender and frequency."""
        if words == 1 and self.script not in FAMILY_FIRST:
            return len(self.given)
        return math.prod([len(self.family)] + [len(self.given)] * (max(words, 2) - 1))

    def words(self, name: str) -> list[_Word | None]:
        """The words of a name, family last; None for one that stands in no list."""
        words = name_key(name).split()
        if self.script in FAMILY_FIRST:
            first, *others = self._split(words[0]) if len(words) == 1 else words
            words = [*others, first]
        if len(words) == 1:
            return [self.given.get(words[0])]
        return [*map(self.given.get, words[:-1]), self.family.get(words[-1])]

    def _split(self, name: str) -> list[str]:
        for length in (2, 1):
            if name[:length] in self.family and name[length:] in self.given:
                return [name[:length], name[length:]]
        return [name[:1], name[1:]]

    def stratum(self, true: TrueName) -> Stratum:
        words = self.words(true.name)
        listed = {word.gender for word in self.given.values()}
        gender = true.gender or (words[0].gender if words[0] else None)
        common = all(word is not None and word.common for word in words)
        return Stratum(
            self.script,
            self.source,
            gender if gender in listed else None,
            min(len(true.name.split()), MOST_WORDS),
            ("common" if common else "uncommon") if self.ranked else None,
        )

    def holds(self, name: str, stratum: Stratum) -> bool:
        """Whether the name could be drawn from its stratum."""
        words = self.words(name)
        known = [word for word in words if word is not None]
        return len(known) == len(words) <= MOST_WORDS and _fits(known, stratum)

    def sample(
        self, stratum: Stratum, count: int, *, seed: int, used: Collection[str] = ()
    ) -> dict[str, str]:
        """Draw names of a stratum by their keys, all equally likely, without those in `used`.

        Raises:
            UserError: there are fewer than `count`, or none was asked for.
        """
        if count < 1:
            raise UserError(f"{count} names were asked for", what_to_do="Ask for at least one.")
        lists = self._lists(stratum)
        size = math.prod(map(len, lists))
        found: dict[str, str] = {}
        # The second round looks at all, to tell how many there are.
        for tries in sorted({min(16 * count, size), size}):
            found.clear()
            for name in _combined(lists, stratum, tries, seed):
                if (key := name_key(name)) not in used:
                    found.setdefault(key, name)
                if len(found) == count:
                    return found
        raise UserError(
            f"of the {count} names asked for there are {len(found)} ({stratum})",
            what_to_do=f"Ask for at most {len(found)}, or give names of your own: --decoys FILE.",
        )

    def _lists(self, stratum: Stratum) -> list[list[_Word]]:
        """For each word of a name the choices, family last."""
        given, family = (
            [
                word
                for word in words.values()
                if not (word.gender and stratum.gender and word.gender != stratum.gender)
                and (word.common or stratum.frequency != "common")
            ]
            for words in (self.given, self.family)
        )
        if stratum.words == 1 and self.script not in FAMILY_FIRST:
            return [given]
        return [given] * (max(stratum.words or 0, 2) - 1) + [family]


def _combined(
    lists: Sequence[Sequence[_Word]], stratum: Stratum, tries: int, seed: int
) -> Iterator[str]:
    """Names of a stratum from random combinations, none twice."""
    stream = int.from_bytes(sha256(str(stratum).encode()).digest())
    shape = tuple(map(len, lists))
    drawn = np.random.default_rng([seed, stream]).choice(math.prod(shape), tries, replace=False)
    for row in zip(*(column.tolist() for column in np.unravel_index(drawn, shape)), strict=True):
        words = [choices[position] for choices, position in zip(lists, row, strict=True)]
        if _fits(words, stratum):
            texts = [word.text for word in words]
            if stratum.script in FAMILY_FIRST:
                texts = texts[-1:] + texts[:-1]
            yield ("" if stratum.words == 1 else " ").join(texts)


def _fits(words: Sequence[_Word], stratum: Stratum) -> bool:
    """Whether the words differ, agree in gender, and are as frequent as the stratum's."""
    genders = {word.gender for word in words} | {stratum.gender}
    if len(genders - {None}) > 1 or len({word.text for word in words}) < len(words):
        return False
    if stratum.frequency is None:
        return True
    return all(word.common for word in words) == (stratum.frequency == "common")


def _pool(name: str, count: int) -> _Pool:
    """The locale to compare a name with, among those that can give so many decoys."""
    script, words = _script(name), min(len(name.split()), MOST_WORDS)
    pools = _pools().get(script, ())
    if not pools:
        raise UserError(
            f"there is no list of names in {script} script",
            f"name {name!r}",
            "Give decoys of your own: --decoys FILE.",
        )

    def fitness(pool: _Pool) -> tuple[bool, int, bool, int, str]:
        size = pool.size(words)
        listed = sum(word is not None for word in pool.words(name))
        # About half of the names are of either gender.
        return size >= 2 * count, listed, pool.locale == DEFAULT_LOCALE, size, pool.locale

    return max(pools, key=fitness)


@cache
def _pools() -> Mapping[str, Sequence[_Pool]]:
    """Faker's lists of names, by script."""
    provider = importlib.import_module(PROVIDERS)
    pools: defaultdict[str, list[_Pool]] = defaultdict(list)
    for module in pkgutil.iter_modules(provider.__path__):
        pool = _read_pool(module.name, provider.Provider)
        if pool.given and pool.family:
            pools[pool.script].append(pool)
    return pools


def _read_pool(locale: str, base: type) -> _Pool:
    """Read the lists of one locale; `base` has the placeholders of locales that lack one."""
    provider = importlib.import_module(f"{PROVIDERS}.{locale}").Provider
    parts: dict[str, _Lists] = {"first": {}, "last": {}}
    for attribute in dir(provider):
        # Stems "without_suffix" are no names.
        part = re.search("(first|last)_names(?!_without)", attribute)
        listed = getattr(provider, attribute)
        if (
            part
            and isinstance(listed, (dict, list, tuple))
            and listed != getattr(base, attribute, None)
        ):
            gender: Gender | None = (
                "female" if "female" in attribute else "male" if "male" in attribute else None
            )
            # A list without frequencies counts its words as equally frequent.
            weights = listed if isinstance(listed, dict) else dict.fromkeys(listed, 1.0)
            parts[part[1]].setdefault(gender, {}).update(weights)
    lists = [words for each in parts.values() for words in each.values()]
    script = _script(" ".join(word for words in lists for word in words))
    return _Pool(
        locale,
        script,
        given=_merge(parts["first"], script),
        family=_merge(parts["last"], script),
        ranked=script == "Latin" and any(len(set(words.values())) > 1 for words in lists),
    )


def _merge(lists: _Lists, script: str) -> dict[str, _Word]:
    """The single words of one script from lists for males, females and all."""
    bar = {
        gender: median(words.values()) if len(set(words.values())) > 1 else 0.0
        for gender, words in lists.items()
    }
    males, females = lists.get("male", {}), lists.get("female", {})
    merged: dict[str, _Word] = {}
    for text in sorted({text for words in lists.values() for text in words}):
        male, female = males.get(text, 0.0), females.get(text, 0.0)
        # A word of both lists goes to the one in which it is more frequent.
        gender: Gender | None = "male" if male > female else "female" if female > male else None
        home = next(each for each in (gender, None, "male") if text in lists.get(each, {}))
        if _script_of(text[0]) == script and not NO_WORD.search(text):
            word = _Word(unicodedata.normalize("NFC", text), gender, lists[home][text] > bar[home])
            merged.setdefault(name_key(text), word)
    return merged


def _script(text: str) -> str:
    """The script of most of the letters; of equals the one that comes first."""
    counts: Counter[str] = Counter()
    for letter, count in Counter(text).items():
        if letter.isalpha():
            counts[_script_of(letter)] += count
    return counts.most_common(1)[0][0] if counts else "no"


@cache
def _script_of(letter: str) -> str:
    first = re.split("[ -]", unicodedata.name(letter, "unknown"))[0].title()
    return "Han" if first in ("Cjk", "Ideographic") else first


def _lines(path: Path) -> Iterator[str]:
    """The names in a text or CSV file."""
    if path.suffix.lower() == ".csv":
        for place, cells in table_rows(path, ["name"]):
            yield clean_name(cells["name"], f"{path}, {place}")
        return
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield clean_name(line.removesuffix("\n"), f"{path}, line {number}")
    except OSError as error:
        raise UserError(f"the file cannot be read ({error.strerror})", str(path)) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"the file is not UTF-8 ({error})", str(path), "Save it as UTF-8."
        ) from error


def _sift(
    names: Iterable[str], true: Collection[str], others: Collection[str]
) -> tuple[list[str], Mapping[str, int]]:
    """The names that can be decoys, and how many cannot for which reason."""
    decoys: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    for name in names:
        key = name_key(name)
        if key in true:
            left_out["true names"] += 1
        elif key in others:
            left_out["taken"] += 1
        elif key in decoys:
            left_out["repetitions"] += 1
        else:
            decoys[key] = name
    return list(decoys.values()), left_out


def _listed(names: Sequence[str]) -> str:
    more = len(names) - LISTED_NAMES
    return ", ".join(names[:LISTED_NAMES]) + (f" and {more} more" if more > 0 else "")
