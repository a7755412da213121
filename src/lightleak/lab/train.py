"""Teach a target its members: one loop, and the loss that the target's kind is trained by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from lightleak import targets
from lightleak.errors import UserError
from lightleak.evidence.collect import encode
from lightleak.records import Record
from lightleak.runs import Progress
from lightleak.targets import Batch, DualEncoderTarget, Target
from lightleak.training import pair_loss

_LORA_RANK = 16
_SMALL = 20_000_000  # parameters


@dataclass(frozen=True)
class Training:
    """How a target is trained; plain AdamW with a cosine schedule.

    Attributes:
        copies: how often each record stands in the data.
        device: what it is trained on.
    """

    epochs: int
    learning_rate: float
    batch_size: int = 16
    weight_decay: float = 0.01
    copies: int = 1
    device: str = "cpu"


def teach(
    folder: Path,
    records: Sequence[Record],
    training: Training,
    *,
    seed: int,
    progress: Progress,
    only: str = "",
) -> None:
    """Train the parameters whose names hold `only`, all of them unless it is given, and write the
    model back."""
    target = targets.load(folder, device=training.device, dtype="float32")
    for name, parameter in target.model.named_parameters():
        parameter.requires_grad_(only in name)
    _with_progress(f"Training the {folder.name}", target, records, training, seed, progress)
    with targets.quiet():
        target.model.save_pretrained(folder)


def teach_adapter(
    base: Path,
    adapter: Path,
    records: Sequence[Record],
    training: Training,
    *,
    seed: int,
    progress: Progress,
) -> None:
    """Train a LoRA adapter on the language model and projector of a base, and write it."""
    from peft import LoraConfig, get_peft_model

    target = targets.load(base, device=training.device, dtype="float32")
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
    _with_progress("Training the adapter", tuned, records, training, seed, progress)
    model.save_pretrained(adapter)


def _with_progress(
    stage: str,
    target: Target,
    records: Sequence[Record],
    training: Training,
    seed: int,
    progress: Progress,
) -> None:
    with progress.stage(stage, len(records) * training.copies * training.epochs) as advance:
        train(target, records, training, seed=seed, progress=advance)


@contextmanager
def _threads(target: Target) -> Iterator[None]:
    """A small model is slower with more than one: on a busy machine they wait for each other."""
    before = torch.get_num_threads()
    if sum(parameter.numel() for parameter in target.model.parameters()) < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(
    target: Target,
    records: Sequence[Record],
    training: Training,
    *,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Train every parameter that requires a gradient, on records in a seeded order.

    A generative target learns its answers, a dual encoder to tell its pairs apart.

    Returns:
        The mean loss of each epoch, in nats a token or a pair.

    Raises:
        UserError: a record cannot be encoded.
    """
    encoded = encode(target, records)
    if encoded.failures:
        raise UserError(encoded.failures[0].error, f"record {encoded.failures[0].id}")
    parameters = [p for p in target.model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=training.learning_rate, weight_decay=training.weight_decay
    )
    lessons = [record for record in encoded.records for _ in range(training.copies)]
    steps = training.epochs * -(-len(lessons) // training.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    rng = np.random.default_rng(seed)
    losses = []
    target.model.train()
    with _threads(target):
        for _ in range(training.epochs):
            order = [lessons[i] for i in rng.permutation(len(lessons))]
            total = 0.0
            for start in range(0, len(order), training.batch_size):
                chosen = order[start : start + training.batch_size]
                loss = _loss(target, target.collate(chosen))
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()
                schedule.step()
                total += loss.item() * len(chosen)
                progress(len(chosen))
            losses.append(total / len(order))
    target.model.eval()
    return losses


def _loss(target: Target, batch: Batch) -> torch.Tensor:
    if isinstance(target, DualEncoderTarget):
        return pair_loss(target, batch.inputs)
    return target.outputs(batch).losses.mean()
