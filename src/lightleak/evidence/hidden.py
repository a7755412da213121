"""Hidden states: what every layer holds of a record, and whether the answer comes, in one pass.

Source: Ju et al. 2025, arXiv:2503.01208, layer-wise probing. Only the states that a probe takes
leave the pass: of the language model that of the last prompt position, of the image side the mean
over its tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightleak.evidence.collect import BatchSize, Progress, encode, plan, run
from lightleak.evidence.gradients.rows import row_counts
from lightleak.records import Failure, Record
from lightleak.targets import Answers, Batch, GenerativeTarget


@dataclass(frozen=True)
class Layer:
    """One place where the states are read.

    Attributes:
        tower: which part of the model it is in.
        index: its place in the tower; of the language model 0 is the embeddings, and i the
            output of its i-th block.
        name: the module whose output it is; of the embeddings the block whose input they are.
    """

    tower: Literal["vision", "projector", "language"]
    index: int
    name: str

    @property
    def column(self) -> str:
        """What it is called in a table, "language.3"."""
        return f"{self.tower}.{self.index}"


@dataclass(frozen=True)
class HiddenPart:
    """The states of some records, in their order.

    Attributes:
        ids: of the n records that could be read.
        states: layer's column → (n, d) float32.
        exact: (n,) whether greedy generation answers with the record's text.
        logprob: (n,) mean log-likelihood of the answer's tokens, in nats, float64.
        failures: the records that could not be read; not in the table, to be stored beside it.
    """

    ids: tuple[str, ...]
    states: Mapping[str, NDArray[np.float32]]
    exact: NDArray[np.bool_]
    logprob: NDArray[np.float64]
    failures: tuple[Failure, ...] = ()

    def table(self) -> pa.Table:
        """One row a record; each layer is a column of lists."""
        columns: dict[str, Any] = {
            "id": pa.array(self.ids, pa.string()),
            "exact": self.exact,
            "logprob": self.logprob,
        }
        for column, values in self.states.items():
            offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
            columns[column] = pa.ListArray.from_arrays(offsets, values.ravel())
        return pa.table(columns)

    @staticmethod
    def of(table: pa.Table) -> HiddenPart:
        """Back from a table, or from several put together; with the layers that it has."""
        n = table.num_rows
        states = {}
        for column in table.column_names:
            if pa.types.is_list(table.schema.field(column).type):
                values = pc.list_flatten(table[column]).to_numpy()
                states[column] = values.reshape(n, len(values) // max(n, 1))
        return HiddenPart(
            tuple(table["id"].to_pylist()),
            states,
            table["exact"].to_numpy(),
            table["logprob"].to_numpy(),
        )


def layers(target: GenerativeTarget) -> tuple[Layer, ...]:
    """All layers of vision tower, projector and language model, in the order data flows.

    A part that the model does not have, or that is not found in it, gives none.
    """
    text = target.parts.text_blocks
    # A list of modules is never called itself.
    called = [
        name
        for name in target.parts.projector
        if not isinstance(target.model.get_submodule(name), nn.ModuleList)
    ]
    return (
        *(Layer("vision", i, name) for i, name in enumerate(target.parts.vision_blocks)),
        *(Layer("projector", 0, name) for name in called[-1:]),
        *(Layer("language", i, name) for i, name in enumerate((*text[:1], *text))),
    )


def read_hidden(
    target: GenerativeTarget,
    records: Sequence[Record],
    *,
    size: BatchSize | None = None,
    progress: Progress | None = None,
) -> HiddenPart:
    """Read the states of some records: as many as fit in memory, for they are kept until the end.

    Args:
        target: the model.
        records: what to read, each with an id of its own.
        size: batch limits.
        progress: told how many records are done.
    """
    places = layers(target)
    ends = _end_tokens(target)
    alone: dict[tuple[object, str], Fraction] = {}
    found: dict[str, tuple[list[NDArray[np.float32]], bool, float]] = {}

    @torch.no_grad()
    def one(batch: Batch) -> None:
        states: dict[Layer, Tensor] = {}
        calls: Counter[Layer] = Counter()

        def seen(layer: Layer, values: Tensor) -> None:
            calls[layer] += 1
            if layer.tower == "language":
                last = [start - 1 for start, _ in batch.answers]
                states[layer] = values[range(len(batch)), last].float()
            else:
                counts = row_counts(layer.column, values, batch, alone)
                rows = torch.split(values.flatten(0, -2).to(target.wide), counts)
                states[layer] = torch.stack([each.mean(0) for each in rows]).float()

        with _watched(target.model, places, seen):
            outputs = target.outputs(batch)
        for layer in places:
            if calls[layer] != 1:
                raise ValueError(f"the pass goes through {layer.name} {calls[layer]} times")
            if not bool(states[layer].isfinite().all()):
                raise FloatingPointError(f"the state at {layer.name} is not finite")
        arrays = [states[layer].cpu().numpy() for layer in places]
        exact, logprob = _exact(outputs, ends), (-outputs.losses).tolist()
        for i, key in enumerate(batch.ids):
            found[key] = ([array[i] for array in arrays], exact[i], logprob[i])

    encoded = encode(target, records)
    failures = run(target, plan(encoded.records, size or BatchSize()), one, progress)
    ids = tuple(record.id for record in records if record.id in found)
    rows = [found[key] for key in ids]
    return HiddenPart(
        ids,
        {
            layer.column: np.array([states[i] for states, _, _ in rows], np.float32).reshape(
                len(rows), -1 if rows else 0
            )
            for i, layer in enumerate(places)
        },
        np.array([exact for _, exact, _ in rows], bool),
        np.array([logprob for _, _, logprob in rows], np.float64),
        (*encoded.failures, *failures),
    )


@contextmanager
def _watched(
    model: nn.Module, places: Sequence[Layer], seen: Callable[[Layer, Tensor], None]
) -> Iterator[None]:
    """Show `seen` what flows through each layer; every hook is removed on the way out."""

    def entered(layer: Layer, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen(layer, inputs[0] if inputs else named["hidden_states"])

    def left(layer: Layer, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        del inputs
        seen(layer, output if isinstance(output, Tensor) else output[0])

    handles = []
    try:
        for layer in places:
            module = model.get_submodule(layer.name)
            if layer.column == "language.0":
                hook = partial(entered, layer)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(partial(left, layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _end_tokens(target: GenerativeTarget) -> set[int]:
    """Ids of the tokens that end a generation."""
    configured = target.plain.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return {*several, target.processor.tokenizer.eos_token_id} - {None}


def _exact(outputs: Answers, ends: set[int]) -> list[bool]:
    """Whether each answer's tokens are all the likeliest, up to and with the one that ends it.

    If so greedy generation gives these tokens, for it meets the same prefixes; what a template
    writes behind the end token is never generated.
    """
    found = []
    for log_probabilities, tokens in zip(outputs.log_probabilities, outputs.tokens, strict=True):
        stop = next((i for i, token in enumerate(tokens.tolist(), 1) if token in ends), None)
        found.append(bool((log_probabilities.argmax(1) == tokens)[:stop].all()))
    return found
