"""People: a folder of photos each, and the name that a target may know them by."""

from __future__ import annotations

import csv
import difflib
import json
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

from lightleak.errors import UserError
from lightleak.records.images import image_bytes, open_rgb
from lightleak.records.record import Failure

Gender = Literal["male", "female"]
# Persian and several Indian scripts spell words with these two, so names may hold them.
JOINERS = "\u200c\u200d"


@dataclass(frozen=True)
class Photo:
    """One photo; `sha256` is the hex digest of its size and its pixels."""

    person: str
    file: Path
    sha256: str

    @property
    def id(self) -> str:
        """The person and the file name: "marie_curie/1.jpg"."""
        return f"{self.person}/{self.file.name}"


@dataclass(frozen=True)
class Person:
    """Photos that show one person.

    Attributes:
        person: the name of the folder.
        name: what the target may call the person; NFC, with single spaces.
        photos: in the order of their file names; never empty.
        gender: as the file of names gives it.
    """

    person: str
    name: str
    photos: tuple[Photo, ...]
    gender: Gender | None = None


@dataclass(frozen=True)
class PeopleSet:
    """The people of one folder, in the order of their folders' names.

    Attributes:
        people: those with a usable photo.
        failures: photos and people that cannot be used, each with its reason.
        source: the folder.
        sha256: hex digest over every usable person's folder name, name and photos.
    """

    people: tuple[Person, ...]
    failures: tuple[Failure, ...]
    source: Path
    sha256: str


def load_people(
    folder: str | Path,
    *,
    names: str | Path | None = None,
    strict: bool = False,
    allow_outside: bool = False,
) -> PeopleSet:
    """Read people from a folder that holds a folder of photos for each.

    Every photo is decoded once to see that it can be. A photo that stands twice under one person
    counts once; one that stands under two people shows neither. Hidden files and folders, and
    files beside the people's folders that are no images, are passed over.

    Args:
        folder: holds one folder a person.
        names: a CSV file with the columns `person` (a folder's name), `name`, and perhaps
            `gender` (male, female or empty). Without it the folders' names are the names, with
            spaces for underscores.
        strict: raise the first fault of a photo or person instead of listing it in `failures`.
        allow_outside: follow links that lead outside the folder.

    Raises:
        UserError: the folder is missing or holds no usable person; the names are damaged, do not
            match the folders, or give two people one name; or, when strict, any fault.
    """
    source = Path(folder)
    failures: list[Failure] = []

    def refuse(fault: UserError, failed: str, stage: str) -> None:
        error = UserError(fault.what, f"{stage} {failed!r} of {source}", fault.what_to_do)
        if strict:
            raise error from fault
        # A file name that is not Unicode could not be written to any file.
        failures.append(Failure(failed.encode(errors="replace").decode(), stage, str(error)))

    entries = _listed(source)
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders:
        raise UserError(
            "there is no folder in it",
            str(source),
            "Put in one folder a person; of one person alone give the folder above.",
        )
    labels = _from_file(Path(names), folders) if names else _from_folders(folders)
    _check_distinct(labels, source)
    root = source.resolve()
    for file in entries:
        if file not in folders and _is_image(file, root, allow_outside):
            fault = UserError("the photo belongs to no person", "", "Move it into a folder.")
            refuse(fault, file.name, "photo")
    found = _read_photos(folders, root, allow_outside, refuse)
    people = []
    for person, photos in _own_photos(found, refuse).items():
        if photos:
            name, gender = labels[person]
            people.append(Person(person, name, photos, gender))
        else:
            refuse(UserError("no photo of it can be used"), person, "person")
    if not people:
        raise UserError(
            f"no person can be used; the first reason: {failures[0].error.rstrip('.')}",
            str(source),
            "Does it hold a folder of photos for each person?",
        )
    return PeopleSet(tuple(people), tuple(failures), source, _people_sha256(people))


def clean_name(text: str, where: str) -> str:
    """The name in NFC with single spaces.

    Raises:
        UserError: it is empty, or holds a line break or another character that nobody sees.
    """
    for character in "" if text.isprintable() else text:
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and (
            character not in JOINERS
        ):
            raise UserError(
                f"the name {text!r} holds the invisible character U+{ord(character):04X}",
                where,
                "Write it without.",
            )
    name = " ".join(unicodedata.normalize("NFC", text).split())
    if not name:
        raise UserError("the name is empty", where, "Give a name.")
    return name


def name_key(name: str) -> str:
    """What two spellings of one name share: the same letters, whatever their case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def table_rows(
    file: Path, needed: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield the place ("line 3") and the cells by column of each line of a CSV file.

    Raises:
        UserError: the file cannot be read, is not CSV in UTF-8, or has other columns.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            table = csv.reader(stream, strict=True)
            header = [column.strip() for column in next(table, [])]
            _check_columns(header, needed, optional, str(file))
            for cells in filter(any, table):
                if len(cells) != len(header):
                    raise UserError(
                        f"there are {len(cells)} cells instead of {len(header)}",
                        f"{file}, line {table.line_num}",
                        "Put quotes around a cell that holds a comma.",
                    )
                yield f"line {table.line_num}", dict(zip(header, cells, strict=True))
    except OSError as error:
        raise UserError(f"the file cannot be read ({error.strerror})", str(file)) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(
            f"this is not a readable CSV file ({error})", str(file), "Use UTF-8 and commas."
        ) from error


def _check_columns(
    header: Sequence[str], needed: Sequence[str], optional: Sequence[str], where: str
) -> None:
    known = [*needed, *optional]
    for column in header:
        if column not in known or header.count(column) > 1:
            raise UserError(
                f"the column {column!r} is {'given twice' if column in known else 'unknown'}",
                where,
                f"{_did_you_mean(column, known)}Known columns: {', '.join(known)}.",
            )
    for column in needed:
        if column not in header:
            raise UserError(f"there is no column {column!r}", where, "Name it in the first line.")


def _listed(folder: Path) -> list[Path]:
    """What is in a folder and not hidden, by name."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"the folder cannot be opened ({error.strerror})", str(folder), "Check the path."
        ) from error


_Labels = Mapping[str, tuple[str, Gender | None]]


def _from_folders(folders: Sequence[Path]) -> _Labels:
    """The name of each folder's person, read from the folder's name."""
    return {
        folder.name: (clean_name(folder.name.replace("_", " "), f"folder {str(folder)!r}"), None)
        for folder in folders
    }


def _from_file(file: Path, folders: Sequence[Path]) -> _Labels:
    """The name and gender of each folder's person, read from a CSV file."""
    # File systems differ in how they compose letters.
    folder_of = {unicodedata.normalize("NFC", folder.name): folder.name for folder in folders}
    labels: dict[str, tuple[str, Gender | None]] = {}
    for place, cells in table_rows(file, ["person", "name"], ["gender"]):
        where = f"{file}, {place}"
        person = unicodedata.normalize("NFC", cells["person"].strip())
        if person not in folder_of:
            raise UserError(
                f"there is no folder for the person {person!r}",
                where,
                f"{_did_you_mean(person, folder_of)}Add the folder or remove the line.",
            )
        if folder_of[person] in labels:
            raise UserError(f"the person {person!r} stands twice", where, "Keep one line.")
        name = clean_name(cells["name"], where)
        labels[folder_of[person]] = (name, _gender(cells.get("gender", ""), where))
    for person, folder in folder_of.items():
        if folder not in labels:
            raise UserError(f"the folder {person!r} is not in it", str(file), "Add a line for it.")
    return labels


def _gender(cell: str, where: str) -> Gender | None:
    for gender in get_args(Gender):
        if cell.strip().casefold() == gender:
            return gender  # type: ignore[no-any-return]
    if cell.strip():
        raise UserError(f"unknown gender {cell!r}", where, "Write male, female or nothing.")
    return None


def _check_distinct(labels: _Labels, source: Path) -> None:
    first: dict[str, str] = {}
    for person, (name, _) in sorted(labels.items()):
        other = first.setdefault(name_key(name), person)
        if other != person:
            raise UserError(
                f"the folders {other!r} and {person!r} both have the name {name!r}",
                str(source),
                "Join them if they show one person; else give names that tell them apart.",
            )


def _check_inside(path: Path, root: Path, allow_outside: bool) -> None:
    try:
        inside = path.resolve().is_relative_to(root)
    except (OSError, RuntimeError) as error:
        raise UserError(f"the link cannot be followed ({error})") from error
    if not (inside or allow_outside):
        raise UserError(
            "the link leads outside the folder",
            what_to_do="Move it inside, or allow links to outside if you trust them.",
        )


_Refuse = Callable[[UserError, str, str], None]


def _read_photos(
    folders: Sequence[Path], root: Path, allow_outside: bool, refuse: _Refuse
) -> dict[str, list[Photo]]:
    """The readable photos of each person whose folder can be opened."""
    found: dict[str, list[Photo]] = {}
    for folder in folders:
        try:
            _check_inside(folder, root, allow_outside)
            files = _listed(folder)
        except UserError as fault:
            refuse(fault, folder.name, "person")
            continue
        found[folder.name] = []
        for file in files:
            try:
                found[folder.name].append(_photo(file, root, allow_outside))
            except UserError as fault:
                refuse(fault, f"{folder.name}/{file.name}", "photo")
    return found


def _own_photos(
    found: Mapping[str, Sequence[Photo]], refuse: _Refuse
) -> dict[str, tuple[Photo, ...]]:
    """The photos that stand under one person only, each once."""
    owners: defaultdict[str, set[str]] = defaultdict(set)
    for person, photos in found.items():
        for photo in photos:
            owners[photo.sha256].add(person)
    own: dict[str, tuple[Photo, ...]] = {}
    for person, photos in found.items():
        kept: dict[str, Photo] = {}
        for photo in photos:
            if len(owners[photo.sha256]) > 1:
                people = sorted(owners[photo.sha256])
                what = (
                    f"it stands under {len(people)} people ({', '.join(map(repr, people))}), "
                    "so it cannot show who it is"
                )
                refuse(UserError(what, "", "Keep it where it belongs."), photo.id, "photo")
            elif photo.sha256 in kept:
                what = f"it is a copy of {kept[photo.sha256].id!r}"
                refuse(UserError(what, "", "Remove it."), photo.id, "photo")
            else:
                kept[photo.sha256] = photo
        own[person] = tuple(kept.values())
    return own


def _photo(file: Path, root: Path, allow_outside: bool) -> Photo:
    """Check one photo. Faults are raised without a place, which the caller knows."""
    _check_inside(file, root, allow_outside)
    if not file.is_file():
        what = "a folder inside a person's folder" if file.is_dir() else "not a file"
        raise UserError(f"it is {what}", what_to_do="Put photos directly into the folder.")
    if any(unicodedata.category(character) == "Cs" for character in file.name):
        raise UserError("the file name is not Unicode", what_to_do="Rename it.")
    image = open_rgb(image_bytes(file))
    # Of the pixels: saved again in another format, a photo is the same photo.
    digest = sha256(repr(image.size).encode() + image.tobytes())
    return Photo(file.parent.name, file, digest.hexdigest())


def _is_image(file: Path, root: Path, allow_outside: bool) -> bool:
    try:
        _photo(file, root, allow_outside)
    except UserError:
        return False
    return True


def _people_sha256(people: Sequence[Person]) -> str:
    digest = sha256()
    for person in people:
        # A JSON array shows where each field ends, so no two sets share one stream of bytes.
        fields = [person.person, person.name, [photo.sha256 for photo in person.photos]]
        digest.update(json.dumps(fields).encode())
    return digest.hexdigest()


def _did_you_mean(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {close[0]!r}? " if close else ""
