"""One pass of one model over the records of a run, as the processes that do it see it.

The target makes one; so does each control model, and either with texts shuffled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from torch import Tensor

from lightleak.audits.models import Description, Model, describe, made
from lightleak.audits.settings import AuditSettings
from lightleak.audits.sides import Sides
from lightleak.errors import UserError
from lightleak.evidence import collect
from lightleak.evidence.gradients import GradientEngine, kernels, select
from lightleak.evidence.memory import batch_size
from lightleak.evidence.pairs import PairReader
from lightleak.evidence.perturbed import PerturbedReader
from lightleak.evidence.readings import (
    EXTRA,
    NEEDS_BANK,
    AugmentedCosines,
    DropoutCosines,
    Floats,
    GradientNorms,
    GradientSlices,
    OwnDescription,
    PromptDistributions,
    SampledAnswers,
    slice_axes,
)
from lightleak.evidence.sampled import TEMPERATURES, SampledReader
from lightleak.evidence.selfcheck import self_check
from lightleak.evidence.tokens import AnswerReader
from lightleak.records import Record, open_rgb
from lightleak.runs import Progress, read_json, replacing, write_json
from lightleak.runs.executors import Executor
from lightleak.runs.progress import Advance
from lightleak.targets import (
    Bank,
    DualEncoderTarget,
    EndpointTarget,
    GenerativeTarget,
    Question,
    Target,
)

# A shard is about so much work, by what a step costs and what a processor is good for.
_SHARD_SECONDS = 120
_OPERATIONS_A_SECOND = {"cpu": 2e10, "cuda": 1e14}
_SHARD_BYTES = 256e6
_MOST_RECORDS = 2048
_FEWEST_RECORDS = {"cpu": 32, "cuda": 128}
_ALIKE = 16
# Records of a shard that an endpoint is asked about: what a broken run pays for twice.
_ASKED_A_SHARD = 16


@dataclass(frozen=True)
class Pass:
    """One model over the records of a run.

    Attributes:
        folder: of the run's, for this pass alone.
        settings: which signals, and how they are fitted.
        model: which model.
        description: what it is.
        of: what is measured, in words, where it is not the target.
    """

    folder: Path
    settings: AuditSettings
    model: Model
    description: Description
    of: str = ""

    @property
    def matrices(self) -> str | None:
        """Where gradients are read; None where no signal needs them."""
        if not self.settings.needs() & {GradientNorms, GradientSlices}:
            return None
        chosen = str(self.settings.options_of("gradaudit").get("matrices", "auto"))
        adapter = "adapter" in self.description.hashes
        if chosen == "auto":
            chosen = "lora" if adapter else "last3"
        if self.of and chosen.startswith("lora") and not adapter:
            chosen = "last3"  # The target's adapter is asked for; this model has none.
        return chosen

    @property
    def lora(self) -> bool:
        """Whether they are an adapter's."""
        return (self.matrices or "").startswith("lora")

    @property
    def slices(self) -> bool:
        """Whether every slice is compared with reference gradients."""
        return GradientSlices in self.settings.needs()

    @property
    def banked(self) -> bool:
        """Whether a signal compares each pair with a bank of negatives."""
        dual = self.description.kind == "dual-encoder"
        return dual and bool(self.settings.needs() & NEEDS_BANK)

    @property
    def forwards(self) -> int:
        """How often each record goes through the model."""
        return 1 + sum(EXTRA.get(need, 0) for need in self.settings.needs())

    @property
    def n_references(self) -> int:
        """How many reference gradients there are: one a fold, or one in all."""
        return 1 if self.settings.protocol == "split" else self.settings.folds

    @property
    def bank_file(self) -> Path:
        """Embeddings of the bank."""
        return self.folder / "bank.safetensors"

    @property
    def reference_file(self) -> Path:
        """The reference gradients."""
        return self.folder / "reference.safetensors"


def begin(
    folder: Path, settings: AuditSettings, sides: Sides, progress: Progress, executor: Executor
) -> Pass:
    """The target's own pass, its settings with nothing left open.

    Raises:
        UserError: the target cannot be loaded, or is not of the kind that the settings are for.
    """
    with progress.stage("Loading the model", 1) as advance:
        (description,) = executor.map(describe, [Model(settings)], advance)
    settings = settings.of_kind(description.kind)
    if sides.bank and description.kind != "dual-encoder":
        raise UserError("only a dual encoder takes a bank of negatives", "--bank")
    return Pass(folder, settings, Model(settings), description)


@dataclass(frozen=True)
class Plan:
    """How a pass goes through its records; fixed when it begins, so that a resumed one ends as an
    unbroken one.

    Attributes:
        size: batch limits.
        shard: records that are measured and written together.
        piece: of which so many are held in memory with all their slices.
        keep: whether slices are stored; else they are reduced to scores on the way.
        unreached: selected matrices that no gradient reaches.
        unseen: those that only autograd sees whole.
        one_by_one: matrices that can only be read from one record at a time.
        shapes: of the matrices that are read.
        kernels: what was chosen by timing on an accelerator, by shape.
    """

    size: collect.BatchSize
    shard: int
    piece: int
    keep: bool
    unreached: tuple[str, ...]
    unseen: tuple[str, ...]
    one_by_one: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    kernels: Mapping[str, str]

    @staticmethod
    def stored(folder: Path) -> Plan | None:
        """The plan of a pass that has begun."""
        file = folder / "plan.json"
        if not file.is_file():
            return None
        content = read_json(file)
        try:
            return TypeAdapter(Plan).validate_python(content)
        except ValidationError as error:
            raise UserError("it is damaged", str(file), "Give --out another folder.") from error

    def store(self, folder: Path) -> None:
        """Write it down before anything is measured by it."""
        write_json(folder / "plan.json", asdict(self))


@dataclass(frozen=True)
class References:
    """Reference gradients, one for each fold of `crossfit`, one in all for `split`.

    Attributes:
        gradients: name → (k, *shape), the mean over the records in each.
        sizes: (k,) how many records each is the mean of.
    """

    gradients: dict[str, Tensor]
    sizes: tuple[int, ...]

    @staticmethod
    def read(file: Path, device: torch.device | str = "cpu") -> References:
        """Read what `write` wrote.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            gradients = safetensors.torch.load_file(file, device=str(device))
            with safe_open(file, "pt") as content:
                sizes = content.metadata()["sizes"].split()
        except (OSError, safetensors.SafetensorError, KeyError, TypeError) as error:
            raise UserError(
                f"the reference gradients cannot be read ({error})",
                str(file),
                "Delete reference.json beside it and run the same audit again.",
            ) from error
        return References(gradients, tuple(map(int, sizes)))

    def write(self, file: Path) -> None:
        """Write at once."""
        sizes = " ".join(map(str, self.sizes))
        save_tensors(file, self.gradients, {"sizes": sizes})

    def norms2(self, names: list[str]) -> Floats:
        """(k, s) squared norms of all slices, laid out as `slice_axes` does."""
        parts = []
        for name in names:
            squares = self.gradients[name].square()
            if squares.ndim == 2:  # A vector is one slice.
                parts.append(squares.sum(1, keepdim=True))
            else:
                parts += [squares.sum(2), squares.sum(1)]
        norms2: Floats = torch.cat(parts, dim=1).cpu().numpy()
        return norms2


def save_tensors(file: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write a safetensors file at once."""
    content = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    with replacing(file) as stream:
        stream.write(safetensors.torch.save(content, about))


@dataclass(frozen=True)
class Opened:
    """A pass with its model in memory.

    Attributes:
        target: the model.
        engine: reads gradients; None when no signal needs them.
        reader: what is kept of the outputs.
        references: what gradients are compared with, once they are made.
    """

    target: Target
    engine: GradientEngine | None
    reader: collect.Reader
    references: References | None


def open_pass(of: Pass, plan: Plan, *, compared: bool) -> Opened:
    """The pass with its model, kept in this process for the next job.

    Args:
        of: the pass.
        plan: its plan.
        compared: whether gradients are compared with the references, which are read then.
    """
    return made((of, compared), lambda: load_pass(of, plan, compared=compared))


def load_pass(of: Pass, plan: Plan, *, compared: bool) -> Opened:
    """The pass with its model, not kept."""
    target = _target(of)
    engine = None
    kernels.prefer(plan.kernels)
    if of.matrices is not None:
        selection = select(target, of.matrices).without(set(plan.unreached)).whole(plan.unseen)
        engine = GradientEngine(target, selection)
    references = References.read(of.reference_file, target.device) if compared else None
    return Opened(target, engine, _reader(of, target, plan.size), references)


def _reader(of: Pass, target: Target, size: collect.BatchSize) -> collect.Reader:
    """What is kept of the target's outputs, beyond its gradients, and what is asked besides."""
    needs = of.settings.needs()
    if isinstance(target, DualEncoderTarget):
        return PairReader(target, AugmentedCosines in needs, DropoutCosines in needs)
    if isinstance(target, EndpointTarget):
        return SampledReader(None, target)
    assert isinstance(target, GenerativeTarget)
    slices = ("description", *(("image", "instruction") if target.hears_prompt else ()))
    own = replace(target, hears_prompt=True) if OwnDescription in needs else None
    reader: collect.Reader = AnswerReader(slices, own, size)
    if needs & EXTRA.keys():
        reader = PerturbedReader(reader, target, needs, size)
    return SampledReader(reader, target) if SampledAnswers in needs else reader


def _target(of: Pass) -> Target:
    """The model as this pass uses it, which changes nothing for others."""
    target = of.model.load()
    if isinstance(target, GenerativeTarget) and PromptDistributions in of.settings.needs():
        return replace(target, hears_prompt=True)
    if isinstance(target, DualEncoderTarget) and of.bank_file.is_file():
        bank = safetensors.torch.load_file(of.bank_file, device=str(target.device))
        target.bank = Bank(bank["image"], bank["text"])
    return target


@dataclass(frozen=True)
class Check:
    """The first job of a pass: look at the model with a few records, and make the plan.

    Attributes:
        of: the pass.
        sample: the first records.
        bank: records of the bank.
        n: how many records there are in all.
        share: the part of the memory that one process may take.
    """

    of: Pass
    sample: tuple[Record, ...]
    bank: tuple[Record, ...]
    n: int
    share: float


def check(job: Check, advance: Advance) -> Plan:
    """Check the model, embed the bank, and decide how the records go through it.

    Raises:
        UserError: the model is not fit to be measured.
    """
    of, settings = job.of, job.of.settings
    target = _target(of)
    size = settings.size
    if isinstance(target, EndpointTarget):
        plan = _asking(target, job.sample)
        plan.store(of.folder)
        advance(1)
        return plan
    if isinstance(target, DualEncoderTarget) and job.bank:
        if not of.bank_file.is_file():
            bank = collect.embed_bank(target, job.bank, size)
            save_tensors(of.bank_file, {"image": bank.image, "text": bank.text}, {})
        target = _target(of)
    engine = None if of.matrices is None else GradientEngine(target, select(target, of.matrices))
    checked = self_check(target, engine, job.sample, size)
    selection = checked.selection
    if selection is not None:
        if not selection.shapes:
            raise UserError("no gradient reaches any selected matrix", "gradaudit.matrices")
        engine = GradientEngine(target, selection)
    if settings.batch_size is None:
        size = batch_size(target, engine, job.sample, share=job.share)
    shapes = {} if selection is None else dict(selection.shapes)
    width = 0
    if of.slices:
        number = 8 if target.dtype == torch.float64 else 4
        width = slice_axes(shapes)[-1].stop * number * (1 + of.n_references)
    keep = width * job.n <= settings.evidence_limit * 1e9
    plan = Plan(
        size,
        _shard(target, engine, job.n, checked.tokens * of.forwards, width if keep else 0),
        piece_of(width),
        keep,
        tuple(sorted(checked.unreached)),
        tuple(sorted(checked.unseen)),
        tuple(checked.one_by_one),
        shapes,
        kernels.choices(),
    )
    plan.store(of.folder)
    advance(1)
    return plan


def _asking(target: EndpointTarget, sample: Sequence[Record]) -> Plan:
    """The plan of a pass that only asks, made once one question has been answered.

    Raises:
        UserError: it answers none.
    """
    record = sample[0]
    question = Question(open_rgb(record.image), record.prompt, TEMPERATURES[0], 0)
    try:
        target.answer([question])
    except UserError:
        raise
    except Exception as error:  # A function may fail in any way it likes.
        raise UserError(f"it answers no question ({error})", target.name) from error
    # One record at a time: a question that has been answered is not asked again for others' sake.
    return Plan(collect.BatchSize(1), _ASKED_A_SHARD, 1, False, (), (), (), {}, {})


def piece_of(width: int) -> int:
    """Records whose slices, of `width` bytes each, stay small in memory and on the disk."""
    return int(max(4, _SHARD_BYTES // max(1, width)))


def _shard(target: Target, engine: GradientEngine | None, n: int, tokens: float, width: int) -> int:
    """Records of a shard, of n with so many tokens each: a few minutes of work, in parts that stay
    small; no clock is asked, so that every run of this audit is cut alike."""
    kind = target.device.type
    parameters = sum(p.numel() for p in target.model.parameters())
    operations = (2 if engine is None else 6) * parameters * tokens
    rate = _OPERATIONS_A_SECOND.get(kind, _OPERATIONS_A_SECOND["cuda"])
    by_time = 2 ** np.floor(np.log2(max(1.0, _SHARD_SECONDS * rate / operations)))
    fewest = _FEWEST_RECORDS.get(kind, _FEWEST_RECORDS["cuda"])
    most = min(_MOST_RECORDS, max(fewest, n / _ALIKE))
    return max(1, int(min(by_time, most, piece_of(width))))
