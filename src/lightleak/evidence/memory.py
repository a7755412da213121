"""How many records fit in memory at once, measured on the records themselves."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lightleak.errors import UserError
from lightleak.evidence.collect import WINDOW, BatchSize, encode
from lightleak.evidence.gradients import GradientEngine
from lightleak.evidence.gradients.rows import UnevenRows
from lightleak.records import Record
from lightleak.targets import EncodedRecord, Target

# Of the memory that is free: allocators hold up to 1.4 times what lives (measured on a CPU).
_USED = 0.6
_SAMPLE = 16
# References of the default two folds, kept beside each batch; a sum of gradients takes one.
_REFERENCES = 2
# Larger batches are no faster: a CPU core is busy with few records, an accelerator with a window.
_MOST = {"cpu": BatchSize()}
_MOST_ON_ACCELERATOR = BatchSize(WINDOW, 1 << 17)
_GROUPS = Path("/sys/fs/cgroup")
# Limit, use, and what of the use is a cache that can be dropped: control groups, version 2 and 1.
_GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def batch_size(
    target: Target,
    engine: GradientEngine | None,
    records: Sequence[Record],
    *,
    share: float = 1.0,
) -> BatchSize:
    """The largest batches that fit in memory, up to those that are no faster.

    One step is taken with the shortest and with the longest of a few records, alone and twice,
    and the most bytes that live at once are counted: activations kept for the backward pass,
    logits, and what the kernels work with. Tokens are a power of two, so that small differences
    of free memory give the same batches.

    Args:
        target: the model; a dual encoder whose gradients are read has its bank.
        engine: reads gradients; None when no signal needs them.
        records: what will be measured.
        share: of the memory, where several processes use the same.

    Raises:
        UserError: not even one record fits.
    """
    free = available(target.device) * share
    most = _MOST.get(target.device.type, _MOST_ON_ACCELERATOR)
    sample = encode(target, records[:: -(-len(records) // _SAMPLE) or 1]).records
    tokens = most.tokens
    for record in _shortest_and_longest(sample):
        try:
            alone = peak(target, engine, [record])
            if alone > free:
                raise _too_large(target, f"needs {alone / 1e9:.2g} GB", free)
            each = max(1, peak(target, engine, [record] * 2) - alone)
        except UnevenRows:
            return BatchSize(1, most.tokens)
        except torch.OutOfMemoryError as error:
            raise _too_large(target, "needs more", free) from error
        except (RuntimeError, FloatingPointError, ValueError, IndexError):
            continue  # The self-check says what is wrong with the records.
        fit = (free * _USED - alone + each) / each
        tokens = min(tokens, int(fit * record.n_tokens))
    return BatchSize(most.records, 1 << max(1, tokens).bit_length() - 1)


def available(device: torch.device) -> int:
    """Bytes of memory that are free where a device keeps its tensors."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + kept)
    here: int = psutil.virtual_memory().available
    return min((here, *left_in_groups()))


def left_in_groups(root: Path = _GROUPS) -> Iterator[int]:
    """Bytes that each limited control group of this process has left, where there are such."""
    own = Path("/proc/self/cgroup")
    lines = own.read_text().splitlines() if own.is_file() else []
    paths = {path for line in lines for path in _with_parents(line.split(":", 2)[2])}
    for folder in (base / path.lstrip("/") for base in (root, root / "memory") for path in paths):
        for limit, use, cache in _GROUP_FILES:
            try:
                most, used = (int((folder / name).read_text()) for name in (limit, use))
                stat = dict(
                    line.split() for line in (folder / "memory.stat").read_text().splitlines()
                )
                yield max(0, most - used + int(stat[cache]))
            except (OSError, ValueError, KeyError):
                continue  # No such group, or no limit ("max").


def _with_parents(path: str) -> list[str]:
    return [path, *map(str, Path(path).parents)]


def _shortest_and_longest(records: Sequence[EncodedRecord]) -> list[EncodedRecord]:
    ordered = sorted(records, key=lambda record: (record.n_tokens, record.pieces))
    return [*ordered[:1], *ordered[1:][-1:]]


def _too_large(target: Target, need: str, free: float) -> UserError:
    return UserError(
        f"one record {need}, and {free / 1e9:.2g} GB of memory are free",
        target.name,
        "Use a smaller --dtype, fewer matrices (gradaudit.matrices=last3), or fewer processes.",
    )


def peak(target: Target, engine: GradientEngine | None, records: Sequence[EncodedRecord]) -> int:
    """The most bytes that live at once in one step, beside the model and its inputs' originals."""
    kept = 0
    living = _Living(target)
    with living:
        batch = target.collate(records)
        if engine is None:
            with torch.no_grad():
                target.outputs(batch).vectors()
        else:
            # Of one number each: what they take is added, for nothing is there yet.
            number = torch.zeros((), dtype=target.wide, device=target.device)
            shapes = engine.selection.shapes
            references = {
                name: number.expand(_REFERENCES, *shape) for name, shape in shapes.items()
            }
            kept = sum(reference.numel() for reference in references.values()) * number.itemsize
            engine.read(batch, references)
    return living.peak + kept


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make on a device, until they are freed."""

    def __init__(self, target: Target) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._device = target.device.type
        self._known = WeakIdKeyDictionary()
        for tensor in (*target.model.parameters(), *target.model.buffers()):
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self._device:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        weakref.finalize(storage, self._freed, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _freed(self, size: int) -> None:
        self.now -= size
