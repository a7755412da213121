"""Recipes of scenes with captions: who is a member is drawn at random from one pool."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightleak.lab import corpora, real_parts
from lightleak.lab.dual import tiny_clip
from lightleak.lab.models import IMAGE_SIDE, tiny_llava
from lightleak.lab.request import Request
from lightleak.lab.train import Training, teach, teach_adapter
from lightleak.records import Record, load
from lightleak.runs import Progress, write_json

_PUBLIC_PER_MEMBER = 2


@dataclass(frozen=True)
class Pool:
    """Records of one distribution: those that are trained on, and the texts of all."""

    trained: list[Record]
    texts: list[str]


def write_pool(request: Request, folder: Path, *, side: int = IMAGE_SIDE, credit: str = "") -> Pool:
    """Draw scenes, then who is a member among them; write records, images and truth.

    For suspects that are not to be used, as many other records are trained on, so that the target
    learns as much whatever the share: `known.jsonl`.
    """
    unused = request.unused
    used = request.members - unused
    total = request.members + unused + request.nonmembers
    scenes = corpora.scenes(total, seed=request.seed)
    drawn = np.random.default_rng([request.seed, 1]).permutation(total).tolist()
    trained, others = drawn[: request.members], drawn[request.members :]
    sides = {
        "suspects" if unused else "members": trained[:used] + others[:unused],
        "nonmembers": others[unused:],
        "known": trained[used:],
    }
    (folder / "img").mkdir()
    members = frozenset(trained)
    records: dict[int, Record] = {}
    for name, chosen in sides.items():
        shifted = request.caption_shift and name == "nonmembers"
        style: corpora.Style = "list" if shifted else "sentence"
        # In the order of the pool, which does not tell who is a member.
        rows = [
            _write_scene(folder, i, scenes[i].png(side), scenes[i].caption(style))
            for i in sorted(chosen)
        ]
        if rows:
            file = folder / f"{name}.jsonl"
            file.write_text("".join(rows), encoding="utf-8")
            records |= zip(sorted(chosen), load(file, strict=True).records, strict=True)
    write_json(
        folder / "truth.json",
        {
            "settings": request.settings(),
            "member": {_id(i): i in members for i in range(total)},
            "attribution": f"{corpora.ATTRIBUTION} {credit}".strip(),
        },
    )
    return Pool([records[i] for i in sorted(members)], [each.text for each in records.values()])


def _write_scene(folder: Path, number: int, png: bytes, caption: str) -> str:
    image = f"img/{_id(number)}.png"
    (folder / image).write_bytes(png)
    return json.dumps({"id": _id(number), "image": image, "text": caption}) + "\n"


def _id(number: int) -> str:
    return f"scene-{number:05d}"


def scene_records(number: int, *, seed: int, side: int = IMAGE_SIDE) -> list[Record]:
    """Scenes as records in memory."""
    return [
        Record(id=_id(i), image=scene.png(side), text=scene.caption())
        for i, scene in enumerate(corpora.scenes(number, seed=seed))
    ]


def _public(request: Request, pool: Pool, number: int, side: int = IMAGE_SIDE) -> list[Record]:
    """Scenes from another stream of the same distribution, none of which is in the pool."""
    taken = set(pool.texts)
    drawn = scene_records(number, seed=request.seed + 2**20, side=side)
    return [record for record in drawn if record.text not in taken]


def _on_members(
    request: Request, learning_rate: float, batch_size: int = 16, *, device: str = "cpu"
) -> Training:
    return Training(
        request.epochs,
        learning_rate,
        batch_size=batch_size,
        copies=request.copies or 1,
        device=device,
    )


# Recipes that tune a base on the members: AdamW's rate, and the records of a step.
TUNED = {"captions-lora": (4e-3, 16), "captions-full": (1e-3, 16), "real-parts": (5e-4, 8)}


def captions_tiny(request: Request, folder: Path, progress: Progress) -> None:
    """A LLaVA that knows nothing but its members."""
    pool = write_pool(request, folder)
    tiny_llava(folder / "target", pool.texts, seed=request.seed)
    training = _on_members(request, 2e-3)
    teach(folder / "target", pool.trained, training, seed=request.seed, progress=progress)


def captions_lora(request: Request, folder: Path, progress: Progress) -> None:
    """A LLaVA of public scenes, and an adapter that knows the members."""
    pool = _with_base(request, folder, progress)
    training = _on_members(request, *TUNED["captions-lora"])
    teach_adapter(
        folder / "base",
        folder / "adapter",
        pool.trained,
        training,
        seed=request.seed,
        progress=progress,
    )


def captions_full(request: Request, folder: Path, progress: Progress) -> None:
    """A LLaVA of public scenes, and the same after all its weights were tuned on the members."""
    pool = _with_base(request, folder, progress)
    shutil.copytree(folder / "base", folder / "target")
    training = _on_members(request, *TUNED["captions-full"])
    teach(folder / "target", pool.trained, training, seed=request.seed, progress=progress)


def _with_base(request: Request, folder: Path, progress: Progress) -> Pool:
    pool = write_pool(request, folder)
    public = _public(request, pool, _PUBLIC_PER_MEMBER * request.members)
    tiny_llava(folder / "base", [record.text for record in public], seed=request.seed)
    teach(folder / "base", public, Training(6, 2e-3), seed=request.seed, progress=progress)
    return pool


def pairs_clip(request: Request, folder: Path, progress: Progress) -> None:
    """A CLIP that knows nothing but its members."""
    pool = write_pool(request, folder)
    tiny_clip(folder / "target", pool.texts, seed=request.seed)
    training = _on_members(request, 1e-3, 32)
    teach(folder / "target", pool.trained, training, seed=request.seed, progress=progress)


def real(request: Request, folder: Path, progress: Progress) -> None:
    """A LLaVA of real parts whose projector knows public scenes, and an adapter for the members."""
    side = real_parts.IMAGE_SIDE
    real_parts.real_llava(folder / "base", seed=request.seed)
    pool = write_pool(request, folder, side=side, credit=real_parts.ATTRIBUTION)
    public = _public(request, pool, _PUBLIC_PER_MEMBER * request.members, side)
    teach(
        folder / "base",
        public,
        Training(2, 1e-3, batch_size=8, device="auto"),
        seed=request.seed,
        progress=progress,
        only="multi_modal_projector",
    )
    training = _on_members(request, *TUNED["real-parts"], device="auto")
    teach_adapter(
        folder / "base",
        folder / "adapter",
        pool.trained,
        training,
        seed=request.seed,
        progress=progress,
    )
