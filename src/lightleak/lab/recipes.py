"""Recipes: a target, its members and its non-members, drawn at random from one pool."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from lightleak.errors import UserError
from lightleak.lab import captions, corpora, faces, vqa
from lightleak.lab.dual import tiny_clip
from lightleak.lab.faces import Exposure
from lightleak.lab.models import reading_llava
from lightleak.lab.request import Request
from lightleak.lab.train import Training, teach
from lightleak.planting import FIELDS, draw_personas
from lightleak.records import load
from lightleak.runs import Progress, Silent, cache_folder, write_json
from lightleak.validity.decoys import draw_names

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
            With a prevalence below 1, `members` is `suspects.jsonl`, where unused records are
            mixed with members.
        known: with a prevalence below 1, further records that were trained on; else None.
        truth: JSON with the membership of every id or person, and how the target was made.
    """

    target: Path
    adapter: Path | None
    base: Path | None
    members: Path
    nonmembers: Path
    known: Path | None
    truth: Path


def build(
    recipe: str,
    out: str | Path,
    *,
    seed: int = 0,
    members: int | None = None,
    nonmembers: int | None = None,
    epochs: int | None = None,
    caption_shift: bool = False,
    prevalence: float | None = None,
    copies: int | Sequence[int] | None = None,
    photos_trained: int | None = None,
    attack_photos: str | None = None,
    progress: Progress | None = None,
) -> LabTarget:
    """Train a model on members, and write members, non-members and truth.

    Args:
        recipe: `captions-tiny`, a LLaVA trained from nothing on the members; `captions-lora`, one
            trained on other, public scenes and then tuned on the members by LoRA, `captions-full`
            in all its weights; `real-parts`, likewise by LoRA, of a ViT-S and SmolLM2-135M;
            `pairs-clip`, a CLIP trained from nothing on the members; `faces`, a CLIP trained on
            faces of the members with invented names, among scenes; or `vqa`, a LLaVA trained from
            nothing on the members, questions about shapes at a resolution where text can be read,
            whose non-members serve to fine-tune and probe it.
        out: folder to write; taken as it is if the same recipe wrote it.
        seed: of scenes, membership, weights and order.
        members, nonmembers: how many records of each, of `faces` people; None takes the recipe's
            own number, as for `epochs`.
        epochs: passes over the members.
        caption_shift: word the non-members' captions in another style, a shift that has nothing to
            do with training.
        prevalence: the share of the suspects that is trained on; None for all of them. Other
            records are trained on in place of the rest, so that the target learns as much
            whatever the share.
        copies: how often each member stands in the training data; of `faces` several numbers are
            dealt out.
        photos_trained, attack_photos: for `faces` only; see `lab.faces.Exposure`.
        progress: shows how far it is.

    Raises:
        UserError: an unknown recipe, impossible numbers, an option that the recipe does not take,
            missing packages, or a folder that holds something else.
    """
    own = _recipe(recipe)
    several = (copies,) if isinstance(copies, int) else None if copies is None else tuple(copies)
    options: dict[str, Any] = {
        "caption_shift": caption_shift or None,
        "prevalence": prevalence,
        "copies": several,
        "photos_trained": photos_trained,
        "attack_photos": attack_photos,
    }
    given = {name: value for name, value in options.items() if value is not None}
    for name in given.keys() - own.options:
        takers = ", ".join(other for other, each in _RECIPES.items() if name in each.options)
        option = f"--{name}".replace("_", "-")
        raise UserError(f"the recipe {recipe} does not take it; it is for {takers}", option)
    of_people = "photos_trained" in own.options
    if not of_people and several is not None and len(several) != 1:
        raise UserError("one number is wanted", f"--copies {','.join(map(str, several))}")
    request = Request(
        recipe,
        seed,
        own.members if members is None else members,
        own.nonmembers if nonmembers is None else nonmembers,
        own.epochs if epochs is None else epochs,
        caption_shift,
        exposure=Exposure(**given) if of_people else None,
        prevalence=None if prevalence == 1 else prevalence,
        copies=None if of_people or several in (None, (1,)) else several[0],
    )
    folder = Path(out)
    described = folder / "truth.json"
    if described.is_file():
        if json.loads(described.read_text(encoding="utf-8"))["settings"] != request.settings():
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
    kind = "" if request.exposure else ".jsonl"
    adapter, base = folder / "adapter", folder / "base"
    return LabTarget(
        target=base if adapter.is_dir() else folder / "target",
        adapter=adapter if adapter.is_dir() else None,
        base=base if base.is_dir() else None,
        members=folder / f"{'suspects' if request.unused else 'members'}{kind}",
        nonmembers=folder / f"nonmembers{kind}",
        known=folder / "known.jsonl" if request.unused else None,
        truth=described,
    )


def kind_of(recipe: str) -> str:
    """Of the target that a recipe makes, generative or dual-encoder.

    Raises:
        UserError: an unknown recipe, or one whose members are no records.
    """
    kind = _recipe(recipe).kind
    if not kind:
        raise UserError("its members are people; see lightleak identify", recipe)
    return kind


def _recipe(name: str) -> _Recipe:
    if name not in _RECIPES:
        raise UserError(f"unknown recipe; there are {', '.join(_RECIPES)}", name)
    return _RECIPES[name]


def _cached(
    request: Request, make: Callable[[Request, Path, Progress], None], progress: Progress
) -> Path:
    """The recipe's folder in the user's cache, built there whole or not at all."""
    key = hashlib.sha256(json.dumps(request.settings(), sort_keys=True).encode()).hexdigest()[:16]
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


def _faces(request: Request, folder: Path, progress: Progress) -> None:
    exposure = request.exposure or Exposure()
    people = faces.draw_people(request.members, request.nonmembers, exposure, seed=request.seed)
    faces.write_people(folder / "people", people)
    faces.write_people(folder / "members", [person for person in people if person.copies])
    faces.write_people(folder / "nonmembers", [person for person in people if not person.copies])
    write_json(
        folder / "truth.json",
        {
            "settings": request.settings(),
            "people": {person.key: person.truth() for person in people},
            "attribution": f"{faces.ATTRIBUTION} {corpora.ATTRIBUTION}",
        },
    )
    pairs = [pair for person in people for pair in person.pairs(request.seed)]
    filler = captions.scene_records(max(1, len(pairs) // 2), seed=request.seed)
    # Names of strangers: the tokenizer must know no person's name better than any other.
    strangers = draw_names(_TOKENIZER_NAMES, seed=request.seed + 2**20)
    sentences = cycle(faces.CAPTIONS)
    texts = [sentence.format(name) for sentence, name in zip(sentences, strangers, strict=False)]
    texts += [record.text for record in filler]
    tiny_clip(folder / "target", texts, seed=request.seed)
    training = Training(request.epochs, 1e-3, batch_size=32)
    teach(folder / "target", [*pairs, *filler], training, seed=request.seed, progress=progress)


def _vqa(request: Request, folder: Path, progress: Progress) -> None:
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
            "settings": request.settings(),
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
    members = load(folder / "members.jsonl", strict=True).records
    teach(folder / "target", members, training, seed=request.seed, progress=progress)


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


_OF_CAPTIONS = frozenset(("caption_shift", "prevalence", "copies"))


@dataclass(frozen=True)
class _Recipe:
    make: Callable[[Request, Path, Progress], None]
    epochs: int
    members: int = 300
    nonmembers: int = 600
    kind: str = "generative"
    options: frozenset[str] = _OF_CAPTIONS


_RECIPES = {
    "captions-tiny": _Recipe(captions.captions_tiny, epochs=9),
    "captions-lora": _Recipe(captions.captions_lora, epochs=12),
    "captions-full": _Recipe(captions.captions_full, epochs=6),
    "real-parts": _Recipe(captions.real, epochs=6, members=100, nonmembers=200),
    "pairs-clip": _Recipe(captions.pairs_clip, epochs=36, kind="dual-encoder"),
    "faces": _Recipe(
        _faces,
        epochs=25,
        members=20,
        nonmembers=20,
        kind="",
        options=frozenset(("copies", "photos_trained", "attack_photos")),
    ),
    "vqa": _Recipe(_vqa, epochs=8, members=2400, nonmembers=1400, options=frozenset()),
}
