"""Can the two sets be told apart by someone who never saw the model?"""

from __future__ import annotations

import string
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import fft, ndimage, sparse, stats
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler

from lightleak.errors import UserError
from lightleak.records import Record, open_rgb
from lightleak.records.images import image_bytes
from lightleak.statistics import Estimate, auc, auc_across_folds, holm

Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]

LONGEST_SIDE = 128
TEXT_DIRECTIONS = 16
# Differences below this level, adjusted for their number, are named.
SIGNIFICANT = 0.05
# A word can be a difference when at least this share of the texts has it, and of them lacks it.
COMMON_WORD = 0.02


@dataclass(frozen=True)
class Difference:
    """One thing in which the sets differ.

    Attributes:
        feature: its name.
        sentence: the difference in plain words.
        auc: P(a suspect has more of it than a control), ties ½.
        suspect_median: in the feature's own unit.
        control_median: likewise.
        adjusted_p: two-sided Mann–Whitney over groups, Holm-adjusted over all features.
    """

    feature: str
    sentence: str
    auc: float
    suspect_median: float
    control_median: float
    adjusted_p: float


@dataclass(frozen=True)
class BlindBaseline:
    """How well the sets are told apart without any target.

    Attributes:
        text, image, joint: AUC of a classifier that was cross-validated on that part of the
            records; the interval is `auc_across_folds`'.
        differences: what differs beyond chance, strongest first.
        features: what the residual test adjusts for, shape (n, d): statistics of texts and images
            and the main directions of the texts; no column is constant.
        feature_names: one for each column.
    """

    text: Estimate
    image: Estimate
    joint: Estimate
    differences: tuple[Difference, ...]
    features: Floats
    feature_names: tuple[str, ...]


def blind_baseline(
    records: Sequence[Record], is_suspect: npt.ArrayLike, *, seed: int, folds: int = 2
) -> BlindBaseline:
    """Try to tell suspects from controls by the records alone.

    Logistic regressions, cross-validated with groups kept whole: on the texts (TF-IDF of words
    and characters, length, punctuation, case, digits), on the images (file, size, compression,
    colour, frequencies, sharpness, texture), and on both.

    Args:
        records: suspects and controls whose images can be opened, in any order.
        is_suspect: one entry for each record; shape (n,).
        seed: of the folds and of the text directions.
        folds: lowered when a side has fewer groups. Two by default: the interval of K folds is
            about √(K/2) times as wide, which costs more than the larger training sets gain.

    Raises:
        UserError: a side has too few groups for two folds.
        ValueError: not one entry of `is_suspect` for each record.
    """
    side = np.asarray(is_suspect, dtype=bool)
    if side.shape != (len(records),):
        raise ValueError("is_suspect needs one entry for each record")
    groups = _groups(records)
    parts = _folds(side, groups, folds, seed)
    texts, images = _text_columns(records), _image_columns(records)
    # Fitted on all records at once: no label enters, so nothing of a fold's answer leaks.
    words = _tfidf(r"(?u)\w+|[^\w\s]", "word", (1, 2))
    word_weights = words.fit_transform(_documents(records))
    characters = _tfidf(None, "char_wb", (2, 4)).fit_transform(_documents(records))
    terms = sparse.hstack([word_weights, characters], format="csr")

    def told_apart(columns: Sequence[_Column], weights: Any) -> Estimate:
        scores = _cross_validated(_design(columns), weights, side, parts)
        fold = np.empty(side.size, dtype=np.int64)
        for number, part in enumerate(parts):
            fold[part] = number
        return auc_across_folds(
            scores[side],
            scores[~side],
            fold[side],
            fold[~side],
            member_groups=groups[side],
            nonmember_groups=groups[~side],
        )

    columns = [*texts, *images]
    named_words = _word_columns(word_weights, words.get_feature_names_out())
    directions = _text_directions(terms, seed)
    features = np.column_stack([_design(columns), directions])
    varies = np.ptp(features, axis=0) > 0
    names = [column.wording.name for column in columns]
    names += [f"text direction {number + 1}" for number in range(directions.shape[1])]
    return BlindBaseline(
        text=told_apart(texts, terms),
        image=told_apart(images, terms[:, :0]),
        joint=told_apart(columns, terms),
        differences=_differences([*columns, *named_words], side, groups),
        features=features[:, varies],
        feature_names=tuple(np.array(names)[varies].tolist()),
    )


@dataclass(frozen=True)
class _Wording:
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
class _Column:
    wording: _Wording
    values: Floats


TEXT_WORDINGS = (
    _Wording("text length", "texts", "are", "longer", "shorter", "characters", skewed=True),
    _Wording("text words", "texts", "have", "more words", "fewer words", skewed=True),
    _Wording("word length", "texts", "use", "longer words", "shorter words", "characters"),
    _Wording("punctuation", "texts", "have", "more punctuation", "less punctuation"),
    _Wording("capitals", "texts", "have", "more capitals", "fewer capitals"),
    _Wording("digits", "texts", "have", "more digits", "fewer digits"),
    _Wording("first capital", "texts", "start with a capital letter"),
    _Wording("final full stop", "texts", "end with a full stop"),
    _Wording("lines", "texts", "have", "more lines", "fewer lines", skewed=True),
    _Wording("prompt length", "prompts", "are", "longer", "shorter", "characters", skewed=True),
)


def _text_columns(records: Sequence[Record]) -> list[_Column]:
    values = np.array([_read_text(record) for record in records])
    return [_Column(*each) for each in zip(TEXT_WORDINGS, values.T, strict=True)]


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


IMAGE_WORDINGS = (
    _Wording("file size", "image files", "are", "larger", "smaller", "bytes", skewed=True),
    _Wording("image width", "images", "are", "wider", "narrower", "pixels", skewed=True),
    _Wording("image height", "images", "are", "taller", "shorter", "pixels", skewed=True),
    _Wording("bytes per pixel", "images", "use", "more bytes a pixel", "fewer bytes a pixel"),
    _Wording("JPEG tables", "images", "are compressed", "more", "less", "table sum", skewed=True),
    _Wording("EXIF", "images", "carry EXIF data"),
    _Wording("red", "images", "have", "more red", "less red"),
    _Wording("green", "images", "have", "more green", "less green"),
    _Wording("blue", "images", "have", "more blue", "less blue"),
    _Wording("red contrast", "images", "have", "more contrast in red", "less contrast in red"),
    _Wording(
        "green contrast", "images", "have", "more contrast in green", "less contrast in green"
    ),
    _Wording("blue contrast", "images", "have", "more contrast in blue", "less contrast in blue"),
    *(
        _Wording(f"{band} detail", "images", "have", f"more {band} detail", f"less {band} detail")
        for band in ("coarse", "medium", "fine", "finest")
    ),
    _Wording("sharpness", "images", "are", "sharper", "blurrier", skewed=True),
    *(
        _Wording(
            f"texture {count}",
            "images",
            "have",
            f"more pixels with {count} neighbours of 8 as bright",
            f"fewer pixels with {count} neighbours of 8 as bright",
        )
        for count in range(9)
    ),
)


def _image_columns(records: Sequence[Record]) -> list[_Column]:
    files = [_read_file(record) for record in records]
    pixels = [_read_pixels(open_rgb(record.image)) for record in records]
    values = np.column_stack([[file.values for file in files], pixels])
    columns = [_Column(*each) for each in zip(IMAGE_WORDINGS, values.T, strict=True)]
    for kind, verb in (("format", "are {} files"), ("mode", "are stored as {}")):
        found = [getattr(file, kind) for file in files]
        columns += [
            _Column(
                _Wording(f"{kind} {each}", "images", verb.format(each)),
                np.array([other == each for other in found], dtype=np.float64),
            )
            for each in sorted(set(found))
        ]
    return columns


@dataclass(frozen=True)
class _File:
    """What a file says before it is decoded; `values` are the first six of IMAGE_WORDINGS."""

    values: list[float]
    format: str
    mode: str


def _read_file(record: Record) -> _File:
    encoded = image_bytes(record.image)
    size = len(encoded)
    with warnings.catch_warnings():
        # The records room has a limit of its own, and refused what is beyond it.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(BytesIO(encoded)) as image:
            tables = getattr(image, "quantization", None) or {}
            return _File(
                values=[
                    size,
                    image.width,
                    image.height,
                    size / (image.width * image.height),
                    sum(sum(table) for table in tables.values()),
                    "exif" in image.info,
                ],
                format=image.format or "unknown",
                mode=image.mode,
            )


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


def _documents(records: Sequence[Record]) -> list[str]:
    """Prompt and text; one prompt for all would only dilute the texts."""
    if len({record.prompt for record in records}) == 1:
        return [record.text for record in records]
    return [f"{record.prompt}\n{record.text}" for record in records]


def _tfidf(pattern: str | None, analyzer: str, lengths: tuple[int, int]) -> TfidfVectorizer:
    return TfidfVectorizer(
        analyzer=analyzer,
        ngram_range=lengths,
        token_pattern=pattern,
        max_features=3000,
        sublinear_tf=True,
    )


def _word_columns(weights: Any, names: npt.NDArray[np.str_]) -> list[_Column]:
    present = (weights > 0).astype(np.float64)
    share = np.asarray(present.mean(axis=0)).ravel()
    common = np.flatnonzero((share >= COMMON_WORD) & (share <= 1 - COMMON_WORD))
    return [
        _Column(
            _Wording(f"word “{names[index]}”", "texts", f"contain “{names[index]}”"),
            present[:, [index]].toarray().ravel(),
        )
        for index in common
        if names[index].isalnum()
    ]


def _text_directions(terms: Any, seed: int) -> Floats:
    count = min(TEXT_DIRECTIONS, min(terms.shape) - 1)
    if count < 1:
        return np.empty((terms.shape[0], 0))
    return np.asarray(TruncatedSVD(count, random_state=seed).fit_transform(terms))


def _design(columns: Sequence[_Column]) -> Floats:
    return np.column_stack(
        [
            np.log(column.values + 1e-4) if column.wording.skewed else column.values
            for column in columns
        ]
    )


def _groups(records: Sequence[Record]) -> Integers:
    labels = [
        f"record {index}" if record.group is None else f"group {record.group}"
        for index, record in enumerate(records)
    ]
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _folds(side: Booleans, groups: Integers, folds: int, seed: int) -> list[Integers]:
    """The most folds, up to `folds`, of which each holds suspects and controls."""
    smaller = min(np.unique(groups[side]).size, np.unique(groups[~side]).size)
    for count in range(min(folds, smaller), 1, -1):
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
        parts = [test for _, test in splitter.split(groups, side, groups)]
        if all(side[part].any() and not side[part].all() for part in parts):
            return parts
    raise UserError(
        "too few groups to compare suspects with controls",
        what_to_do="Give at least two groups (or records without a group) on each side.",
    )


def _cross_validated(
    design: Floats, terms: Any, side: Booleans, parts: Sequence[Integers]
) -> Floats:
    """Decision values, each from a fit on the other folds."""
    scores = np.empty(side.size)
    for test in parts:
        train = np.setdiff1d(np.arange(side.size), test)
        scaler = StandardScaler().fit(design[train])
        inputs = sparse.hstack([scaler.transform(design), terms], format="csr")
        model = LogisticRegression(solver="liblinear").fit(inputs[train], side[train])
        scores[test] = model.decision_function(inputs[test])
    return scores


def _differences(
    columns: Sequence[_Column], side: Booleans, groups: Integers
) -> tuple[Difference, ...]:
    varying = [column for column in columns if np.ptp(column.values) > 0]
    values = np.column_stack([column.values for column in varying])
    # One value a group and side, since records of a group are no independent evidence.
    suspects, controls = (_group_means(values[rows], groups[rows]) for rows in (side, ~side))
    p_values = holm(stats.mannwhitneyu(suspects, controls, method="asymptotic").pvalue)
    found = [
        _difference(column, side, float(p_value))
        for column, p_value in zip(varying, p_values, strict=True)
        if p_value <= SIGNIFICANT
    ]
    return tuple(sorted(found, key=lambda each: -abs(each.auc - 0.5)))


def _group_means(values: Floats, groups: Integers) -> Floats:
    _, code, count = np.unique(groups, return_inverse=True, return_counts=True)
    sums = np.zeros((count.size, values.shape[1]))
    np.add.at(sums, code, values)
    return sums / count[:, None]


def _difference(column: _Column, side: Booleans, adjusted_p: float) -> Difference:
    suspect, control = column.values[side], column.values[~side]
    return Difference(
        feature=column.wording.name,
        sentence=_sentence(column.wording, suspect, control),
        auc=auc(suspect, control),
        suspect_median=float(np.median(suspect)),
        control_median=float(np.median(control)),
        adjusted_p=adjusted_p,
    )


def _sentence(wording: _Wording, suspect: Floats, control: Floats) -> str:
    if not wording.more:
        return (
            f"{suspect.mean():.0%} of suspect {wording.noun} {wording.verb}, "
            f"against {control.mean():.0%} of control {wording.noun}"
        )
    # Where the medians are the same, as with rare digits, the means tell what differs.
    name = "median" if np.median(suspect) != np.median(control) else "mean"
    left, right = (float(getattr(np, name)(values)) for values in (suspect, control))
    word = wording.more if auc(suspect, control) > 0.5 else wording.less
    ratio = max(left, right) / min(left, right) if min(left, right) > 0 else 1.0
    times = f"{ratio:.1f}× " if ratio >= 1.1 else ""
    return (
        f"suspect {wording.noun} {wording.verb} {times}{word} "
        f"({name} {left:.3g} against {right:.3g}{wording.unit and ' ' + wording.unit})"
    )
