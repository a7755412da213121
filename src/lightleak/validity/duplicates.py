"""Records that appear twice: a failure of the design across the sets, a group within one."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import imagehash
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from scipy import sparse

from lightleak.errors import UserError
from lightleak.records import Record, open_rgb

Kind = Literal[
    "same image and text",
    "identical image",
    "near-identical image",
    "same text",
    "near-identical text",
    "near-identical embedding",
]

# Short texts repeat by nature; from this many words on a repetition is a copy. Where a script
# sets no spaces, a word counts as two characters.
LONG_TEXT_WORDS = 8
WORD_CHARACTERS = 2
# Thai, Lao; Burmese; Khmer; kana; Han.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
SHINGLE_WORDS, SHINGLE_CHARACTERS = 3, 5
# Nearly the same texts share this much of what either says (Jaccard index of their shingles), and
# as many shingles as the shortest long text has that only few texts hold: what more than so many
# different texts share is a template, and two that fill it in differ where it counts.
TEXT_SIMILARITY = 0.8
FEWEST_OWN = LONG_TEXT_WORDS - SHINGLE_WORDS + 1
TEMPLATE_TEXTS = 10
# Of the 64 bits of each hash. Recompression and resizing change up to about 6.
HASH_DISTANCE = 8
# Small pictures of a few shapes on a flat ground share hashes without being copies, so no part
# of the picture may differ by more than this (of 255, mean over a cell of 4 × 4 of 32 × 32).
CELL_DIFFERENCE = 24
THUMBNAIL, CELLS = 32, 8
BLOCK_PAIRS = 4_000_000


@dataclass(frozen=True)
class DuplicatePair:
    """Two records that are copies; positions in the sequence that was searched, first < second."""

    first: int
    second: int
    kind: Kind


@dataclass(frozen=True)
class Duplicates:
    """Every copy that was found.

    A record is paired with the first suspect and the first control among its copies, not with
    each of them: removing one partner of every pair in `across` leaves no copy on both sides.

    Attributes:
        across: pairs of a suspect and a control; each is a failure of the design.
        within: pairs on one side.
        groups: one number for each record; equal for records of one `group` and for copies
            within a side. The unit of assignment and of resampling.
    """

    across: tuple[DuplicatePair, ...]
    within: tuple[DuplicatePair, ...]
    groups: tuple[int, ...]


def find_duplicates(
    records: Sequence[Record],
    is_suspect: npt.ArrayLike,
    *,
    embeddings: npt.ArrayLike | None = None,
    cosine: float = 0.97,
) -> Duplicates:
    """Find copies among all records: same pixels, nearly the same picture, nearly the same text.

    Images are the same when their decoded RGB pixels are (SHA-256), and nearly the same when
    perceptual and difference hash both are close and no part of the picture differs visibly.
    Texts are the same when they agree after Unicode normalisation (NFKC), without case,
    punctuation and repeated spaces, and nearly the same when of their runs of three words (five
    characters where a script sets no spaces) at least 0.8 are common to both, beyond what many
    texts share; only texts of at least 8 words count by themselves.

    Source: hashes of the ImageHash library (pHash, dHash); shingles and their resemblance, Broder
    1997.

    Args:
        records: of both sides.
        is_suspect: (n,) the side of each.
        embeddings: (n, d), none of length 0, by any model but the target; None looks at none.
        cosine: from which similarity two embeddings are those of copies.

    Raises:
        UserError: an image cannot be opened.
        ValueError: not one entry of `is_suspect`, or row of `embeddings`, for each record.
    """
    side = np.asarray(is_suspect, dtype=bool)
    if side.shape != (len(records),):
        raise ValueError("is_suspect needs one entry for each record")
    pictures = [_fingerprint(open_rgb(record.image)) for record in records]
    texts = [_normalised(record.text) for record in records]
    shingles = [_shingles(text) for text in texts]
    same_image = _classes(picture.digest for picture in pictures)
    same_text = _classes(
        text if shingles[index].size else index for index, text in enumerate(texts)
    )
    kinds: dict[tuple[int, int], Kind] = {}
    for copies in same_image:
        for first, second in _links(copies, copies, side):
            same = texts[first] == texts[second]
            kinds[first, second] = "same image and text" if same else "identical image"
    originals = [copies[0] for copies in same_image]
    for one, other in _near([pictures[index] for index in originals]):
        for pair in _links(same_image[one], same_image[other], side):
            kinds[pair] = "near-identical image"
    for copies in same_text:
        for pair in _links(copies, copies, side):
            kinds.setdefault(pair, "same text")
    for one, other in _near_texts([shingles[copies[0]] for copies in same_text]):
        for pair in _links(same_text[one], same_text[other], side):
            kinds.setdefault(pair, "near-identical text")
    if embeddings is not None:
        for pair in _near_embeddings(np.asarray(embeddings, dtype=np.float32), side, cosine):
            kinds.setdefault(pair, "near-identical embedding")
    pairs = [DuplicatePair(*pair, kind) for pair, kind in sorted(kinds.items())]
    within = tuple(pair for pair in pairs if side[pair.first] == side[pair.second])
    return Duplicates(
        across=tuple(pair for pair in pairs if side[pair.first] != side[pair.second]),
        within=within,
        groups=_groups(records, within),
    )


def read_embeddings(file: Path, ids: Sequence[str]) -> npt.NDArray[np.float32]:
    """Embeddings (n, d) of the records with these ids, from Parquet with columns id and embedding.

    Raises:
        UserError: it cannot be read, lacks a column or a record, or an embedding is null, has
            another length than the rest, a number that is not finite, or no direction.
    """
    try:
        table = pq.read_table(file, columns=["id", "embedding"]).select(["id", "embedding"])
        names = table["id"].cast(pa.string()).to_pylist()
        lengths = pc.fill_null(pc.list_value_length(table["embedding"]), 0).to_numpy()
        flat = pc.list_flatten(table["embedding"]).cast(pa.float32()).to_numpy()
    except (pa.ArrowException, KeyError, OSError) as error:
        raise UserError(
            f"no embeddings can be read from it ({error})",
            str(file),
            "Give a Parquet file with the columns id and embedding, a list of numbers.",
        ) from error
    rows = {name: row for row, name in enumerate(names)}
    missing = [name for name in ids if name not in rows]
    if missing:
        raise UserError(
            f"{len(missing)} record(s) have no embedding in it, the first {missing[0]!r}", str(file)
        )
    odd = np.flatnonzero(lengths != lengths[0])
    if odd.size:
        raise UserError(
            f"it has {lengths[odd[0]]} numbers, and the first embedding has {lengths[0]}",
            f"{file}, {names[odd[0]]}",
        )
    vectors = flat.reshape(len(names), -1)
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(vectors, axis=1)
    odd = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if odd.size:
        raise UserError(
            "its embedding is zero or not finite, and so has no direction",
            f"{file}, {names[odd[0]]}",
            "Leave the record out, or embed it anew.",
        )
    return np.asarray(vectors[[rows[name] for name in ids]])


@dataclass(frozen=True)
class _Fingerprint:
    """Digest of the pixels; two hashes of 64 bits; a thumbnail of shape (32, 32, 3)."""

    digest: bytes
    hashes: npt.NDArray[np.uint64]
    thumbnail: npt.NDArray[np.uint8]


def _fingerprint(image: Image.Image) -> _Fingerprint:
    size = f"{image.width}x{image.height}".encode()
    digest = hashlib.sha256(size + image.tobytes()).digest()
    bits = [imagehash.phash(image).hash, imagehash.dhash(image).hash]
    return _Fingerprint(
        digest=digest,
        hashes=np.packbits(bits).view(np.uint64),
        thumbnail=np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)),
    )


def _normalised(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded))


def _shingles(text: str) -> npt.NDArray[np.int64]:
    """Hashes of the runs of words or characters in a normalised text; none for a short one.

    The hashes differ between processes, and only whether two are equal is ever used.
    """
    letters = text.replace(" ", "")
    words: Sequence[str] = text.split()
    width, long = SHINGLE_WORDS, len(words) >= LONG_TEXT_WORDS
    if 2 * len(UNSPACED.findall(letters)) > len(letters):
        words, width = letters, SHINGLE_CHARACTERS
        long = len(letters) >= LONG_TEXT_WORDS * WORD_CHARACTERS
    runs = zip(*(words[start:] for start in range(width)), strict=False)
    return np.array(list(set(map(hash, runs))) if long else [], dtype=np.int64)


def _near_texts(shingles: Sequence[npt.NDArray[np.int64]]) -> Iterator[tuple[int, int]]:
    """Pairs of different texts that are nearly the same.

    What only few texts hold leads from each to its likes directly, so no pair is missed, and
    there is no need to estimate the index (MinHash).
    """
    sizes = np.array([each.size for each in shingles], dtype=np.int64)
    codes = np.concatenate([*shingles, np.empty(0, np.int64)])
    _, columns, texts = np.unique(codes, return_inverse=True, return_counts=True)
    held = sparse.csr_array(
        (np.ones(codes.size, np.int32), columns, np.r_[0, sizes.cumsum()]),
        shape=(sizes.size, texts.size),
    )
    own = held[:, (texts > 1) & (texts <= TEMPLATE_TEXTS)]
    shared = sparse.triu(own @ own.T, 1).tocoo()
    enough = shared.data >= FEWEST_OWN
    first, second = shared.row[enough], shared.col[enough]
    common = held[first].multiply(held[second]).sum(axis=1)
    near = common >= TEXT_SIMILARITY * (sizes[first] + sizes[second] - common)
    yield from zip(first[near].tolist(), second[near].tolist(), strict=True)


def _near_embeddings(
    embeddings: npt.NDArray[np.float32], side: npt.NDArray[np.bool_], cosine: float
) -> Iterator[tuple[int, int]]:
    """Each record with the first suspect and the first control whose embedding is nearly its own.

    By blocks of rows.
    """
    if embeddings.ndim != 2 or len(embeddings) != side.size:
        raise ValueError("embeddings need one row for each record")
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    rows = max(1, BLOCK_PAIRS // max(side.size, 1))
    for start in range(0, side.size, rows):
        close = unit[start : start + rows] @ unit.T >= cosine
        np.fill_diagonal(close[:, start:], False)
        for partners in (np.flatnonzero(side), np.flatnonzero(~side)):
            near = close[:, partners]
            for row in np.flatnonzero(near.any(axis=1)).tolist():
                partner = int(partners[near[row].argmax()])
                yield min(start + row, partner), max(start + row, partner)


def _classes(keys: Iterable[Hashable]) -> list[list[int]]:
    """Positions that share a key, in order of first appearance."""
    positions: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        positions[key].append(index)
    return list(positions.values())


def _links(
    some: Sequence[int], others: Sequence[int], side: npt.NDArray[np.bool_]
) -> Iterator[tuple[int, int]]:
    """Each record of either class with the first suspect and the first control of the other."""
    for left, right in ((some, others), (others, some)):
        firsts = {bool(side[index]): index for index in reversed(right)}.values()
        for index in left:
            for partner in firsts:
                if index != partner:
                    yield min(index, partner), max(index, partner)


def _near(pictures: Sequence[_Fingerprint]) -> Iterator[tuple[int, int]]:
    """Pairs of pictures that are nearly the same, by blocks of rows against all later ones."""
    hashes = np.array([picture.hashes for picture in pictures]).reshape(len(pictures), 2)
    thumbnails = np.array([picture.thumbnail for picture in pictures]).astype(np.int16)
    rows = max(1, BLOCK_PAIRS // max(len(pictures), 1))
    for start in range(0, len(pictures), rows):
        block = slice(start, start + rows)
        close = np.triu(np.ones((len(hashes[block]), len(pictures) - start), dtype=bool), 1)
        for kind in range(2):
            distance = np.bitwise_count(hashes[block, kind, None] ^ hashes[None, start:, kind])
            close &= distance <= HASH_DISTANCE
        first, second = np.nonzero(close)
        yield from _looks_alike(thumbnails, first + start, second + start)


def _looks_alike(
    thumbnails: npt.NDArray[np.int16], first: npt.NDArray[np.intp], second: npt.NDArray[np.intp]
) -> Iterator[tuple[int, int]]:
    step = BLOCK_PAIRS // thumbnails[0].size
    for start in range(0, first.size, step):
        one, other = first[start : start + step], second[start : start + step]
        differences = np.abs(thumbnails[one] - thumbnails[other])
        cells = differences.reshape(-1, CELLS, THUMBNAIL // CELLS, CELLS, THUMBNAIL // CELLS, 3)
        worst = cells.mean(axis=(2, 4, 5)).max(axis=(1, 2))
        for index in np.flatnonzero(worst <= CELL_DIFFERENCE):
            yield int(one[index]), int(other[index])


def _groups(records: Sequence[Record], within: Sequence[DuplicatePair]) -> tuple[int, ...]:
    """Connected parts of: same `group`, or copies within a side."""
    edges = [(pair.first, pair.second) for pair in within]
    for members in _classes(
        index if record.group is None else record.group for index, record in enumerate(records)
    ):
        edges += [(members[0], other) for other in members[1:]]
    first, second = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    graph = sparse.coo_matrix((np.ones(len(edges)), (first, second)), shape=(len(records),) * 2)
    _, labels = sparse.csgraph.connected_components(graph, directed=False)
    return tuple(int(label) for label in labels)
