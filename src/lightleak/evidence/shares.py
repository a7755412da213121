"""Shares: how much of each record's gradient is in what fine-tuning changed.

Fine-tuning adds up gradients, so Δ = θ_target − θ_base is nearly −Σ_i share_i g_i over its records.
With g_i at one model, K_ij = ⟨g_i, g_j⟩ and b_i = −⟨g_i, Δ⟩ over the chosen matrices, all records
are solved for together, and none of them by what it is said to be: shuffled records have their
shares shuffled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor

from lightleak.evidence import collect
from lightleak.evidence.collect import BatchSize
from lightleak.evidence.gradients import GradientEngine, Selection, select
from lightleak.evidence.gradients.forms import Gradients, Lookups, Products
from lightleak.evidence.readings import Floats
from lightleak.records import Failure, Record
from lightleak.targets import Batch, Change, DualEncoderTarget, Target

# Gradients are read at θ_base + way · Δ.
POINTS = {"base": 0.0, "middle": 0.5, "end": 1.0}
# λ, chosen on other seeds than those reported (docs/research/signature.md).
RIDGE = 0.1


@dataclass(frozen=True)
class Kernel:
    """Gradients of n records against each other and against what training changed.

    Attributes:
        groups: the g groups of matrices.
        gram: (g, n, n) K of each.
        against: (g, n) b.
        square: (g,) ‖Δ‖².
    """

    groups: tuple[str, ...]
    gram: Floats
    against: Floats
    square: Floats

    def readings(self) -> dict[str, Floats]:
        """Of each record (n,), for every group and for all together: `share`; `error`, the log of
        its standard error but for a factor; `certain`, share over error; `along`, the cosine of
        what lowers the record's loss with the change, b_i / (√K_ii ‖Δ‖). None where nothing changed
        or no record has a gradient."""
        found: dict[str, Floats] = {}
        alone = [[one] for one in range(len(self.groups))]
        together = [list(range(len(alone)))] if len(alone) > 1 else []
        for own in alone + together:
            gram, against = self.gram[own].sum(axis=0), self.against[own].sum(axis=0)
            lengths = np.sqrt(np.diag(gram) * self.square[own].sum())
            if not lengths.any():
                continue
            share, error = shares(gram, against)
            along = np.divide(against, lengths, out=np.full(len(gram), np.nan), where=lengths > 0)
            named = {"share": share, "error": np.log(error), "certain": share / error}
            of = "+".join(self.groups[one] for one in own)
            found |= {f"{word} {of}": values for word, values in (named | {"along": along}).items()}
        return found


def shares(gram: Floats, against: Floats, ridge: float = RIDGE) -> tuple[Floats, Floats]:
    """A b and √diag A, with A = (K + λ (I − 11ᵀ/n))⁻¹; K and b are divided by tr K / n.

    The ridge draws shares to their mean, not to nought.

    Args:
        gram: (n, n) K.
        against: (n,) b.
        ridge: λ.
    """
    n, scale = len(gram), np.trace(gram) / len(gram)
    gram = (gram + gram.T).astype(np.float64) / (2 * scale) - ridge / n
    gram[np.diag_indices(n)] += ridge
    inverse = cho_solve(cho_factor(gram, lower=True), np.eye(n))
    return inverse @ (against / scale), np.sqrt(np.diag(inverse))


# -- by the model -----------------------------------------------------------------------------


def chosen(change: Change) -> dict[str, tuple[str, ...]]:
    """Matrices that changed, by group: `head` (of the output), `embedding` (of tokens), `inner`.

    The inner ones count where an adapter that only adds BA to linear layers changed them, or where
    nothing else changed.
    """
    ends = _ends(change.tuned)
    groups: dict[str, list[str]] = {}
    for name in change.matrices:
        group = next((end for end, path in ends.items() if name.startswith(path)), "inner")
        groups.setdefault(group, []).append(name)
    if len(groups) > 1 and not change.tuned.has_adapter:
        groups.pop("inner", None)
    return {group: tuple(names) for group, names in groups.items()}


def _ends(target: Target) -> dict[str, str]:
    """What the names of parameters begin with at either end of a language model."""
    if isinstance(target, DualEncoderTarget):
        return {}
    plain = target.plain
    modules = {"head": plain.get_output_embeddings(), "embedding": plain.get_input_embeddings()}
    return {
        end: f"{name}."
        for end, own in modules.items()
        for name, module in target.model.named_modules()
        if module is own
    }


def selection_of(target: Target, names: Collection[str]) -> Selection:
    """What reads the gradient at some matrices."""
    whole = select(target, "lora" if target.has_adapter else "everything")
    return whole.without(whole.shapes.keys() - set(names))


def record_gradients(
    engine: GradientEngine,
    records: Sequence[Record],
    size: BatchSize,
    dtype: torch.dtype,
    progress: collect.Progress | None = None,
) -> tuple[tuple[str, ...], dict[str, Tensor], tuple[Failure, ...]]:
    """Each record's gradient, whole.

    Returns:
        The n ids that have one, in the records' order; name → (n, out · in), on the CPU; and the
        records that gave none.
    """
    target = engine.target
    place = {record.id: row for row, record in enumerate(records)}
    found = {
        name: torch.zeros(len(records), int(np.prod(shape)), dtype=dtype)
        for name, shape in engine.selection.shapes.items()
    }
    done = np.zeros(len(records), bool)

    def one(batch: Batch) -> None:
        rows = [place[key] for key in batch.ids]
        sums = torch.zeros(len(batch), dtype=target.wide, device=target.device)

        def consume(name: str, gradients: Gradients) -> None:
            for i, gradient in enumerate(_each(gradients)):
                found[name][rows[i]] = gradient.flatten().to("cpu", dtype)
                sums[i] += gradient.abs().max()

        engine.step(batch, consume)
        if not bool(torch.isfinite(sums).all()):
            raise FloatingPointError("its gradient is not finite")
        done[rows] = True

    failures: list[Failure] = []
    for encoded in collect.windows(target, records):
        batches = collect.plan(encoded.records, size)
        failures += [*encoded.failures, *collect.run(target, batches, one, progress)]
    there = torch.from_numpy(done)
    ids = tuple(record.id for record, each in zip(records, done, strict=True) if each)
    return ids, {name: each[there] for name, each in found.items()}, tuple(failures)


def _each(gradients: Gradients) -> Iterator[Tensor]:
    """The gradients (out, in) of one record after another: those of all may not fit in memory."""
    if isinstance(gradients, Products):
        wide = gradients.wide
        for inputs, grads in zip(gradients.inputs, gradients.grads, strict=True):
            yield grads.to(wide).T @ inputs.to(wide)
    elif isinstance(gradients, Lookups):
        for values, ids in zip(gradients.values, gradients.ids, strict=True):
            yield Lookups(values[None], ids[None], gradients.out).total()
    else:
        yield gradients.total()  # Such go one record at a time.
