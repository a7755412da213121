"""References: models that the auditor fine-tuned, with known membership; the folder they lie in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lightleak.errors import UserError
from lightleak.runs import Progress, Silent, read_json
from lightleak.runs.folder import sha256

FILE = "references.json"
_TRAIN = "Give the folder that lightleak references train wrote."


@dataclass(frozen=True)
class Reference:
    """One reference at one epoch.

    Attributes:
        name: "reference-00".
        folder: an adapter, or a whole model.
        adapter: whether it is an adapter.
        base: what the adapter sits on; None of a whole model.
        base_hashes: of what it began with.
        members: what it was trained on, by `records.content_key`; it saw nothing else.
        epoch: of its training.
        recipe: of its training, by the names of `training.FineTuning`.
    """

    name: str
    folder: Path
    adapter: bool
    base: str | None
    base_hashes: Mapping[str, str]
    members: frozenset[str]
    epoch: int
    recipe: Mapping[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Kept(_Strict):
    """A kept epoch: where it lies in the folder, its mean training loss, its files by hash."""

    folder: Annotated[str, Field(pattern=r"^reference-\d+/epoch-\d+$")]
    loss: float
    sha256: dict[Annotated[str, Field(pattern=r"^[^/\\]+$")], str]


class Trained(_Strict):
    """One reference; its epochs are told of once all of them are there."""

    name: Annotated[str, Field(pattern=r"^reference-\d+$")]
    seed: int
    finished: bool = False
    epochs: dict[int, Kept] = {}


class Base(_Strict):
    """What every reference begins with."""

    name: str
    kind: str
    dtype: str
    hashes: dict[str, str]


class Left(_Strict):
    """A record that no reference was trained on, and why."""

    id: str
    stage: str
    error: str


class Contents(_Strict):
    """`references.json`.

    Attributes:
        recipe: of each training, with the epochs that are kept.
        records: SHA-256 over what was given: contents, groups and sides.
        membership: content key → one digit a reference, 1 where it was trained on.
        left_out: records that cannot be used.
    """

    version: Literal[1] = 1
    base: Base
    recipe: dict[str, Any]
    keep: Annotated[tuple[int, ...], Field(min_length=1)]
    seed: int
    records: str
    references: tuple[Trained, ...]
    membership: dict[str, Annotated[str, Field(pattern="^[01]+$")]]
    left_out: tuple[Left, ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> Contents:
        if any(len(each) != len(self.references) for each in self.membership.values()):
            raise ValueError("membership is not of so many references")
        names = [each.name for each in self.references]
        if len({*names}) < len(names) or any(
            not kept.folder.startswith(f"{each.name}/")
            for each in self.references
            for kept in each.epochs.values()
        ):
            raise ValueError("two references share a name or a folder")
        if "method" not in self.recipe:
            raise ValueError("the recipe has no method")
        if any(set(each.epochs) != set(self.keep) for each in self.references if each.finished):
            raise ValueError("a finished reference lacks an epoch")
        return self


def read_contents(folder: Path) -> Contents:
    """What a folder of references says of itself.

    Raises:
        UserError: it is missing or damaged.
    """
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"no references here: {FILE} is missing", str(folder), _TRAIN)
    try:
        return Contents.model_validate(read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part)[:40] for part in first["loc"])
        raise UserError(f"it is damaged ({place}: {first['msg']})", str(file), _TRAIN) from error


def read_references(
    folder: str | Path, epoch: int | None = None, *, progress: Progress | None = None
) -> list[Reference]:
    """The finished references in a folder, at one epoch.

    Args:
        folder: what `train_references` wrote.
        epoch: which of the kept ones; None takes the last.
        progress: told of references that are not finished.

    Raises:
        UserError: it is missing or damaged, the epoch was not kept, or no reference is finished.
    """
    folder = Path(folder)
    contents = read_contents(folder)
    epoch = contents.keep[-1] if epoch is None else epoch
    if epoch not in contents.keep:
        kept = ", ".join(map(str, contents.keep))
        raise UserError(f"epoch {epoch} was not kept; there are {kept}", str(folder))
    finished = [(k, each) for k, each in enumerate(contents.references) if each.finished]
    adapter = contents.recipe["method"] == "lora"
    found = []
    for k, each in finished:
        own = each.epochs[epoch]
        for name, digest in own.sha256.items():
            file = folder / own.folder / name
            if not file.is_file() or sha256(file) != digest:
                raise UserError(
                    "it is not what was trained: it was changed, is damaged or is missing",
                    str(file),
                    "Remove its folder and train the references again: only it is made anew.",
                )
        members = frozenset(key for key, bits in contents.membership.items() if bits[k] == "1")
        base = contents.base.name if adapter else None
        where, hashes = folder / own.folder, contents.base.hashes
        recipe = contents.recipe
        found.append(Reference(each.name, where, adapter, base, hashes, members, epoch, recipe))
    count = len(contents.references)
    if not found:
        raise UserError(
            f"none of its {count} references is finished",
            str(folder),
            "Give the same command again that began them: it goes on.",
        )
    if len(found) < count:
        unfinished = f"{count - len(found)} of {count} references are not finished and left out."
        (progress or Silent()).note(f"{folder}: {unfinished}")
    return found
