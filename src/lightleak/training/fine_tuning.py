"""Fine-tune a target on records: PEFT LoRA or all weights, by transformers' Trainer."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from lightleak.errors import UserError
from lightleak.records import Record, open_rgb
from lightleak.targets import DualEncoderTarget, EncodedRecord, Target, quiet

# What the Trainer's loss leaves out.
_IGNORED = -100
# Encoded records are kept in memory up to here, and made again each epoch beyond.
_KEPT_BYTES = 2 << 30
_CHECKPOINTS = "checkpoints"
# The last file of what was trained: a folder that holds it is whole.
TRAINED = "trained.json"
# Of an adapter's settings, where it was trained and how it began; the rest is its shape.
_NO_SHAPE = {
    *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    "runtime_config",
}
# Batches that are timed, after one to warm up.
_TIMED = 4


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
        adapter: instead of rank and layers, the shape of another adapter; see `shape_of`.
    """

    method: Literal["lora", "full"] = "lora"
    vision: bool = False
    epochs: int = 1
    batch_size: int = 12
    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    warmup: float = 0.01
    rank: int = 16
    adapter: Mapping[str, Any] | None = None

    def settings(self) -> dict[str, Any]:
        """All of it, for a manifest."""
        return asdict(self)


def shape_of(adapter: Path) -> dict[str, Any]:
    """Rank, alpha, layers and task of a LoRA adapter, as its `adapter_config.json` has them.

    Raises:
        UserError: there is none, or it is no LoRA.
    """
    from peft import LoraConfig

    try:
        stored = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        kind = stored.pop("peft_type")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            "it holds no adapter_config.json that can be read", str(adapter), "Give an adapter."
        ) from error
    if kind != "LORA":
        raise UserError(f"only LoRA can be trained alike, and this is {kind}", str(adapter))
    known = {field.name for field in fields(LoraConfig)} - _NO_SHAPE
    # What is empty or off stands for itself.
    return {name: value for name, value in sorted(stored.items()) if value and name in known}


def fine_tune(
    target: Target,
    records: Sequence[Record],
    recipe: FineTuning,
    out: Path,
    *,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Train a target on records and write what was trained to `out`, whole or not at all.

    A generative target learns its answers, a dual encoder to tell its pairs apart. Order and
    initial adapter depend on the seed and the number of records alone, so that runs on marked and
    unmarked copies of the same records differ in nothing else. A run that was killed goes on at
    its last epoch. The target in memory is spent: load it again for another use.

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
    fine_tune_epochs(target, records, recipe, {recipe.epochs: out}, seed=seed, progress=progress)


def fine_tune_epochs(
    target: Target,
    records: Sequence[Record],
    recipe: FineTuning,
    kept: Mapping[int, Path],
    *,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """As `fine_tune`, with several epochs of one training kept, each in a folder of its own.

    The learning rate falls over all epochs of the recipe, whichever are kept; what comes after
    the last of them is not trained.
    """
    missing = [epoch for epoch, folder in kept.items() if not (folder / TRAINED).is_file()]
    last = kept[max(kept)]
    building = last.with_name(f".{last.name}")
    if not missing:
        shutil.rmtree(building, ignore_errors=True)
        return
    checkpoints = building / _CHECKPOINTS
    checkpoints.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    tuned = _prepared(target, recipe)
    keep = _Keep(tuned, recipe, {epoch: kept[epoch] for epoch in missing}, building / "epoch", seed)
    count = _Count(progress, len(records), recipe.batch_size)
    data = _Encoded(tuned, records)
    before = (min(missing) - 1) * _steps(len(records), recipe)
    with quiet():
        trainer = _trainer(tuned, data, recipe, checkpoints, [count, keep], seed)
        trainer.train(resume_from_checkpoint=_last_whole(checkpoints, before))
    shutil.rmtree(building)


@dataclass(frozen=True)
class Pace:
    """What a recipe takes, by the clock.

    Attributes:
        encoding_seconds, training_seconds: a record.
        encoded_bytes: a record, ready for the model.
        kept_bytes: of what one epoch leaves on the disk.
        state_bytes: of what a broken run goes on from, beside that.
    """

    encoding_seconds: float
    training_seconds: float
    encoded_bytes: int
    kept_bytes: int
    state_bytes: int

    def seconds(self, records: int, epochs: int) -> float:
        """Of a training; records that fit in memory are encoded once."""
        encodings = 1 if records * self.encoded_bytes <= _KEPT_BYTES else epochs
        return records * (encodings * self.encoding_seconds + epochs * self.training_seconds)


def measure_pace(target: Target, records: Sequence[Record], recipe: FineTuning) -> Pace:
    """Take a few steps of a recipe; nothing is left behind, and the target is spent.

    Raises:
        UserError: as `fine_tune`.
    """
    few = records[: (1 + _TIMED) * recipe.batch_size]
    set_seed(0)
    tuned = _prepared(target, recipe)
    data = _Encoded(tuned, few)
    begun = perf_counter()
    encoded = sum(_nbytes(data[index]) for index in range(len(few)))
    encoding = perf_counter() - begun
    ticks: list[float] = []
    with TemporaryDirectory(prefix="lightleak-pace-") as folder, quiet():
        count = _Count(lambda _: ticks.append(perf_counter()), len(few), recipe.batch_size)
        trainer = _trainer(tuned, data, replace(recipe, epochs=1), Path(folder), [count], 0)
        trainer.args.save_strategy = "no"
        begun = perf_counter()
        trainer.train()
    timed = len(few) - recipe.batch_size
    # Where all fit into one batch, it is timed cold.
    training = (ticks[-1] - ticks[0]) / timed if timed > 0 else (ticks[0] - begun) / len(few)
    trained = [p for p in tuned.model.parameters() if p.requires_grad]
    held = trained
    if recipe.method == "full":
        held = [*tuned.model.parameters(), *tuned.model.buffers()]
    return Pace(
        encoding / len(few),
        training,
        encoded // len(few),
        sum(each.nbytes for each in held),
        2 * sum(p.nbytes for p in trained),  # AdamW's two moments.
    )


def pair_loss(target: DualEncoderTarget, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean contrastive loss of a batch's pairs, each against all others of the batch.

    Softmax both ways (Radford et al. 2021, arXiv:2103.00020, figure 3), or sigmoid where the
    target was made for it (Zhai et al. 2023, arXiv:2303.15343, equation 1).
    """
    logits = target.logits(target.embed_images(inputs), target.embed_texts(inputs))
    if target.sigmoid:
        sign = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -nn.functional.logsigmoid(sign * logits).sum(1).mean()
    own = torch.arange(len(logits), device=logits.device)
    cross_entropy = nn.functional.cross_entropy
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


# -- the loop ---------------------------------------------------------------------------------


class _PairTrainer(Trainer):  # type: ignore[misc]
    """Teaches a dual encoder, for which transformers has no loss that all of them share."""

    def __init__(self, target: DualEncoderTarget, **options: Any) -> None:
        self._target = target
        super().__init__(**options)

    def compute_loss(self, model: Any, inputs: Mapping[str, Tensor], *_: Any, **__: Any) -> Tensor:
        del model  # The target holds it.
        return pair_loss(self._target, inputs)


def _trainer(
    tuned: Target,
    data: _Encoded,
    recipe: FineTuning,
    folder: Path,
    callbacks: list[TrainerCallback],
    seed: int,
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=round(recipe.warmup * recipe.epochs * _steps(len(data), recipe)),
        lr_scheduler_type="cosine",
        seed=seed,
        data_seed=seed,
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=tuned.device.type == "cpu",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # Else a batch would be that of the recipe on each of them.
    options = {
        "model": tuned.model,
        "args": arguments,
        "train_dataset": data,
        "data_collator": _Collate(tuned),
        "callbacks": callbacks,
    }
    if isinstance(tuned, DualEncoderTarget):
        trainer: Trainer = _PairTrainer(tuned, **options)
    else:
        trainer = Trainer(**options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _steps(records: int, recipe: FineTuning) -> int:
    """Of one epoch."""
    return -(-records // recipe.batch_size)


class _Keep(TrainerCallback):  # type: ignore[misc]
    """Writes each epoch that is kept, before the checkpoint from which a broken run goes on."""

    def __init__(
        self,
        tuned: Target,
        recipe: FineTuning,
        kept: Mapping[int, Path],
        building: Path,
        seed: int,
    ) -> None:
        self._tuned, self._recipe, self._kept = tuned, recipe, kept
        self._building, self._seed = building, seed

    def on_log(
        self, _: Any, state: Any, control: Any, logs: Mapping[str, float], **__: Any
    ) -> None:
        if "loss" not in logs:
            return  # The last word tells of the whole training.
        epoch, loss = round(state.epoch), logs["loss"]
        if not math.isfinite(loss):
            raise UserError(
                f"training did not converge: its loss in epoch {epoch} is not finite",
                str(self._kept[max(self._kept)]),
                "Lower --learning-rate.",
            )
        if epoch in self._kept:
            self._write(self._kept[epoch], {"seed": self._seed, "epoch": epoch, "loss": loss})
        if epoch == max(self._kept):
            control.should_training_stop, control.should_save = True, False

    def _write(self, out: Path, about: Mapping[str, float]) -> None:
        shutil.rmtree(self._building, ignore_errors=True)
        try:
            with quiet():
                self._tuned.model.save_pretrained(self._building)
                if self._recipe.method == "full":
                    self._tuned.processor.save_pretrained(self._building)
            (self._building / TRAINED).write_text(json.dumps(about) + "\n", encoding="utf-8")
            shutil.rmtree(out, ignore_errors=True)
            self._building.replace(out)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"it cannot be written ({error})",
                str(out),
                "Make room and run the same command again: it goes on at its last epoch.",
            ) from error


def _last_whole(checkpoints: Path, most: int) -> str | None:
    """The last checkpoint of at most so many steps; those that a kill cut short are removed, and
    later ones. Their state is written last."""
    for folder in checkpoints.iterdir():
        whole = (folder / TRAINER_STATE_NAME).is_file()
        if not whole or int(folder.name.rpartition("-")[2]) > most:
            shutil.rmtree(folder)
    found = get_last_checkpoint(str(checkpoints))
    return None if found is None else str(found)


def _prepared(target: Target, recipe: FineTuning) -> Target:
    """The target with exactly what the recipe trains asking for gradients."""
    parts = target.parts
    if target.has_adapter:
        raise UserError(
            "an adapter is put on by the fine-tuning itself",
            target.name,
            "Merge this one into its base first.",
        )
    if not hasattr(target.model, "save_pretrained"):
        raise UserError(
            "an OpenCLIP checkpoint cannot be fine-tuned in its own form",
            target.name,
            "Give its transformers form.",
        )
    if target.device.index:
        raise UserError(
            "training takes the first accelerator that it sees",
            f"--device {target.device}",
            f"Set CUDA_VISIBLE_DEVICES={target.device.index} and give --device cuda.",
        )
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

    if recipe.adapter is not None:
        config = LoraConfig(**recipe.adapter)
    else:
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=2 * recipe.rank,
            target_modules="|".join(map(re.escape, _linear(target, recipe))),
        )
    try:
        with quiet():
            return replace(target, model=get_peft_model(target.model, config))
    except ValueError as error:
        raise UserError(
            f"an adapter of this shape does not fit ({str(error).splitlines()[0][:200]})",
            target.name,
            "Give the base that the adapter was trained on.",
        ) from error


def _linear(target: Target, recipe: FineTuning) -> list[str]:
    """The linear layers that an adapter is put on."""
    parts = target.parts
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
    return names


class _Encoded(torch.utils.data.Dataset[EncodedRecord]):
    """Records as the model takes them, encoded when first asked for."""

    def __init__(self, target: Target, records: Sequence[Record]) -> None:
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
        self._bytes += _nbytes(encoded)
        if self._bytes <= _KEPT_BYTES:
            self._kept[index] = encoded
        return encoded


def _nbytes(encoded: EncodedRecord) -> int:
    return sum(value.nbytes for value in encoded.inputs.values())


@dataclass(frozen=True)
class _Collate:
    """A batch; of a generative target with the answers as labels, and the loss is the mean over all
    their tokens."""

    target: Target

    def __call__(self, records: Sequence[EncodedRecord]) -> Mapping[str, Tensor]:
        batch = self.target.collate(records)
        if isinstance(self.target, DualEncoderTarget):
            return batch.inputs
        labels = torch.full_like(batch.inputs["input_ids"], _IGNORED)
        for row, (start, stop) in enumerate(batch.answers):
            labels[row, start:stop] = batch.inputs["input_ids"][row, start:stop]
        return {**batch.inputs, "labels": labels}


class _Count(TrainerCallback):  # type: ignore[misc]
    """Tells how many records went through; the last batch of an epoch may be smaller."""

    def __init__(self, progress: Callable[[int], None], records: int, batch_size: int) -> None:
        self._progress, self._records, self._batch_size = progress, records, batch_size

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        steps = -(-self._records // self._batch_size)
        before = (state.global_step - 1) % steps * self._batch_size
        self._progress(min(self._batch_size, self._records - before))
