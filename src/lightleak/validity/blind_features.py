"""What can be read off records without a model and without labels."""

from __future__ import annotations

import string
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from io import BytesIO
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, JpegImagePlugin
from scipy import fft, ndimage, sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from lightleak.errors import UserError
from lightleak.records import Record, image_bytes, open_rgb

Floats = npt.NDArray[np.float64]

LONGEST_SIDE = 128
TEXT_DIRECTIONS = 16
# A word, a mark of a file or a value of a field is a column when this share of the records has it.
COMMON = 0.02
# Above this a number is a code and no quantity; its square must stay finite.
LARGEST_NUMBER = 1e100
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DAYS = "days since 1970"


@dataclass(frozen=True)
class Wording:
    """How to say that the sets differ in a number or a yes/no that is read off each record.

    "suspect NOUN VERB MORE" of a number; "so many of the suspect NOUN VERB" of a yes/no, which
    has no MORE. A skewed number enters a model as its logarithm.
    """

    name: str
    noun: str
    verb: str
    more: str = ""
    less: str = ""
    unit: str = ""
    skewed: bool = False


@dataclass(frozen=True)
class Table:
    """Columns with their wordings; `values` is (n, d), NaN where a record has no such thing."""

    wordings: tuple[Wording, ...]
    values: Floats

    def take(self, rows: npt.ArrayLike) -> Table:
        """Some of the rows."""
        return replace(self, values=self.values[np.asarray(rows)])

    def design(self) -> Floats:
        """The columns as a model takes them: finite, skewed ones as logarithms, gaps as medians."""
        columns = self.values.copy()
        for column, wording in zip(columns.T, self.wordings, strict=True):
            gaps = np.isnan(column)
            column[gaps] = 0 if gaps.all() else np.median(column[~gaps])
            if wording.skewed:
                column[:] = np.log(column + 1e-4)
        return columns


@dataclass(frozen=True)
class BlindFeatures:
    """What can be read off records without a model and without labels; one row a record.

    Attributes:
        text: lengths, punctuation, case and digits of the texts, length of the prompts.
        image: of the file (size, format, compression, what it carries) and of the pixels (colour,
            frequencies, sharpness, texture).
        fields: the chosen entries of `Record.meta`.
        words: which common words a text contains; named in differences, and no input of a model.
        terms: TF-IDF of words and characters, sparse, shape (n, t).
        directions: the main directions of `terms`, shape (n, k).
    """

    text: Table
    image: Table
    fields: Table
    words: Table
    terms: Any
    directions: Floats

    def __len__(self) -> int:
        return len(self.directions)

    def take(self, rows: npt.ArrayLike) -> BlindFeatures:
        """The features of some records, by index or yes/no: audits of one pool share the reading.

        What was learnt from the pool stays: the weights of the terms, their directions, and which
        words, marks and values are common.
        """
        chosen = np.asarray(rows)
        return BlindFeatures(
            self.text.take(chosen),
            self.image.take(chosen),
            self.fields.take(chosen),
            self.words.take(chosen),
            self.terms[chosen],
            self.directions[chosen],
        )


def blind_features(
    records: Sequence[Record], *, fields: Sequence[str] = (), seed: int
) -> BlindFeatures:
    """Read what a classifier may see: texts, image files, pixels, and chosen fields of `meta`.

    Args:
        records: suspects and controls whose images can be opened, in any order.
        fields: names of entries of `Record.meta` (dates, sources, licences). Numbers and ISO
            dates become numbers; other values that are common become yes/no columns, and so does
            a missing value.
        seed: of the directions.

    Raises:
        UserError: a field that no record has, or an image file that cannot be read.
    """
    # One prompt for all would only dilute the texts.
    same_prompt = len({record.prompt for record in records}) == 1
    documents = [r.text if same_prompt else f"{r.prompt}\n{r.text}" for r in records]
    words = _tfidf(r"(?u)\w+|[^\w\s]", "word", (1, 2))
    weights = words.fit_transform(documents)
    characters = _tfidf(None, "char_wb", (2, 4)).fit_transform(documents)
    terms = sparse.hstack([weights, characters], format="csr")
    return BlindFeatures(
        text=Table(TEXT_WORDINGS, np.array([_read_text(record) for record in records])),
        image=_images(records),
        fields=_beside(_no_columns(records), *(_field(records, name) for name in fields)),
        words=_words(weights, words.get_feature_names_out()),
        terms=terms,
        directions=_directions(terms, seed),
    )


def _beside(*tables: Table) -> Table:
    return Table(
        sum((table.wordings for table in tables), ()),
        np.column_stack([table.values for table in tables]),
    )


def _no_columns(records: Sequence[Record]) -> Table:
    return Table((), np.empty((len(records), 0)))


def _yes_no(noun: str, found: Sequence[Mapping[str, str]]) -> Table:
    """A column for each common name that is found in records, with its verb."""
    counts = Counter(name for each in found for name in each)
    verbs = {name: verb for each in found for name, verb in each.items()}
    common = sorted(name for name, count in counts.items() if count >= COMMON * len(found))
    return Table(
        tuple(Wording(name, noun, verbs[name]) for name in common),
        np.array([[name in each for name in common] for each in found], dtype=np.float64),
    )


TEXT_WORDINGS = (
    Wording("text length", "texts", "are", "longer", "shorter", "characters", skewed=True),
    Wording("text words", "texts", "have", "more words", "fewer words", skewed=True),
    Wording("word length", "texts", "use", "longer words", "shorter words", "characters"),
    Wording("punctuation", "texts", "have", "more punctuation", "less punctuation"),
    Wording("capitals", "texts", "have", "more capitals", "fewer capitals"),
    Wording("digits", "texts", "have", "more digits", "fewer digits"),
    Wording("first capital", "texts", "start with a capital letter"),
    Wording("final full stop", "texts", "end with a full stop"),
    Wording("lines", "texts", "have", "more lines", "fewer lines", skewed=True),
    Wording("prompt length", "prompts", "are", "longer", "shorter", "characters", skewed=True),
)


def _read_text(record: Record) -> list[float]:
    """The numbers that TEXT_WORDINGS names; shares are of the characters."""
    text = record.text
    length, words = max(len(text), 1), len(text.split())
    return [
        len(text),
        words,
        sum(not character.isspace() for character in text) / max(words, 1),
        sum(character in string.punctuation for character in text) / length,
        sum(character.isupper() for character in text) / length,
        sum(character.isdigit() for character in text) / length,
        text.lstrip()[:1].isupper(),
        text.rstrip().endswith("."),
        len(text.splitlines()),
        len(record.prompt),
    ]


def _tfidf(pattern: str | None, analyzer: str, lengths: tuple[int, int]) -> TfidfVectorizer:
    return TfidfVectorizer(
        analyzer=analyzer,
        ngram_range=lengths,
        token_pattern=pattern,
        max_features=3000,
        sublinear_tf=True,
    )


def _words(weights: Any, names: npt.NDArray[np.str_]) -> Table:
    present = weights > 0
    share = np.asarray(present.mean(axis=0)).ravel()
    common = [i for i in np.flatnonzero(share >= COMMON) if names[i].isalnum()]
    return Table(
        tuple(Wording(f"word “{names[i]}”", "texts", f"contain “{names[i]}”") for i in common),
        present[:, common].toarray().astype(np.float64),
    )


def _directions(terms: Any, seed: int) -> Floats:
    count = min(TEXT_DIRECTIONS, min(terms.shape) - 1)
    if count < 1:
        return np.empty((terms.shape[0], 0))
    return np.asarray(TruncatedSVD(count, random_state=seed).fit_transform(terms))


FILE_WORDINGS = (
    Wording("file size", "image files", "are", "larger", "smaller", "bytes", skewed=True),
    Wording("image width", "images", "are", "wider", "narrower", "pixels", skewed=True),
    Wording("image height", "images", "are", "taller", "shorter", "pixels", skewed=True),
    Wording("bytes per pixel", "images", "use", "more bytes a pixel", "fewer bytes a pixel"),
    Wording("JPEG tables", "images", "are compressed", "more", "less", "table sum", skewed=True),
    Wording("EXIF size", "images", "carry", "more EXIF", "less EXIF", "bytes", skewed=True),
    Wording("resolution", "images", "state", "more dots", "fewer dots", "per inch", skewed=True),
)
_COLOURS = ("red", "green", "blue")
_BANDS = ("coarse", "medium", "fine", "finest")
_AS_BRIGHT = "pixels with {} neighbours of 8 as bright"


def _more(name: str, what: str, less: str = "less") -> Wording:
    return Wording(name, "images", "have", f"more {what}", f"{less} {what}")


PIXEL_WORDINGS = (
    *(_more(colour, colour) for colour in _COLOURS),
    *(_more(f"{colour} contrast", f"contrast in {colour}") for colour in _COLOURS),
    *(_more(f"{band} detail", f"{band} detail") for band in _BANDS),
    Wording("sharpness", "images", "are", "sharper", "blurrier", skewed=True),
    *(_more(f"texture {count}", _AS_BRIGHT.format(count), "fewer") for count in range(9)),
)
# What Pillow finds in a header, where its name is not plain or says no more than another's.
_MARKS = {
    "exif": ("EXIF", "carry EXIF data"),
    "icc_profile": ("colour profile", "carry a colour profile"),
    "dpi": ("stated resolution", "state a resolution"),
    "progressive": ("progressive", "are progressive JPEG files"),
}
_ECHOES = {"progression", "jfif_version", "jfif_unit", "jfif_density", "adobe_transform"}


def _images(records: Sequence[Record]) -> Table:
    numbers, marks = [], []
    for record in records:
        encoded = image_bytes(record.image)
        values, found = _read_file(encoded)
        numbers.append([*values, *_read_pixels(open_rgb(encoded))])
        marks.append(found)
    table = Table((*FILE_WORDINGS, *PIXEL_WORDINGS), np.array(numbers))
    return _beside(table, _yes_no("images", marks))


def _read_file(encoded: bytes) -> tuple[list[float], dict[str, str]]:
    """What a file says before it is decoded: FILE_WORDINGS' numbers, and marks with their verbs."""
    with warnings.catch_warnings():
        # The records room has a limit of its own, and refused what is beyond it.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(BytesIO(encoded))
    with image:
        tables = getattr(image, "quantization", None) or {}
        marks = {
            f"format {image.format}": f"are {image.format} files",
            f"mode {image.mode}": f"are stored as {image.mode}",
        }
        for key in map(str, image.info.keys() - _ECHOES):
            other = f"mark “{plain(key)}”"
            name, verb = _MARKS.get(key, (other, f"carry the {other}"))
            marks[name] = verb
        if image.format == "JPEG" and JpegImagePlugin.get_sampling(image) == 0:
            marks["full colour"] = "are JPEG files that keep colour at full resolution"
        values = [
            len(encoded),
            image.width,
            image.height,
            len(encoded) / (image.width * image.height),
            sum(sum(table) for table in tables.values()) or np.nan,
            len(image.info.get("exif", "")) or np.nan,
            _positive(image.info.get("dpi", (np.nan,))[0]),
        ]
    return values, marks


def plain(text: object) -> str:
    """Somebody else's words as part of a sentence: printable, and not long."""
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    return shown if len(shown) <= 40 else f"{shown[:39]}…"


def _positive(value: Any) -> float:
    """A number of a header, which may be anything, or NaN."""
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return np.nan
    return number if 0 < number < LARGEST_NUMBER else np.nan


def _read_pixels(image: Image.Image) -> list[float]:
    """Colour, frequencies, sharpness and texture of a small copy; intensities run from 0 to 1."""
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    colours = np.asarray(image, dtype=np.float64) / 255
    grey = colours.mean(axis=2)
    return [
        *colours.mean(axis=(0, 1)),
        *colours.std(axis=(0, 1)),
        *_detail(grey),
        float(ndimage.laplace(grey).var()),
        *_texture(grey),
    ]


def _detail(grey: Floats) -> list[float]:
    """Share of the contrast in each octave of the cosine transform, from coarse to finest."""
    power = fft.dctn(grey, norm="ortho") ** 2
    down, across = (np.arange(size) / size for size in grey.shape)
    radius = np.hypot(down[:, None], across[None, :])
    power[0, 0] = 0
    edges = (0, 1 / 8, 1 / 4, 1 / 2, 2)
    total = power.sum() or 1.0
    return [
        float(power[(radius >= low) & (radius < high)].sum() / total)
        for low, high in pairwise(edges)
    ]


def _texture(grey: Floats) -> list[float]:
    """Share of pixels with 0 … 8 neighbours at least as bright: a local binary pattern, counted."""
    padded = np.pad(grey, 1, mode="edge")
    height, width = grey.shape
    counts = sum(
        (padded[row : row + height, column : column + width] >= grey).astype(np.int64)
        for row in range(3)
        for column in range(3)
        if (row, column) != (1, 1)
    )
    return [float(share) for share in np.bincount(np.ravel(counts), minlength=9) / grey.size]


def _field(records: Sequence[Record], name: str) -> Table:
    """One entry of `meta`: its numbers, its dates, its other values, and where there is none."""
    found = [record.meta.get(name) for record in records]
    held = ["" if value is None else str(value) for value in found]
    if not any(held):
        known = sorted({key for record in records for key in record.meta})
        raise UserError(
            f"no record has a value of {name!r} in its meta",
            what_to_do=f"Name one of: {', '.join(known)}." if known else "Their meta are empty.",
        )
    shown = plain(name)
    values = np.array([_quantity(value) for value in held])
    positive = not (values[:, 0] < 0).any()
    more_or_less = (f"higher “{shown}”", f"lower “{shown}”")
    later_or_earlier = (f"a later “{shown}”", f"an earlier “{shown}”")
    wordings = (
        Wording(f"field {shown}", "records", "have", *more_or_less, skewed=positive),
        Wording(f"field {shown}", "records", "have", *later_or_earlier, DAYS),
    )
    rest = np.isnan(values).all(axis=1)
    said = [_said(shown, value) if i else {} for value, i in zip(held, rest, strict=True)]
    used = np.flatnonzero(~np.isnan(values).all(axis=0))
    table = Table(tuple(wordings[i] for i in used), values[:, used])
    return _beside(table, _yes_no("records", said))


def _quantity(text: str) -> tuple[float, float]:
    """As a number, and as an ISO date in days since 1970, UTC unless it says; NaN if it is none."""
    with suppress(ValueError):
        if abs(number := float(text)) < LARGEST_NUMBER:
            return number, np.nan
    with suppress(ValueError, OverflowError):
        moment = datetime.fromisoformat(text)
        zoned = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return np.nan, (zoned - EPOCH) / timedelta(days=1)
    return np.nan, np.nan


def _said(field: str, value: str) -> dict[str, str]:
    if not value:
        return {f"no field {field}": f"have no “{field}”"}
    shown = f"{field} = {plain(value)}"
    return {f"field {shown}": f"have {shown}"}
