"""Reference gradients: for fold k the mean over the suspects of the other folds.

The sum of a fold is made in a few blocks of records. A block writes its sum and how far it is after
every shard, so that a kill loses one shard; blocks are added in one order, whoever made them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightleak.audits.passes import Pass, Plan, References, open_pass, save_tensors
from lightleak.audits.sides import Sides
from lightleak.errors import UserError
from lightleak.evidence import collect
from lightleak.records import Record
from lightleak.runs import Progress, read_json, write_json, write_table
from lightleak.runs.executors import Executor
from lightleak.runs.folder import sha256, whole
from lightleak.runs.progress import Advance

_MOST_BLOCKS = 8
_BLOCK_BYTES = 16e9


@dataclass(frozen=True)
class Block:
    """Some records of a fold, whose gradients are added up."""

    of: Pass
    plan: Plan
    fold: int
    file: Path
    records: tuple[Record, ...]


def build_references(
    of: Pass, plan: Plan, sides: Sides, progress: Progress, executor: Executor
) -> list[set[str]]:
    """Make the reference gradients, if they are not there.

    Returns:
        The ids whose gradients are in each.

    Raises:
        UserError: none of a fold's records yields a gradient.
    """
    described = of.folder / "reference.json"
    norms = of.folder / "reference-norms.parquet"
    about = read_json(described) if described.is_file() else {}
    there = about and whole(norms) and of.reference_file.is_file()
    if not there or about.get("sha256") != sha256(of.reference_file):
        # Made anew, it is the same: the parts that were compared stay valid.
        folds = (
            [sides.side == "member"]
            if of.settings.protocol == "split"
            else [(sides.side == "suspect") & (sides.folds == k) for k in range(of.n_references)]
        )
        blocks = [
            _blocks(of, plan, k, [sides.records[int(i)] for i in np.flatnonzero(fold)])
            for k, fold in enumerate(folds)
        ]
        total = int(sum(fold.sum() for fold in folds))
        with progress.stage("Reference gradient", total) as advance:
            executor.map(sum_block, [block for each in blocks for block in each], advance)
        members = _combine(of, plan, blocks)
        about = {"members": members, "sha256": sha256(of.reference_file)}
        write_json(described, about)
    for file in of.folder.glob("reference-block-*.safetensors"):
        file.unlink()
    return [set(each) for each in about["members"]]


def sum_block(block: Block, advance: Advance) -> None:
    """Add a block's gradients up, on from where its file says that it is."""
    sums, ids, done = _read(block.file)
    opened = open_pass(block.of, block.plan, compared=False)
    assert opened.engine is not None
    sums = {name: each.to(opened.target.device) for name, each in sums.items()}
    for start in range(0, len(block.records), block.plan.shard):
        shard = block.records[start : start + block.plan.shard]
        if start < done:
            advance(len(shard))
            continue
        sums, added = collect.sum_gradients(
            opened.target,
            opened.engine,
            shard,
            size=block.plan.size,
            progress=advance,
            sums=sums,
        )
        ids += added
        about = {"done": str(start + len(shard)), "ids": json.dumps(ids)}
        save_tensors(block.file, sums, about)


def _blocks(of: Pass, plan: Plan, k: int, records: Sequence[Record]) -> list[Block]:
    """A fold's records in runs of whole shards; fixed by the plan alone."""
    room = _BLOCK_BYTES / of.n_references / (4 * sum(map(np.prod, plan.shapes.values())))
    shards = -(-len(records) // plan.shard)
    count = max(1, min(shards, _MOST_BLOCKS, int(room)))
    bounds = [round(b * shards / count) * plan.shard for b in range(count + 1)]
    return [
        Block(
            of,
            plan,
            k,
            of.folder / f"reference-block-{k:02d}-{b:02d}.safetensors",
            tuple(records[bounds[b] : bounds[b + 1]]),
        )
        for b in range(count)
    ]


def _read(file: Path) -> tuple[dict[str, Tensor], list[str], int]:
    """A block's sum, the ids in it, and how many of its records are done; from zero if torn."""
    try:
        with safe_open(file, "pt") as content:
            about = content.metadata()
        return safetensors.torch.load_file(file), json.loads(about["ids"]), int(about["done"])
    except (OSError, SafetensorError):
        return {}, [], 0


def _combine(of: Pass, plan: Plan, blocks: Sequence[Sequence[Block]]) -> list[list[str]]:
    """Add the blocks up, and write the reference of each fold."""
    sums: list[dict[str, Tensor]] = []
    added: list[list[str]] = []
    for fold in blocks:
        # A matrix that no record of a fold sends a gradient to stays zero there.
        total = {name: torch.zeros(shape) for name, shape in plan.shapes.items()}
        ids: list[str] = []
        for block in fold:
            part, among, _ = _read(block.file)
            for name, each in part.items():
                total[name] = total[name] + each
            ids += among
        if not ids:
            raise UserError("no gradient could be computed for any record of a reference")
        sums.append(total)
        added.append(ids)
    # Crossed fits: reference k is made of every fold but the k-th.
    folds = range(len(sums))
    made_of = [[0]] if len(sums) == 1 else [[j for j in folds if j != k] for k in folds]
    members = [sorted(key for j in made for key in added[j]) for made in made_of]
    gradients = {
        name: torch.stack(
            [
                torch.stack([sums[j][name] for j in made]).sum(0) / len(members[k])
                for k, made in enumerate(made_of)
            ]
        )
        for name in plan.shapes
    }
    references = References(gradients, tuple(map(len, members)))
    references.write(of.reference_file)
    norms = pa.table({"norms2": list(references.norms2(list(plan.shapes)))})
    write_table(of.folder / "reference-norms.parquet", norms)
    return members
