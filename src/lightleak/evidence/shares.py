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
        gram: (n, n) K.
        against: (n,) b.
        size: (1,) ‖Δ‖ over the same matrices.
    """

    gram: Floats
    against: Floats
    size: Floats

    def readings(self) -> dict[str, Floats]:
        """Of each record (n,): `share`; `error`, the log of its standard error but for a factor;
        `certain`, share over error; `along`, the cosine of what lowers the record's loss with the
        change, b_i / (√K_ii ‖Δ‖). None where nothing changed or no record has a gradient."""
        if not self.gram.any() or not self.size.any():
            return {}
        share, error = shares(self.gram, self.against)
        lengths = np.sqrt(np.diag(self.gram)) * self.size
        along = np.divide(
            self.against, lengths, out=np.full(len(lengths), np.nan), where=lengths > 0
        )
        return {"share": share, "error": np.log(error), "certain": share / error, "along": along}


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


def chosen(change: Change) -> tuple[str, ...]:
    """The output head and the token embedding where they changed; else every matrix that did."""
    changed = change.matrices
    ends = _ends(change.tuned)
    return tuple(name for name in changed if name in ends) or changed


def _ends(target: Target) -> set[str]:
    if isinstance(target, DualEncoderTarget):
        return set()
    plain = target.plain
    ends = [plain.get_input_embeddings(), plain.get_output_embeddings()]
    weights = [each.weight for each in ends if each is not None]
    return {
        f"{name}.weight"
        for name, module in plain.named_modules()
        if any(getattr(module, "weight", None) is weight for weight in weights)
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
