"""The run folder: what lies where, written so that a kill at any moment loses one part at most."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightleak.errors import UserError


@dataclass(frozen=True)
class Run:
    """The folder of one run and the files in it."""

    folder: Path

    @staticmethod
    def create(folder: str | Path) -> Run:
        """Make the folder, or take up the one that is there.

        Raises:
            UserError: it cannot be written, or holds something that is no run.
        """
        run = Run(Path(folder))
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            # A name with a dot in front is what a kill leaves of a file that was being written.
            names = [p.name for p in run.folder.iterdir() if not p.name.startswith(".")]
            strangers = [name for name in names if name not in _FILES]
            if not strangers:
                run.evidence.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the run folder cannot be written ({error.strerror})",
                str(folder),
                "Give --out a folder that can be.",
            ) from error
        if strangers:
            raise UserError(
                f"it holds {strangers[0]!r}, which is no part of a run",
                str(folder),
                "Give --out a folder of its own.",
            )
        return run

    @staticmethod
    def open(folder: str | Path) -> Run:
        """The finished or unfinished run in `folder`.

        Raises:
            UserError: there is none.
        """
        run = Run(Path(folder))
        if not run.manifest_file.is_file():
            raise UserError("no run here: manifest.json is missing", str(folder))
        return run

    @property
    def evidence(self) -> Path:
        """Where the expensive half lies."""
        return self.folder / "evidence"

    @property
    def manifest_file(self) -> Path:
        """What was run, on what, with what."""
        return self.folder / "manifest.json"

    @property
    def scores_file(self) -> Path:
        """One row a record and signal."""
        return self.folder / "scores.parquet"

    @property
    def failures_file(self) -> Path:
        """One row a record that failed, or that a signal could not score."""
        return self.folder / "failures.parquet"

    @property
    def claims_file(self) -> Path:
        """One row a suspect: what may be said of it alone by the primary signal."""
        return self.folder / "claims.parquet"

    @property
    def verdict_file(self) -> Path:
        """The finding."""
        return self.folder / "verdict.json"

    @property
    def people_file(self) -> Path:
        """Of an identity audit: one row a person."""
        return self.folder / "people.parquet"

    @property
    def predictions_file(self) -> Path:
        """Of an identity audit: the name that each photo was given by each template."""
        return self.folder / "predictions.parquet"

    @property
    def decoys_file(self) -> Path:
        """Of an identity audit: each person's statistic for every decoy."""
        return self.folder / "decoys.parquet"

    @property
    def curve_file(self) -> Path:
        """Of an identity audit: people found against the number of photos."""
        return self.folder / "curve.parquet"

    @property
    def probes_file(self) -> Path:
        """Of a probe: accuracy of seen against unseen by condition, layer and question."""
        return self.folder / "probes.parquet"

    @property
    def dynamics_file(self) -> Path:
        """Of a probe: how far contents turn the gradient of a batch, by its size."""
        return self.folder / "dynamics.parquet"

    @property
    def output_view_file(self) -> Path:
        """Of a probe: what the answers show."""
        return self.folder / "output_view.parquet"

    @property
    def utility_file(self) -> Path:
        """Of a probe: how well the task is done before and after."""
        return self.folder / "utility.parquet"

    @property
    def projections_file(self) -> Path:
        """Of a probe: states of one layer in the plane."""
        return self.folder / "projections.parquet"

    @property
    def watermarked(self) -> Path:
        """Of a probe: the records with watermarks, and what was trained on them."""
        return self.folder / "watermarked"

    @property
    def report_file(self) -> Path:
        """The finding as a page."""
        return self.folder / "report.html"

    def manifest(self) -> dict[str, Any]:
        """The manifest as written."""
        return read_json(self.manifest_file)

    @property
    def kind(self) -> str:
        """Membership, identity or probing."""
        return str(self.manifest().get("kind", "membership"))


_FILES = {
    "manifest.json",
    "evidence",
    "scores.parquet",
    "failures.parquet",
    "claims.parquet",
    "people.parquet",
    "predictions.parquet",
    "decoys.parquet",
    "curve.parquet",
    "probes.parquet",
    "dynamics.parquet",
    "output_view.parquet",
    "utility.parquet",
    "projections.parquet",
    "watermarked",
    "verdict.json",
    "report.html",
}


def fingerprint(parts: Mapping[str, Any]) -> str:
    """SHA-256 of what decides the evidence, written as canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class EvidenceStore:
    """Parts of evidence under one fingerprint; evidence made otherwise is refused, never mixed."""

    folder: Path

    @staticmethod
    def claim(folder: Path, decides: Mapping[str, Any]) -> EvidenceStore:
        """Open the store for evidence that `decides` describes.

        Raises:
            UserError: what is stored was made from something else; the difference is named.
        """
        file = folder / "fingerprint.json"
        if file.is_file():
            stored = read_json(file).get("decides", {})
            changed = [key for key in {**stored, **decides} if stored.get(key) != decides.get(key)]
            if json.loads(json.dumps(decides)) != stored:
                raise UserError(
                    f"its evidence was made with another {', '.join(sorted(changed))}",
                    str(folder.parent),
                    "Give the same again to go on, or --out another folder.",
                )
        else:
            write_json(file, {"sha256": fingerprint(decides), "decides": decides})
        return EvidenceStore(folder)

    def put(self, stage: str, index: int, table: pa.Table) -> None:
        """Write a part at once."""
        write_table(self.file(stage, index), table)

    def has(self, stage: str, index: int) -> bool:
        """Whether the part is there and whole; a damaged one is removed."""
        return whole(self.file(stage, index))

    def file(self, stage: str, index: int) -> Path:
        """Where a part lies, or would."""
        return self.folder / f"{stage}-{index:05d}.parquet"


def cache_folder() -> Path:
    """Where things that can be made again are kept for later: the user's cache."""
    return Path(os.environ.get("LIGHTLEAK_CACHE") or Path.home() / ".cache" / "lightleak")


def make_folder(folder: Path) -> None:
    """Make a folder of a run.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"it cannot be made ({error.strerror})", str(folder)) from error


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """Write beside `file`, flush to disk, then take its place at once."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        raise UserError(
            f"it cannot be written ({error.strerror or error})",
            str(file),
            "Nothing before it is lost; make room and run the same command again.",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_table(file: Path, table: pa.Table) -> None:
    """Write a Parquet file at once, with a checksum a page."""
    with replacing(file) as stream:
        pq.write_table(table, stream, compression="lz4", write_page_checksum=True)


def read_table(
    file: Path, columns: Sequence[str] | None = None, *, without: Collection[str] = ()
) -> pa.Table:
    """Read a Parquet file: all of it, the named columns, or all `without` some.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        if without:
            columns = [name for name in pq.read_schema(file).names if name not in without]
        return pq.read_table(file, columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"it is missing or damaged ({str(error).splitlines()[0][:100]})",
            str(file),
            "Give the same command again that made the run: it is made anew.",
        ) from error


def sha256(file: Path) -> str:
    """SHA-256 of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"it cannot be read ({error.strerror})", str(file)) from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Nobody else works in this folder meanwhile; a process that dies lets go of it.

    Raises:
        UserError: somebody does.
    """
    try:
        import fcntl
    except ImportError:  # Not on this system.
        yield
        return
    file = folder / ".lock"
    try:
        lock = file.open("w")
    except OSError as error:
        raise UserError(f"it cannot be written ({error.strerror})", str(file)) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                "another process is at work in it", str(folder), "Wait for it, or end it."
            ) from error
        except OSError:
            pass  # Some network file systems know no locks.
        yield


def whole(file: Path) -> bool:
    """Whether a Parquet file is there and every page of it is as it was written; a damaged one is
    removed, so that it is made again."""
    try:
        content = pq.ParquetFile(file, page_checksum_verification=True)
        for group in range(content.num_row_groups):
            content.read_row_group(group)
    except FileNotFoundError:
        return False
    except (pa.ArrowException, OSError):
        file.unlink()
        return False
    return True


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file at once; a number that is not finite is refused."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(file) as stream:
        stream.write(text.encode() + b"\n")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"it cannot be read ({error})", str(file)) from error
    if not isinstance(content, dict):
        raise UserError("it holds no JSON object", str(file), "Is it damaged?")
    return content
