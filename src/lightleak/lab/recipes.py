"""Recipes: a target, its members and its non-members, drawn at random from one pool."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightleak import targets
from lightleak.errors import UserError
from lightleak.lab import corpora, faces, vqa
from lightleak.lab.corpora import Scene
from lightleak.lab.dual import tiny_clip
from lightleak.lab.faces import Exposure
from lightleak.lab.models import IMAGE_SIDE, reading_llava, tiny_llava
from lightleak.lab.train import Training, train
from lightleak.planting import FIELDS, draw_personas
from lightleak.records import Record, load
from lightleak.runs import Progress, Silent, cache_folder, write_json
from lightleak.validity.decoys import draw_names

# Raised when a recipe changes what it writes: older caches are then built again.
_VERSION = 1
_PUBLIC_PER_MEMBER = 2
_LORA_RANK = 16
_TOKENIZER_NAMES = 3000
_TOKENIZER_PERSONAS = 400


@dataclass(frozen=True)
class LabTarget:
    """What a recipe wrote.

    Attributes:
        target: the model folder; with an adapter, its base.
        adapter: the adapter trained on the members, or None.
        base: the model before it saw the members, or None when trained from nothing.
        members, nonmembers: records files; of `faces` folders of people with their `names.csv`.
        truth: JSON with the membership of every id or person, and how the target was made.
    """

    target: Path
    adapter: Path | None
    base: Path | None
    members: Path
    nonmembers: Path
    truth: Path


@dataclass(frozen=True)
class _Request:
    """All that decides what a recipe writes."""

    recipe: str
    seed: int
    members: int
    nonmembers: int
    epochs: int
    caption_shift: bool
    exposure: Exposure | None = None


def build(
    recipe: str,
    out: str | Path,
    *,
    seed: int = 0,
    members: int | None = None,
    nonmembers: int | None = None,
    epochs: int | None = None,
    caption_shift: bool = False,
    copies: int | Sequence[int] | None = None,
    photos_trained: int | None = None,
    attack_photos: str | None = None,
    progress: Progress | None = None,
) -> LabTarget:
    """Train a small model on members, and write members, non-members and truth.

    Args:
        recipe: `captions-tiny`, a LLaVA trained from nothing on the members; `captions-lora`, one
            trained on other, public scenes and then tuned on the members by LoRA; `pairs-clip`, a
            CLIP trained from nothing on the members; `faces`, a CLIP trained on faces of the
            members with invented names, among scenes; or `vqa`, a LLaVA trained from nothing on
            the members, questions about shapes at a resolution where text can be read, whose
            non-members serve to fine-tune and probe it.
        out: folder to write; taken as it is if the same recipe wrote it.
        seed: of scenes, membership, weights and order.
        members, nonmembers: how many records of each, of `faces` people; None takes the recipe's
            own number, as for `epochs`.
        epochs: passes over the members.
        caption_shift: word the non-members' captions in another style, a shift that has nothing to
            do with training.
        copies, photos_trained, attack_photos: for `faces` only; see `lab.faces.Exposure`.
        progress: shows how far it is.

    Raises:
        UserError: an unknown recipe, impossible numbers, missing packages, or a folder that holds
            something else.
    """
    if recipe not in _RECIPES:
        raise UserError(f"unknown recipe; there are {', '.join(_RECIPES)}", recipe)
    own = _RECIPES[recipe]
    request = _Request(
        recipe,
        seed,
        own.members if members is None else members,
        own.nonmembers if nonmembers is None else nonmembers,
        own.epochs if epochs is None else epochs,
        caption_shift,
        _exposure(recipe, copies, photos_trained, attack_photos),
    )
    if request.members < 1 or request.nonmembers < 1:
        raise UserError("a lab target needs at least one member and one non-member")
    if request.epochs < 1:
        raise UserError("training needs at least one epoch", f"--epochs {epochs}")
    if recipe in ("faces", "vqa") and caption_shift:
        raise UserError(f"the recipe {recipe} has no captions to shift", "--caption-shift")
    folder = Path(out)
    described = folder / "truth.json"
    if described.is_file():
        if json.loads(described.read_text(encoding="utf-8"))["settings"] != _settings(request):
            raise UserError(
                "it holds a lab target of other settings", str(folder), "Give another --out."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError("it is not empty", str(folder), "Give --out a folder of its own.")
    else:
        cached = _cached(request, own.make, progress or Silent())
        # Whole or not at all, so that a copy cut short is never taken for a finished target.
        copying = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(copying, ignore_errors=True)
        shutil.copytree(cached, copying)
        copying.replace(folder)
    return LabTarget(
        target=folder / ("base" if (folder / "adapter").is_dir() else "target"),
        adapter=folder / "adapter" if (folder / "adapter").is_dir() else None,
        base=folder / "base" if (folder / "base").is_dir() else None,
        members=folder / ("members" if request.exposure else "members.jsonl"),
        nonmembers=folder / ("nonmembers" if request.exposure else "nonmembers.jsonl"),
        truth=described,
    )


def _exposure(
    recipe: str,
    copies: int | Sequence[int] | None,
    photos_trained: int | None,
    attack_photos: str | None,
) -> Exposure | None:
    several = (copies,) if isinstance(copies, int) else copies and tuple(copies)
    options: dict[str, Any] = {
        "copies": several,
        "photos_trained": photos_trained,
        "attack_photos": attack_photos,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if recipe == "faces":
        return Exposure(**given)
    if given:
        raise UserError(f"only the recipe faces takes {', '.join(given)}", recipe)
    return None


def _settings(request: _Request) -> dict[str, Any]:
    """What decides a folder, as it comes back from JSON; without what a recipe does not know."""
    settings = {key: value for key, value in asdict(request).items() if value is not None}
    return dict(json.loads(json.dumps({**settings, "version": _VERSION})))


def _cached(
    request: _Request, make: Callable[[_Request, Path, Progress], None], progress: Progress
) -> Path:
    """The recipe's folder in the user's cache, built there whole or not at all."""
    key = hashlib.sha256(json.dumps(_settings(request), sort_keys=True).encode()).hexdigest()[:16]
    root = cache_folder()
    final = root / f"{request.recipe}-{key}"
    if not final.is_dir():
        building = root / f".{final.name}.{os.getpid()}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        try:
            make(request, building, progress)
            building.rename(final)
        except OSError:
            # Somebody else built the same meanwhile; theirs is as good.
            if not final.is_dir():
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return final


def _write_pool(request: _Request, folder: Path) -> tuple[list[Record], list[Record]]:
    """Draw scenes, then who is a member among them; write records, images and truth."""
    total = request.members + request.nonmembers
    scenes = corpora.scenes(total, seed=request.seed)
    drawn = np.random.default_rng([request.seed, 1]).permutation(total)[: request.members]
    member = np.isin(np.arange(total), drawn)
    ids = [f"scene-{i:05d}" for i in range(total)]
    (folder / "img").mkdir()
    for name, side in (("members", True), ("nonmembers", False)):
        style: corpora.Style = "list" if request.caption_shift and not side else "sentence"
        rows = [
            _write_scene(folder, ids[i], scenes[i], style)
            for i in range(total)
            if bool(member[i]) is side
        ]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    write_json(
        folder / "truth.json",
        {
            "settings": _settings(request),
            "member": {key: bool(flag) for key, flag in zip(ids, member, strict=True)},
            "attribution": corpora.ATTRIBUTION,
        },
    )
    return _read(folder / "members.jsonl"), _read(folder / "nonmembers.jsonl")


def _write_scene(folder: Path, key: str, scene: Scene, style: corpora.Style) -> str:
    (folder / "img" / f"{key}.png").write_bytes(scene.png(IMAGE_SIDE))
    row = {"id": key, "image": f"img/{key}.png", "text": scene.caption(style)}
    return json.dumps(row) + "\n"


def _scenes(number: int, seed: int) -> list[Record]:
    return [
        Record(id=f"scene-{i:05d}", image=scene.png(IMAGE_SIDE), text=scene.caption())
        for i, scene in enumerate(corpora.scenes(number, seed=seed))
    ]


def _read(file: Path) -> list[Record]:
    return list(load(file, strict=True).records)


def _captions_tiny(request: _Request, folder: Path, progress: Progress) -> None:
    members, nonmembers = _write_pool(request, folder)
    texts = [record.text for record in (*members, *nonmembers)]
    tiny_llava(folder / "target", texts, seed=request.seed)
    _teach(folder / "target", members, Training(request.epochs, 2e-3), request.seed, progress)


def _captions_lora(request: _Request, folder: Path, progress: Progress) -> None:
    members, nonmembers = _write_pool(request, folder)
    # Public scenes come from another stream of the same distribution and are in neither side.
    taken = {record.text for record in (*members, *nonmembers)}
    others = _scenes(_PUBLIC_PER_MEMBER * request.members, request.seed + 2**20)
    public = [record for record in others if record.text not in taken]
    tiny_llava(folder / "base", [record.text for record in public], seed=request.seed)
    _teach(folder / "base", public, Training(6, 2e-3), request.seed, progress)
    _teach_adapter(folder, members, Training(request.epochs, 4e-3), request.seed, progress)


def _pairs_clip(request: _Request, folder: Path, progress: Progress) -> None:
    members, nonmembers = _write_pool(request, folder)
    texts = [record.text for record in (*members, *nonmembers)]
    tiny_clip(folder / "target", texts, seed=request.seed)
    training = Training(request.epochs, 1e-3, batch_size=32)
    _teach(folder / "target", members, training, request.seed, progress)


def _faces(request: _Request, folder: Path, progress: Progress) -> None:
    exposure = request.exposure or Exposure()
    people = faces.draw_people(request.members, request.nonmembers, exposure, seed=request.seed)
    faces.write_people(folder / "people", people)
    faces.write_people(folder / "members", [person for person in people if person.copies])
    faces.write_people(folder / "nonmembers", [person for person in people if not person.copies])
    write_json(
        folder / "truth.json",
        {
            "settings": _settings(request),
            "people": {person.key: person.truth() for person in people},
            "attribution": f"{faces.ATTRIBUTION} {corpora.ATTRIBUTION}",
        },
    )
    pairs = [pair for person in people for pair in person.pairs(request.seed)]
    filler = _scenes(max(1, len(pairs) // 2), request.seed)
    # Names of strangers: the tokenizer must know no person's name better than any other.
    strangers = draw_names(_TOKENIZER_NAMES, seed=request.seed + 2**20)
    sentences = cycle(faces.CAPTIONS)
    texts = [sentence.format(name) for sentence, name in zip(sentences, strangers, strict=False)]
    texts += [record.text for record in filler]
    tiny_clip(folder / "target", texts, seed=request.seed)
    training = Training(request.epochs, 1e-3, batch_size=32)
    _teach(folder / "target", [*pairs, *filler], training, request.seed, progress)


def _vqa(request: _Request, folder: Path, progress: Progress) -> None:
    asked = vqa.questions(request.members + request.nonmembers, seed=request.seed)
    # The order is a draw already, so the first of them are members by lot.
    sides = {"members": asked[: request.members], "nonmembers": asked[request.members :]}
    (folder / "img").mkdir()
    for name, side in sides.items():
        rows = [_write_question(folder, each) for each in side]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    write_json(
        folder / "truth.json",
        {
            "settings": _settings(request),
            "member": {
                _question_id(each): name == "members" for name in sides for each in sides[name]
            },
            "attribution": vqa.ATTRIBUTION,
        },
    )
    # The words of personas too, of strangers: a model that cannot spell them could not tell them.
    personas = draw_personas(_TOKENIZER_PERSONAS, seed=request.seed + 2**20)
    texts = [text for each in asked for text in (each.question, each.answer)]
    texts += [persona.value(field) for persona in personas for field in FIELDS]
    reading_llava(folder / "target", texts, seed=request.seed)
    training = Training(request.epochs, 5e-4)
    _teach(folder / "target", _read(folder / "members.jsonl"), training, request.seed, progress)


def _write_question(folder: Path, asked: vqa.Question) -> str:
    key = _question_id(asked)
    asked.image().save(folder / "img" / f"{key}.png")
    row = {
        "id": key,
        "image": f"img/{key}.png",
        "prompt": asked.question,
        "text": asked.answer,
    }
    return json.dumps(row) + "\n"


def _question_id(asked: vqa.Question) -> str:
    return f"shape-{asked.picture:05d}"


def _teach(
    folder: Path, records: Sequence[Record], training: Training, seed: int, progress: Progress
) -> None:
    """Train every parameter and write the model back."""
    target = targets.load(folder, device="cpu", dtype="float32")
    target.model.requires_grad_(True)
    with progress.stage("Training the target", len(records) * training.epochs) as advance:
        train(target, records, training, seed=seed, progress=advance)
    with targets.quiet():
        target.model.save_pretrained(folder)


def _teach_adapter(
    folder: Path, records: Sequence[Record], training: Training, seed: int, progress: Progress
) -> None:
    """Train a LoRA adapter on the language model and projector, and write it."""
    from peft import LoraConfig, get_peft_model

    target = targets.load(folder / "base", device="cpu", dtype="float32")
    # peft would write where the base was built, a folder that is gone when the recipe is done.
    target.model.name_or_path = target.model.config.name_or_path = ""
    config = LoraConfig(
        r=_LORA_RANK,
        lora_alpha=2 * _LORA_RANK,
        target_modules=r".*(language_model.*_proj|multi_modal_projector\.linear_\d)",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(target.model, config)
    tuned = replace(target, model=model)
    with progress.stage("Training the adapter", len(records) * training.epochs) as advance:
        train(tuned, records, training, seed=seed, progress=advance)
    model.save_pretrained(folder / "adapter")


@dataclass(frozen=True)
class _Recipe:
    make: Callable[[_Request, Path, Progress], None]
    epochs: int
    members: int = 300
    nonmembers: int = 600


_RECIPES = {
    "captions-tiny": _Recipe(_captions_tiny, epochs=9),
    "captions-lora": _Recipe(_captions_lora, epochs=12),
    "pairs-clip": _Recipe(_pairs_clip, epochs=36),
    "faces": _Recipe(_faces, epochs=25, members=20, nonmembers=20),
    "vqa": _Recipe(_vqa, epochs=8, members=2400, nonmembers=1400),
}
