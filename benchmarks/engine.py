"""What reading per-record gradients costs, against the goals that were set for it.

    python benchmarks/engine.py                          # all parts but gpu: under two hours
    python benchmarks/engine.py --part kernels memory
    python benchmarks/engine.py --part gpu               # needs CUDA; --tiny is for anywhere
    python benchmarks/engine.py --quick                  # small sizes, writes nothing

- `kernels`: ways to the row and column cosines of every record, on one model, in turns.
- `memory`: peak memory of one step of each way, each in a fresh process.
- `workers`: the model half of a whole audit with two processes and with one.
- `records`: time and memory against the number of records.
- `signals`: one pass that serves every white-box signal, against a pass for each.
- `rescore`: from stored evidence of a million records to the scores of each signal.
- `gpu`: a model of two billion parameters, random weights, bfloat16, 512 tokens.

A process has one thread. Figures are medians of repeats taken in turns, ratios the medians of the
ratios within a turn. Each part replaces its own section of benchmarks/results/engine.json;
docs/images/engine.png shows `kernels`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
)

import lightleak
from lightleak import signals, targets
from lightleak.audits import stored
from lightleak.audits.settings import AuditSettings
from lightleak.evidence import collect
from lightleak.evidence.gradients import GradientEngine, kernels, select
from lightleak.evidence.gradients.engine import BatchReadings
from lightleak.evidence.readings import GradientNorms, TokenStatistics
from lightleak.evidence.table import schema
from lightleak.evidence.tokens import AnswerReader
from lightleak.lab.models import tiny_llava
from lightleak.records import Record
from lightleak.runs import EvidenceStore, Run, Silent, read_json, write_json, write_table
from lightleak.targets import Batch, EncodedRecord, GenerativeTarget, Target

RESULTS = Path(__file__).parent / "results" / "engine.json"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "engine.png"

# The text tower that the goals were set on. Its head is kept small: it costs every way the same,
# and a large one would bring all ratios nearer to one.
HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCABULARY = 768, 2048, 4, 12, 4096
TOKENS, BATCH, MASK = 64, 8, 0.2
RANK = 16
SPLIT = ("Reference gradient", "Measuring")

FLOOR, WEIGHTS = "forward and backward alone", "with weight gradients"
OURS, OURS_TWO, OURS_MASKED = "lightleak", "lightleak, two references", "lightleak, mask"
PUBLIC, PUBLIC_MASKED = "public way", "public way, mask"
PUBLIC_KEPT = "public way, kept slices alone"
VMAP, HOOKED = "vmap(grad)", "hooks and einsum"

# Signals of a generative target that need no gradient.
ONE_FORWARD = ("loss", "zlib", "mink", "minkpp", "quantile", "maxprobgap", "maxrenyi", "modrenyi")

Results = dict[str, Any]


# -- one step, by every way --------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A model, some records, and what their gradients are compared with.

    Attributes:
        target, engine: the model, and lightleak's engine on the selected matrices.
        batch: all records at once; alone: one by one.
        references: name → (2, out, in), the mean gradients of all records and of half of them.
        kept: the slices of the first that a mask leaves, drawn at random.
    """

    target: Target
    engine: GradientEngine
    batch: Batch
    alone: list[Batch]
    references: dict[str, Tensor]
    kept: dict[str, kernels.MaskedReference]

    @staticmethod
    def of(
        model: Any, records: Sequence[EncodedRecord], strategy: str, inside: str = ""
    ) -> Setting:
        """Select the matrices of a strategy whose names hold `inside`."""
        model.eval().requires_grad_(False)
        processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=0))
        target = GenerativeTarget(model, processor, model.device, {}, "benchmark")
        selection = select(target, strategy)
        selection = selection.without({name for name in selection.shapes if inside not in name})
        engine = GradientEngine(target, selection)
        alone = [target.collate([record]) for record in records]
        halves: tuple[dict[str, Tensor], ...] = ({}, {})
        for i, record in enumerate(alone):
            engine.add_gradients(record, halves[i % 2])
        references = {
            name: torch.stack([halves[0][name] + halves[1][name], 2 * halves[1][name]]) / len(alone)
            for name in selection.shapes
        }
        kept = {
            name: kernels.MaskedReference.keep(each[0], *(map(_drawn, each[0].shape)))
            for name, each in references.items()
        }
        return Setting(target, engine, target.collate(records), alone, references, kept)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The selected parameters."""
        return {name: self.target.model.get_parameter(name) for name in self.references}

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The modules that own them."""
        find = self.target.model.get_submodule
        return {name: find(name.removesuffix(".weight")) for name in self.references}

    def places(self, name: str) -> tuple[Tensor, Tensor]:
        """The rows and columns of a matrix that are kept."""
        return self.kept[name].rows, self.kept[name].columns

    @property
    def mask(self) -> Tensor:
        """(s,) which slices are kept."""
        parts = []
        for name, each in self.references.items():
            for size, kept in zip(each[0].shape, self.places(name), strict=True):
                part = torch.zeros(size, dtype=torch.bool, device=kept.device)
                part[kept] = True
                parts.append(part)
        return torch.cat(parts)

    def losses(self, batch: Batch) -> Tensor:
        """(n,) each record's own loss."""
        return self.target.outputs(batch).losses

    @contextmanager
    def trained(self) -> Iterator[dict[str, nn.Parameter]]:
        """The selected parameters with gradients of their own, as a training step has them."""
        weights = self.weights
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            yield weights
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
                weight.grad = None


def _drawn(size: int) -> Tensor:
    return torch.randperm(size)[: max(1, round(MASK * size))].sort().values


def _leaf(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Makes the backward pass reach a layer, though every weight is frozen."""
    del module
    return None if given[0].requires_grad else (given[0].detach().requires_grad_(), *given[1:])


def floor(setting: Setting) -> None:
    """One batch forward, and backward to the inputs of the first selected layer."""
    with ExitStack() as hooks:
        for layer in setting.layers.values():
            hooks.callback(layer.register_forward_pre_hook(_leaf).remove)
        setting.losses(setting.batch).sum().backward()


def with_weights(setting: Setting) -> None:
    """One batch forward and backward, with the gradient of every selected matrix."""
    with setting.trained():
        setting.losses(setting.batch).sum().backward()


def ours(setting: Setting, *, k: int = 1) -> BatchReadings:
    """Norms of every row and column, and dots with k references."""
    return setting.engine.read(setting.batch, {n: r[:k] for n, r in setting.references.items()})


def ours_masked(setting: Setting) -> Tensor:
    """Mean cosine (n,) over the kept slices."""
    return setting.engine.score(setting.batch, setting.kept)


def public(setting: Setting, *, of_kept: bool = False) -> Tensor:
    """The published code's way: a batch of one, every gradient held, compared slice by slice.

    The published code picks what a mask keeps out of all cosines; `of_kept` compares no others.
    Returns the cosines (n, s).
    """
    found = []
    with setting.trained() as weights:
        for record in setting.alone:
            for weight in weights.values():
                weight.grad = None
            setting.losses(record).sum().backward()
            cosines = []
            for name, (reference, _) in setting.references.items():
                gradient = weights[name].grad.to(reference.dtype)
                rows, columns = setting.places(name) if of_kept else (..., slice(None))
                cosines += [
                    cosine_similarity(gradient[rows], reference[rows], dim=1),
                    cosine_similarity(gradient[:, columns], reference[:, columns], dim=0),
                ]
            found.append(torch.cat(cosines))
    return torch.stack(found)


def public_masked(setting: Setting) -> Tensor:
    """The published code's score (n,): the mean over the kept slices."""
    return public(setting)[:, setting.mask].mean(1)


def vmapped(setting: Setting) -> None:
    """All records' gradients at once, by torch.func."""
    model = setting.target.model

    def loss(weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        given = {"input_ids": ids[None], "use_cache": False}
        said = torch.func.functional_call(model, dict(weights), (), given).logits[0]
        return cross_entropy(said[:-1], ids[1:])

    weights = {name: each.detach() for name, each in setting.weights.items()}
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))
    for name, each in gradients(weights, setting.batch.inputs["input_ids"]).items():
        for axis in (2, 1):
            cosine_similarity(each, setting.references[name][:1], dim=axis)


def hooked(setting: Setting) -> None:
    """Inputs and output gradients by hooks, and each layer's gradients from them by einsum."""

    def hook(reference: Tensor, module: nn.Module, given: tuple[Tensor], result: Tensor) -> None:
        del module

        def compare(grad: Tensor) -> None:
            gradients = torch.einsum("nto,nti->noi", grad, given[0])
            for axis in (2, 1):
                cosine_similarity(gradients, reference, dim=axis)

        result.register_hook(compare)

    with ExitStack() as hooks:
        for name, layer in setting.layers.items():
            hooks.callback(layer.register_forward_pre_hook(_leaf).remove)
            seen = partial(hook, setting.references[name][:1])
            hooks.callback(layer.register_forward_hook(seen).remove)
        setting.losses(setting.batch).sum().backward()


WAYS: dict[str, Callable[[Setting], object]] = {
    FLOOR: floor,
    WEIGHTS: with_weights,
    OURS: ours,
    OURS_TWO: partial(ours, k=2),
    OURS_MASKED: ours_masked,
    PUBLIC: public,
    PUBLIC_MASKED: public_masked,
    PUBLIC_KEPT: partial(public, of_kept=True),
    VMAP: vmapped,
    HOOKED: hooked,
}


def text_tower(batch: int = BATCH) -> Setting:
    """The text tower of a LLaVA, reading text alone; the loss is over all of it: no row is zero."""
    torch.manual_seed(0)
    text = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=1)
    records = [
        EncodedRecord(
            f"r{i}",
            {
                "input_ids": torch.randint(2, VOCABULARY, (1, TOKENS)),
                "attention_mask": torch.ones(1, TOKENS, dtype=torch.int64),
            },
            frozenset(("input_ids", "attention_mask")),
            TOKENS,
            answer_start=1,
        )
        for i in range(batch)
    ]
    return Setting.of(LlavaForConditionalGeneration(config), records, "all", "language_model")


# -- parts ---------------------------------------------------------------------------------------


def measure_kernels(repeats: int, quick: bool) -> Results:
    """Every way in turns, what they agree to, and the kernels against each other."""
    setting = text_tower(2 if quick else BATCH)
    seconds = in_turns({name: partial(way, setting) for name, way in WAYS.items()}, repeats)
    return {
        "model": f"Llama, hidden {HIDDEN}, {LAYERS} layers, intermediate {INTERMEDIATE}, "
        f"{HEADS} heads, vocabulary {VOCABULARY}, float32",
        "matrices": len(setting.references),
        "tokens": TOKENS,
        "batch": len(setting.batch),
        "kept by the mask": MASK,
        "milliseconds a record": per_record(seconds, setting),
        "largest difference from the public way": differences(setting),
        "kernels, milliseconds a record": _kernel_table(repeats, quick),
        "goals": {
            **_close_to_training(seconds),
            "public way / lightleak": goal(ratio(seconds, PUBLIC, OURS), at_least=3),
            "the same with a mask of both": goal(
                ratio(seconds, PUBLIC_MASKED, OURS_MASKED), at_least=4
            ),
        },
    }


def per_record(seconds: Mapping[str, Sequence[float]], setting: Setting) -> Results:
    """Milliseconds a record, by way."""
    return {name: spread(each, 1e3 / len(setting.batch)) for name, each in seconds.items()}


def differences(setting: Setting) -> Results:
    """Largest difference between what lightleak and the public way find."""
    found = ours(setting)
    lengths = [r[0].square().sum(axis) for r in setting.references.values() for axis in (1, 0)]
    cosines = found.dots[:, 0] / (found.norms2 * torch.cat(lengths)).sqrt()
    scores = public_masked(setting)
    return {
        "cosine": float((cosines - public(setting)).abs().max()),
        "score": float((ours_masked(setting) - scores).abs().max()),
    }


def _close_to_training(seconds: Mapping[str, Sequence[float]]) -> Results:
    return {
        "lightleak / with weight gradients": goal(ratio(seconds, OURS, WEIGHTS), at_most=1.25),
        "the same with a mask": goal(ratio(seconds, OURS_MASKED, WEIGHTS), at_most=1.0),
    }


def _kernel_table(repeats: int, quick: bool) -> list[Results]:
    shapes = {
        "768 × 768": (HIDDEN, HIDDEN),
        "768 × 2048": (HIDDEN, INTERMEDIATE),
        "2048 × 768": (INTERMEDIATE, HIDDEN),
        "LoRA, 768 × 16": (HIDDEN, RANK),
        "LoRA, 16 × 768": (RANK, HIDDEN),
    }
    rows = []
    for tokens in (16, 64) if quick else (16, 32, 64, 128, 512):
        for name, (inp, out) in shapes.items():
            pieces = (torch.randn(BATCH, tokens, inp), torch.randn(BATCH, tokens, out))
            given = (*pieces, torch.randn(1, out, inp))
            ways = {
                each: partial(getattr(kernels, each), *given)
                for each in ("batched", "ghost", "tiles", "read")
            }
            seconds = in_turns(ways, repeats)
            medians = {each: 1e3 / BATCH * float(np.median(s)) for each, s in seconds.items()}
            rows.append({"tokens": tokens, "inputs × outputs": name, **medians})
    return rows


def measure_memory(repeats: int, quick: bool) -> Results:
    """Peak of one step above what lay in memory before it: model, reference, and Python."""
    del quick
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(repeats):
        for name in WAYS:
            # A process each: what one way leaves in the heap would serve the next.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[name].append(pool.apply(_peak, (name,)))
    steps = {name: [step for step, _ in each] for name, each in found.items()}
    return {
        "batch": BATCH,
        "tokens": TOKENS,
        "megabytes, step": {name: spread(each) for name, each in steps.items()},
        "megabytes, process": {
            name: spread([whole for _, whole in each]) for name, each in found.items()
        },
        "goals": {
            "peak of a step, lightleak / forward and backward alone": goal(
                ratio(steps, OURS, FLOOR), at_most=1.1
            ),
            "the same with a mask": goal(ratio(steps, OURS_MASKED, FLOOR), at_most=1.1),
        },
    }


def _peak(way: str) -> tuple[float, float]:
    """Megabytes of a step at its peak, above what was there before, and of the whole process."""
    torch.set_num_threads(1)
    setting = text_tower()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # The peak is counted from here.
    before = resident()
    WAYS[way](setting)
    peak = resident("VmHWM")
    return peak - before, peak


def measure_workers(repeats: int, quick: bool) -> Results:
    """Seconds that more records add to an audit's model half, with one process and with two.

    The difference of two sizes leaves out what does not grow: starting, loading the model.
    """
    sizes = (128, 512) if quick else (512, 2560)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tiny_llava(work / "model", map(_text, range(100)))
        for size in sizes:
            _write_records(work / f"suspects-{size}", range(0, size, 2))
            _write_records(work / f"controls-{size}", range(1, size, 2))
        for turn in range(repeats):
            for workers in (1, 2):
                few, many = (_audit(work, size, workers, turn) for size in sizes)
                found.setdefault(str(workers), []).append(many - few)
    return {
        "records": list(sizes),
        "signals": "loss, grad_norm, gradaudit",
        "what": f"seconds of the stages {' and '.join(SPLIT)}, the larger size less the smaller",
        "seconds": {name: spread(each) for name, each in found.items()},
        "goals": {
            "one process / two": goal(ratio(found, "1", "2"), at_least=1.8),
        },
    }


class Stages(Silent):
    """Keeps how long each stage of an audit took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Time a stage."""
        started = time.perf_counter()
        with super().stage(name, total) as advance:
            yield advance
        self.seconds[name] = time.perf_counter() - started


def _audit(work: Path, size: int, workers: int, turn: int) -> float:
    stages = Stages()
    lightleak.audit(
        target=work / "model",
        suspect=work / f"suspects-{size}" / "records.jsonl",
        control=work / f"controls-{size}" / "records.jsonl",
        out=work / f"run-{size}-{workers}-{turn}",
        signals=("loss", "grad_norm", "gradaudit"),
        negative_controls=False,
        workers=workers,
        executor="local",
        progress=stages,
    )
    return sum(stages.seconds[name] for name in SPLIT)


def measure_records(repeats: int, quick: bool) -> Results:
    """Time and memory from a hundred records to a hundred thousand, as an audit's parts go.

    Start-up and the first part are left out. Making an image and its text is counted. Seconds are
    of processor time. The largest number is taken once, and memory read after every tenth of it.
    """
    sizes, most = ((100, 1000), 2000) if quick else ((100, 1000, 10_000), 100_000)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tiny_llava(work / "model", map(_text, range(100)))
        target = targets.load(work / "model", device="cpu")
        engine = GradientEngine(target, select(target))
        sums, ids = collect.sum_gradients(target, engine, [_record(i) for i in range(128)])
        unreached = set(engine.selection.shapes) - sums.keys()
        engine = GradientEngine(target, engine.selection.without(unreached))
        references = {name: each[None] / len(ids) for name, each in sums.items()}
        norms = partial(_take, target, engine, None, work)
        slices = partial(_take, target, engine, references, work)
        ways = {
            (name, n): partial(take, n)
            for name, take in (("norms", norms), ("slices", slices))
            for n in sizes
            if name == "norms" or n <= 1000
        }
        norms(128), slices(128)
        found = in_turns(ways, repeats, time.process_time, warm=True)
        started = time.process_time()
        residents = norms(most)
        seconds = {n: spread(found["norms", n]) for n in sizes}
        seconds[most] = spread([time.process_time() - started])
        with_slices = {n: spread(found["slices", n]) for n in sizes if n <= 1000}
    return {
        "model": "the lab's tiny LLaVA, 1.4 million parameters",
        "seconds, loss and gradient norms": seconds,
        "seconds, with slices against one reference": with_slices,
        "slope with slices": slope(with_slices),
        "resident megabytes, ten times on the way": residents,
        "goals": {
            "time against records, log-log slope": goal(
                slope(seconds), at_least=0.97, at_most=1.03
            ),
            "memory after all records / after a tenth": goal(
                residents[-1] / residents[0], at_most=1.03
            ),
        },
    }


def slope(seconds: Mapping[int, Results]) -> float:
    """Least squares of log time on log number."""
    medians = [each["median"] for each in seconds.values()]
    return float(np.polyfit(np.log(list(seconds)), np.log(medians), 1)[0])


def part_of(n: int, bytes_a_record: int = 0) -> int:
    """Records of one part, as an audit cuts n small ones."""
    return int(min(2048, max(32, n / 16), 256e6 // max(1, bytes_a_record)))


def _take(
    target: Target,
    engine: GradientEngine,
    references: Mapping[str, Tensor] | None,
    work: Path,
    n: int,
) -> list[float]:
    """Measure n records and write the parts; resident megabytes after each tenth of them."""
    residents: list[float] = []
    size = part_of(n)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        store = EvidenceStore.claim(Path(folder), {})
        for index, start in enumerate(range(0, n, size)):
            chosen = [_record(i) for i in range(start, min(start + size, n))]
            inside = None if references is None else {each.id: [False] for each in chosen}
            measured = collect.measure(
                target,
                engine,
                AnswerReader(),
                chosen,
                references=references,
                in_reference=inside,
                keep_slices=references is not None,
            )
            store.put("part", index, measured.table)
            if (start + len(chosen)) * 10 // n > len(residents):
                residents.append(resident())
    return residents


def _text(i: int) -> str:
    things = ("kettle", "kite", "drum", "lamp", "boat", "clock", "chair", "apple")
    colours = ("red", "teal", "ochre", "grey", "violet")
    return f"a {colours[i % 5]} {things[i % 8]} beside number {i} on a {colours[i // 5 % 5]} table."


def _record(i: int) -> Record:
    """Record i, made from its number alone."""
    pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return Record(f"r{i}", file.getvalue(), _text(i))


def _write_records(folder: Path, numbers: range) -> None:
    folder.mkdir()
    lines = []
    for record in map(_record, numbers):
        (folder / f"{record.id}.png").write_bytes(record.image)
        line = {"id": record.id, "image": f"{record.id}.png", "text": record.text}
        lines.append(json.dumps(line))
    (folder / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")


def measure_signals(repeats: int, quick: bool) -> Results:
    """What one pass for every signal costs beside what the model does anyway, and a pass for each.

    Signals that compare models take such a pass at each of them. Images are decoded beforehand.
    """
    count = 32 if quick else 64
    records = [_record(i) for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        tiny_llava(Path(folder) / "model", map(_text, range(100)))
        target = targets.load(Path(folder) / "model", device="cpu")
    encoded = collect.encode(target, records).records
    reader = AnswerReader(("description",))
    setting = Setting.of(target.model, encoded, "all", "language_model")
    rows = 0

    def counted(module: nn.Module, given: tuple[Tensor, ...], named: Mapping[str, Any]) -> None:
        nonlocal rows
        del module, given
        rows += len(named["input_ids"])

    def forward(*, read: bool) -> None:
        with torch.no_grad():
            outputs = setting.target.outputs(setting.batch)
            if read:
                reader.rows(records, encoded, outputs)
            else:
                outputs.likelihoods()

    def everything() -> None:
        reader.rows(records, encoded, ours(setting).outputs)

    def one_by_one() -> None:
        for name in ONE_FORWARD:
            forward(read="renyi" in name or name == "maxprobgap")
        with_weights(setting)  # grad_norm
        ours(setting)  # gradaudit

    alone, read, step = "loss alone", "all token statistics", WEIGHTS
    together, each = "all white-box signals", "a pass for each"
    ways = {
        alone: partial(forward, read=False),
        read: partial(forward, read=True),
        step: partial(with_weights, setting),
        together: everything,
        each: one_by_one,
    }
    seconds = in_turns(ways, repeats)
    hook = target.model.register_forward_pre_hook(counted, with_kwargs=True)
    everything()
    hook.remove()
    return {
        "model": "the lab's tiny LLaVA, 1.4 million parameters; gradients of its language model",
        "records": count,
        "milliseconds a record": {name: spread(own, 1e3 / count) for name, own in seconds.items()},
        "all token statistics / loss alone": ratio(seconds, read, alone),
        "all white-box signals / forward and backward with weight gradients": ratio(
            seconds, together, step
        ),
        "goals": {
            "forwards a record for all white-box signals": goal(rows / count, at_most=1),
            "a pass for each signal / one for all": goal(
                ratio(seconds, each, together), at_least=3
            ),
        },
    }


def measure_rescore(repeats: int, quick: bool) -> Results:
    """From stored evidence to scores: reading, once for all signals, and each signal."""
    n, limit = 1_000_000, AuditSettings.model_fields["evidence_limit"].default * 1e9
    if quick:
        n, limit = n // 50, limit / 50
    given = AuditSettings(target="", suspect="", control="")
    names = [
        name
        for name in signals.names("generative")
        if signals.get(name).needs in (TokenStatistics, GradientNorms)
    ]
    # One language model's last three layers: what `last3` selects, less the vision tower.
    inner, wide = HIDDEN, INTERMEDIATE
    square, up, down = [(inner, inner)] * 4, [(wide, inner)] * 2, [(inner, wide)]
    matrices = {str(i): shape for i, shape in enumerate(3 * (square + up + down))}
    slices = sum(map(sum, matrices.values()))
    n_slices = int(limit // (4 * slices * (1 + given.folds)))
    with tempfile.TemporaryDirectory() as folder:
        run = _store(Path(folder) / "tokens", n, matrices, 0)
        measured = stored.load(run)
        ways = {name: partial(stored.score, given, measured, name) for name in names}
        seconds = in_turns(
            {"reading": partial(stored.load, run), **ways}, repeats, time.perf_counter
        )
        del measured, ways
        run = _store(Path(folder) / "slices", n_slices, matrices, slices)
        sliced = partial(stored.score, given, stored.load(run), "gradaudit")
        gradaudit = timed(sliced, time.perf_counter)
    total = {
        name: [a + b for a, b in zip(seconds["reading"], seconds[name], strict=True)]
        for name in names
    }
    return {
        "records": n,
        "answer tokens a record, mean": 16,
        "records a part": part_of(n),
        "seconds, reading": spread(seconds["reading"]),
        "seconds, score alone": {name: spread(seconds[name]) for name in names},
        "seconds, from disk to scores": {name: spread(each) for name, each in total.items()},
        "gradaudit from stored slices, taken once": {
            "slices a record": slices,
            "records": n_slices,
            "gigabytes": limit / 1e9,
            "seconds": gradaudit,
            "seconds for a million records, extrapolated": gradaudit / n_slices * 1e6,
        },
        "goals": {
            "a million records, seconds for the slowest signal": goal(
                max(float(np.median(each)) for each in total.values()), at_most=10
            ),
        },
    }


def _store(folder: Path, n: int, matrices: Mapping[str, tuple[int, int]], slices: int) -> Run:
    """A run's evidence of n records, drawn at random and written as an audit writes it."""
    rng = np.random.default_rng(0)
    run = Run(folder)
    run.evidence.mkdir(parents=True)
    columns = schema(AnswerReader().columns, double=False)

    def lists(counts: Any, values: Any) -> pa.Array:
        return pa.ListArray.from_arrays(
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), np.ravel(values)
        )

    most = part_of(n, 4 * slices * 3)
    for index, start in enumerate(range(0, n, most)):
        size = min(most, n - start)
        tokens = np.maximum(1, rng.poisson(16, size))
        draw = partial(rng.standard_gamma, size=tokens.sum(), dtype=np.float32)
        each = np.ones(size, dtype=np.int64)
        table = {
            "id": [f"suspect/r{i}" for i in range(start, start + size)],
            "n_tokens": tokens + 40,
            "boundary_ambiguous": np.zeros(size, dtype=bool),
            "zlib_bytes": 4 * tokens + 11,
            "logprob": lists(tokens, -2 * draw(0.5)),
            "mean": lists(tokens, -2 * draw(1.0)),
            "variance": lists(tokens, 3 * draw(1.5)),
            "matrix_norms": lists(len(matrices) * each, rng.random((size, len(matrices)), "f")),
            "slice_norms2": lists(slices * each, rng.random((size, slices), "f")),
            "slice_dots": lists(2 * slices * each, rng.random((size, 2 * slices), "f") - 0.5),
            "in_reference": lists(2 * each, rng.random((size, 2)) < 0.5),
        }
        part = pa.table([table[name] for name in columns.names], names=columns.names)
        write_table(run.evidence / f"part-{index:05d}.parquet", part.cast(columns))
    side = np.where(np.arange(n) % 2, "suspect", "control")
    about = {
        "id": [f"suspect/r{i}" for i in range(n)],
        "set": side,
        "fold": np.arange(n) // 2 % 2,
        "group": pa.nulls(n, pa.string()),
    }
    write_table(run.evidence / "records.parquet", pa.table(about))
    described = {"strategy": "last3", "matrices": matrices, "reference_sizes": [n // 4, n // 4]}
    write_json(run.evidence / "gradients.json", described)
    norms2 = pa.table({"norms2": list(rng.random((2, slices)))})
    write_table(run.evidence / "reference-norms.parquet", norms2)
    return run


def measure_gpu(repeats: int, quick: bool) -> Results:
    """Qwen2-VL at the shapes of its two billion parameters, 256 of 512 tokens from an image."""
    if not (torch.cuda.is_available() or quick):
        sys.exit("gpu: there is no CUDA device here; --tiny takes the same path on any machine")
    result: Results = {"goals": {}}
    for strategy in ("last3", "all"):
        setting = qwen2_vl(strategy, tiny=quick)
        named = (FLOOR, WEIGHTS, OURS, OURS_MASKED, PUBLIC, PUBLIC_MASKED, PUBLIC_KEPT)
        ways = {name: partial(WAYS[name], setting) for name in named}
        seconds = in_turns(ways, repeats, _device_clock)
        result[strategy] = {
            "matrices": len(setting.references),
            "batch": len(setting.batch),
            "milliseconds a record": per_record(seconds, setting),
            "records a second": len(setting.batch) / float(np.median(seconds[OURS])),
            "share of it that forward and backward take": ratio(seconds, FLOOR, OURS),
            "largest difference from the public way": differences(setting),
        }
        if torch.cuda.is_available():
            peaks = {name: _device_peak(way) for name, way in ways.items()}
            result["device"] = torch.cuda.get_device_name()
            result[strategy]["gigabytes, peak of a step"] = peaks
        faster = goal(ratio(seconds, PUBLIC, OURS), at_least=10)
        result["goals"][f"{strategy} on a device: public way / lightleak"] = faster
    return result


def qwen2_vl(strategy: str, *, tiny: bool) -> Setting:
    """Qwen2-VL from its configuration; records are made below the processor."""
    side, tokens, answer, batch = (4, 32, 8, 2) if tiny else (32, 512, 128, 16)
    begin, end, image, video, vocabulary = 151652, 151653, 151655, 151656, 151936
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    }
    vision = {"hidden_size": 1536}
    if tiny:
        shapes = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 4}
        text |= {**shapes, "num_attention_heads": 2}
        vision = {"hidden_size": 256, "depth": 4, "embed_dim": 32, "num_heads": 2}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=begin,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = AutoModelForImageTextToText.from_config(
            config, dtype=torch.float32 if tiny else torch.bfloat16
        )
    merged = side * side // 4
    along = frozenset(("input_ids", "attention_mask", "mm_token_type_ids"))

    def record(i: int) -> EncodedRecord:
        words = torch.randint(0, begin, (tokens - merged - 2,)).tolist()
        ids = torch.tensor([[begin, *[image] * merged, end, *words]])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == image).long(),
            "pixel_values": torch.randn(side * side, 3 * 2 * 14 * 14, dtype=model.dtype),
            "image_grid_thw": torch.tensor([[1, side, side]]),
        }
        return EncodedRecord(f"r{i}", inputs, along, tokens, answer_start=tokens - answer)

    return Setting.of(model, [record(i) for i in range(batch)], strategy)


def _device_clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _device_peak(way: Callable[[], object]) -> float:
    """Gigabytes on the device at the peak of a step, above what lay there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    way()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


PARTS: dict[str, Callable[[int, bool], Results]] = {
    "kernels": measure_kernels,
    "memory": measure_memory,
    "workers": measure_workers,
    "records": measure_records,
    "signals": measure_signals,
    "rescore": measure_rescore,
    "gpu": measure_gpu,
}


# -- measuring -----------------------------------------------------------------------------------


def in_turns(
    ways: Mapping[Any, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.process_time,
    *,
    warm: bool = False,
) -> dict[Any, list[float]]:
    """Seconds of each way, once each in every turn, after one call that is not counted.

    Ways that are `warm` have had that call.
    """
    for way in () if warm else ways.values():
        way()
    seconds: dict[Any, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds[name].append(timed(way, clock))
    return seconds


def timed(way: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call."""
    started = clock()
    way()
    return clock() - started


def spread(values: Sequence[float], scale: float = 1.0) -> Results:
    """Median, least and most."""
    scaled = scale * np.array(values)
    found = {"median": np.median(scaled), "min": scaled.min(), "max": scaled.max()}
    return {name: float(each) for name, each in found.items()}


def ratio(values: Mapping[str, Sequence[float]], of: str, to: str) -> float:
    """Median over the turns of one way's value by another's."""
    return float(np.median(np.array(values[of]) / np.array(values[to])))


def goal(
    measured: float, *, at_least: float | None = None, at_most: float | None = None
) -> Results:
    """A goal, what was measured, and whether it is met."""
    bounds = {"at least": at_least, "at most": at_most}
    met = (at_least is None or measured >= at_least) and (at_most is None or measured <= at_most)
    stated = {name: bound for name, bound in bounds.items() if bound is not None}
    return {**stated, "measured": measured, "met": met}


def resident(field: str = "VmRSS") -> float:
    """Megabytes that this process holds, or with `VmHWM` held at most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return int(found[field].split()[0]) / 1e3


def machine() -> Results:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads a process": torch.get_num_threads(),
    }


# -- showing -------------------------------------------------------------------------------------


def table(results: Mapping[str, Results]) -> str:
    """Goal, measured, met: one line a goal."""
    lines = []
    for part, found in results.items():
        for name, each in found["goals"].items():
            bounds = ", ".join(f"{k} {each[k]:g}" for k in ("at least", "at most") if k in each)
            met = "met" if each["met"] else "NOT MET"
            lines.append(f"{part:8} {name:62} {bounds:24} {each['measured']:8.3f}  {met}")
    return "\n".join(lines)


def picture(kernels_part: Results) -> None:
    """Time per record of each way beside the plain batched step, and where the goals are."""
    milliseconds = kernels_part["milliseconds a record"]
    one = milliseconds[FLOOR]["median"]
    bars = {name: each["median"] / one for name, each in milliseconds.items()}
    limits = {
        OURS: 1.25 * bars[WEIGHTS],
        OURS_MASKED: bars[WEIGHTS],
        PUBLIC: 3 * bars[OURS],
        PUBLIC_MASKED: 4 * bars[OURS_MASKED],
    }
    names = sorted(bars, key=bars.__getitem__, reverse=True)
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.subplots()
    own = {OURS, OURS_TWO, OURS_MASKED}
    colours = ["#0b5c94" if name in own else "#c3c9d1" for name in names]
    axes.barh(names, [bars[name] for name in names], color=colours, height=0.66)
    for y, name in enumerate(names):
        words = f"{bars[name]:.1f} ×   {milliseconds[name]['median']:.0f} ms"
        beyond = max(bars[name], limits.get(name, 0))
        axes.annotate(words, (beyond, y), (6, 0), textcoords="offset points", va="center", size=9)
    for name, limit in limits.items():
        y = names.index(name)
        axes.plot([limit, limit], [y - 0.44, y + 0.44], color="#b45309", lw=2)
    axes.plot([], [], color="#b45309", lw=2, label="goal: lightleak left of it, public way right")
    axes.axvline(1, color="#4a5361", lw=1, ls=(0, (4, 3)))
    axes.set_xlim(0, 1.2 * max(*bars.values(), *limits.values()))
    axes.set_xlabel("time a record; 1 = forward and backward alone")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110, metadata={"Software": None})


def main() -> None:
    """Measure the parts that are asked for, and set all that is known against the goals."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS)[:-1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--quick", "--tiny", action="store_true", help="small sizes; writes nothing"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = read_json(RESULTS) if RESULTS.is_file() and not given.quick else {}
    for part in given.part:
        before = os.getloadavg()[0]
        found = PARTS[part](given.repeats, given.quick)
        load = {"load average before and after": [before, os.getloadavg()[0]]}
        results[part] = {"machine": machine() | load, "repeats": given.repeats} | found
        if given.quick:
            print(json.dumps(results[part], indent=1))
        else:
            write_json(RESULTS, {name: results[name] for name in PARTS if name in results})
            if part == "kernels":
                picture(found)
    print(table(results))


if __name__ == "__main__":
    main()
