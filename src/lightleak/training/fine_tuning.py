"""Fine-tune a generative target on records: PEFT LoRA or all weights, by transformers' Trainer."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from lightleak.errors import UserError
from lightleak.records import Record, open_rgb
from lightleak.targets import EncodedRecord, GenerativeTarget, quiet

# What the Trainer's loss leaves out.
_IGNORED = -100
# Encoded records are kept in memory up to here, and made again each epoch beyond.
_KEPT_BYTES = 2 << 30
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class FineTuning:
    """How a target is fine-tuned.

    The defaults are those published for Qwen-VL (arXiv 2503.01208): one epoch of batches of 12,
    AdamW with weight decay 0.1, learning rate 1e-5 by a cosine after 1 % warm-up, vision tower
    frozen.

    Attributes:
        method: `lora` puts an adapter on every linear layer that is trained; `full` trains the
            weights themselves.
        vision: train the vision tower too.
        rank: of the adapter; its alpha is twice that.
    """

    method: Literal["lora", "full"] = "lora"
    vision: bool = False
    epochs: int = 1
    batch_size: int = 12
    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    warmup: float = 0.01
    rank: int = 16

    def settings(self) -> dict[str, Any]:
        """All of it, for a manifest."""
        return asdict(self)


def fine_tune(
    target: GenerativeTarget,
    records: Sequence[Record],
    recipe: FineTuning,
    out: Path,
    *,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Train a target on records and write what was trained to `out`, whole or not at all.

    Order and initial adapter depend on the seed and the number of records alone, so that runs on
    marked and unmarked copies of the same records differ in nothing else. A run that was killed
    goes on at its last epoch. The target in memory is spent: load it again for another use.

    Args:
        target: the model to begin with; it is changed.
        records: what to train on.
        recipe: how.
        out: becomes a folder with an adapter (`lora`), or with the whole model and its processor.
        seed: of the order and of the adapter.
        progress: told how many records went through.

    Raises:
        UserError: a record cannot be encoded, nothing is left to train, or the loss is not finite.
    """
    if (out / "trained.json").is_file():
        return
    building = out.with_name(f".{out.name}")
    checkpoints = building / _CHECKPOINTS
    checkpoints.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    tuned = _prepared(target, recipe)
    steps = recipe.epochs * -(-len(records) // recipe.batch_size)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=round(recipe.warmup * steps),
        lr_scheduler_type="cosine",
        seed=seed,
        data_seed=seed,
        save_strategy="epoch" if recipe.epochs > 1 else "no",
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=target.device.type == "cpu",
    )
    trainer = Trainer(
        model=tuned.model,
        args=arguments,
        train_dataset=_Encoded(tuned, records),
        data_collator=_Collate(tuned),
        callbacks=[_Count(progress, recipe.batch_size)],
    )
    trainer.remove_callback(PrinterCallback)
    with quiet():
        result = trainer.train(resume_from_checkpoint=_last_whole(checkpoints))
    if not torch.isfinite(torch.tensor(result.training_loss)):
        raise UserError("training did not converge: its loss is not finite", str(out))
    tuned.model.eval().requires_grad_(False)
    with quiet():
        tuned.model.save_pretrained(building)
        if recipe.method == "full":
            tuned.processor.save_pretrained(building)
    shutil.rmtree(checkpoints)
    (building / "trained.json").write_text(
        f'{{"seed": {seed}, "loss": {result.training_loss:.6f}}}\n', encoding="utf-8"
    )
    shutil.rmtree(out, ignore_errors=True)
    building.replace(out)


def _last_whole(checkpoints: Path) -> str | None:
    """The last checkpoint, those that a kill cut short removed; their state is written last."""
    for folder in checkpoints.iterdir():
        if not (folder / TRAINER_STATE_NAME).is_file():
            shutil.rmtree(folder)
    found = get_last_checkpoint(str(checkpoints))
    return None if found is None else str(found)


def _prepared(target: GenerativeTarget, recipe: FineTuning) -> GenerativeTarget:
    """The target with exactly what the recipe trains asking for gradients."""
    parts = target.parts
    if recipe.method == "full":
        if target.dtype.itemsize < 4:
            raise UserError(
                "steps as small as these are lost in half precision",
                target.name,
                "Train all weights with --dtype float32, or an adapter.",
            )
        for name, parameter in target.model.named_parameters():
            below = bool(parts.vision_tower) and name.startswith(f"{parts.vision_tower}.")
            parameter.requires_grad_(recipe.vision or not below)
        return target
    from peft import LoraConfig, get_peft_model

    blocks = (
        *parts.text_blocks,
        *parts.projector,
        *(parts.vision_blocks if recipe.vision else ()),
    )
    names = [
        name
        for name, module in target.model.named_modules()
        if isinstance(module, nn.Linear)
        and any(name == block or name.startswith(f"{block}.") for block in blocks)
    ]
    if not names:
        raise UserError(
            "no linear layer of this model was found to put an adapter on",
            target.name,
            "Train all weights: --method full.",
        )
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules="|".join(map(re.escape, names)),
    )
    return replace(target, model=get_peft_model(target.model, config))


class _Encoded(torch.utils.data.Dataset[EncodedRecord]):
    """Records as the model takes them, encoded when first asked for."""

    def __init__(self, target: GenerativeTarget, records: Sequence[Record]) -> None:
        self._target, self._records = target, records
        self._kept: dict[int, EncodedRecord] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> EncodedRecord:
        if index in self._kept:
            return self._kept[index]
        record = self._records[index]
        encoded = self._target.encode(record, open_rgb(record.image))
        self._bytes += sum(value.nbytes for value in encoded.inputs.values())
        if self._bytes <= _KEPT_BYTES:
            self._kept[index] = encoded
        return encoded


@dataclass(frozen=True)
class _Collate:
    """A batch with the answers as labels; the loss is the mean over all their tokens."""

    target: GenerativeTarget

    def __call__(self, records: Sequence[EncodedRecord]) -> Mapping[str, Tensor]:
        batch = self.target.collate(records)
        labels = torch.full_like(batch.inputs["input_ids"], _IGNORED)
        for row, (start, stop) in enumerate(batch.answers):
            labels[row, start:stop] = batch.inputs["input_ids"][row, start:stop]
        return {**batch.inputs, "labels": labels}


class _Count(TrainerCallback):  # type: ignore[misc]
    def __init__(self, progress: Callable[[int], None], batch_size: int) -> None:
        self._progress, self._batch_size = progress, batch_size

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._progress(self._batch_size)
