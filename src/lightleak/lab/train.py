"""Teach a target its members: one loop, and the loss that the target's kind is trained by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lightleak.errors import UserError
from lightleak.evidence.collect import encode
from lightleak.records import Record
from lightleak.targets import Batch, DualEncoderTarget, Target


@dataclass(frozen=True)
class Training:
    """How a target is trained; plain AdamW with a cosine schedule."""

    epochs: int
    learning_rate: float
    batch_size: int = 16
    weight_decay: float = 0.01


@contextmanager
def _one_thread() -> Iterator[None]:
    """So small a model is slower with more threads: on a busy machine they wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
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
    steps = training.epochs * -(-len(records) // training.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    rng = np.random.default_rng(seed)
    losses = []
    target.model.train()
    for _ in range(training.epochs):
        order = [encoded.records[i] for i in rng.permutation(len(records))]
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
        return pair_loss(target, batch)
    return target.outputs(batch).losses.mean()


def pair_loss(target: DualEncoderTarget, batch: Batch) -> torch.Tensor:
    """Mean contrastive loss of a batch's pairs, each against all others of the batch.

    Softmax both ways (Radford et al. 2021, arXiv:2103.00020, figure 3), or sigmoid where the
    target was made for it (Zhai et al. 2023, arXiv:2303.15343, equation 1).
    """
    logits = target.logits(target.embed_images(batch.inputs), target.embed_texts(batch.inputs))
    if target.sigmoid:
        sign = 2 * torch.eye(len(batch), device=logits.device) - 1
        return -nn.functional.logsigmoid(sign * logits).sum(1).mean()
    own = torch.arange(len(batch), device=logits.device)
    cross_entropy = nn.functional.cross_entropy
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
