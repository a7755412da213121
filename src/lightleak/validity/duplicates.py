"""Records that appear twice: a failure of the design across the sets, a group within one."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import imagehash
import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import sparse

from lightleak.records import Record, open_rgb

Kind = Literal["same image and text", "identical image", "near-identical image", "same text"]

# Short and templated texts repeat by nature; from this many words on a repetition is a copy.
LONG_TEXT_WORDS = 8
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


def find_duplicates(records: Sequence[Record], is_suspect: npt.ArrayLike) -> Duplicates:
    """Find copies among all records: same pixels, nearly the same picture, same long text.

    Images are the same when their decoded RGB pixels are (SHA-256), and nearly the same when
    perceptual and difference hash both are close and no part of the picture differs visibly.
    Texts are the same when they agree after Unicode normalisation (NFKC), without case,
    punctuation and repeated spaces; only texts of at least 8 words count by themselves.

    Source: hashes of the ImageHash library (pHash, dHash).

    Raises:
        UserError: an image cannot be opened.
        ValueError: not one entry of `is_suspect` for each record.
    """
    side = np.asarray(is_suspect, dtype=bool)
    if side.shape != (len(records),):
        raise ValueError("is_suspect needs one entry for each record")
    pictures = [_fingerprint(open_rgb(record.image)) for record in records]
    texts = [_normalised(record.text) for record in records]
    same_image = _classes(picture.digest for picture in pictures)
    same_text = _classes(
        text if text.count(" ") + 1 >= LONG_TEXT_WORDS else index
        for index, text in enumerate(texts)
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
    pairs = [DuplicatePair(*pair, kind) for pair, kind in sorted(kinds.items())]
    within = tuple(pair for pair in pairs if side[pair.first] == side[pair.second])
    return Duplicates(
        across=tuple(pair for pair in pairs if side[pair.first] != side[pair.second]),
        within=within,
        groups=_groups(records, within),
    )


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
