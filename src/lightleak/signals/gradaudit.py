"""GradAudit: gradients of what was trained on align with each other, slice by slice.

Notation: g is a record's loss gradient at one matrix, R a reference gradient (the mean over
calibration members), and a slice is a row or a column of either. Steps 4 to 6 of the method are
here; steps 1 to 3 (loss, matrices, reference) make the evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightleak.evidence.readings import Floats, GradientSlices, SliceAxis, SliceBlock
from lightleak.signals.registry import Fit, signal

Mask = Literal[
    "auto", "fixed_tau", "tau_or_topq", "tau_or_topq_union", "adaptive_keep", "quantile_topk"
]
SelfInclusion = Literal["auto", "published", "leave_one_out"]
_FEWEST_KEPT = 16
_LEAST_SHARE = 0.20


@signal(
    needs=GradientSlices,
    source="arXiv:2606.24774",
    fitted=True,
    unscorable="the mask kept no slice, or the reference is of a single record",
)
def gradaudit(
    slices: GradientSlices,
    fits: Sequence[Fit],
    *,
    matrices: Literal["auto", "last3", "all", "everything", "lora", "lora_last3"] = "auto",
    mask: Mask = "auto",
    tau: float = 0.10,
    q: float | None = None,
    self_inclusion: SelfInclusion = "auto",
) -> Floats:
    """Mean cosine with the reference gradient over the slices that tell members from others.

    `matrices` acts when the evidence is gathered. `mask` auto is the released choice:
    `quantile_topk` on an adapter, `tau_or_topq` with q = 0.9 on full weights. `self_inclusion`
    auto leaves a member out of the reference it is compared with when fits are crossed, and
    keeps it in, as published, in a split.
    """
    del matrices
    rule = choose(
        slices.lora, len(fits) > 1, mask=mask, tau=tau, q=q, self_inclusion=self_inclusion
    )
    scores = np.full(slices.n_records, np.nan)
    kept = [
        # Nothing is left of a reference of one when that one is left out.
        np.zeros(0, np.int64)
        if rule.leave_one_out and slices.reference_sizes[k] < 2
        else np.flatnonzero(sensitive(slices.axes, members.mean - nonmembers.mean, rule))
        for k, (members, nonmembers) in enumerate(cosine_sums(slices, fits, rule))
    ]
    for block in slices.blocks():
        for k, fit in enumerate(fits):
            scored = fit.scored[block.rows]
            if scored.any() and len(kept[k]):
                part = block.some(scored, kept[k])
                cosine = cosines(part, slices, k, leave_one_out=False, columns=kept[k])
                scores[part.rows] = cosine.mean(axis=1)
    return scores


@dataclass(frozen=True)
class Rule:
    """How the mask is drawn, with nothing left to be chosen.

    Attributes:
        strategy: one of the published mask strategies.
        tau, q: its threshold and its quantile.
        leave_one_out: whether a member is taken out of the reference that it is compared with.
    """

    strategy: str
    tau: float
    q: float
    leave_one_out: bool


def choose(
    lora: bool,
    crossed: bool,
    *,
    matrices: str = "auto",
    mask: Mask = "auto",
    tau: float = 0.10,
    q: float | None = None,
    self_inclusion: SelfInclusion = "auto",
) -> Rule:
    """What the options come to for an adapter or full weights, in crossed fits or a split."""
    del matrices
    strategy = ("quantile_topk" if lora else "tau_or_topq") if mask == "auto" else mask
    quantile = q if q is not None else (0.9 if strategy.startswith("tau_or_topq") else 0.8)
    left_out = self_inclusion == "leave_one_out" or (self_inclusion == "auto" and crossed)
    return Rule(strategy, tau, quantile, left_out)


def cosines(
    block: SliceBlock,
    slices: GradientSlices,
    k: int,
    *,
    leave_one_out: bool,
    columns: NDArray[np.int64] | slice = slice(None),
) -> Floats:
    """cos(g, R) for each record and slice against reference k, (b, s); 0 where undefined.

    The block may hold some `columns` of the slices only.

    With `leave_one_out` a record that is part of R meets R without itself: for n records in R,
    d = ⟨g, R⟩ and s = ‖g‖²,
    ⟨g, R₋⟩ = (n d − s)/(n − 1), ‖R₋‖² = (n²‖R‖² − 2 n d + s)/(n − 1)².
    """
    dots = block.dots[:, k].astype(np.float64)
    norms2 = block.norms2.astype(np.float64)
    own_reference2 = slices.reference_norms2[k, columns].astype(np.float64)
    reference2 = np.broadcast_to(own_reference2, dots.shape)
    n = int(slices.reference_sizes[k])
    own = block.in_reference[:, k]
    if leave_one_out and own.any():
        if n < 2:
            raise ValueError("leaving one out needs a reference of two records or more")
        reference2 = reference2.copy()
        d, s = dots[own], norms2[own]
        without = (n * n * reference2[own] - 2 * n * d + s) / (n - 1) ** 2
        dots[own] = (n * d - s) / (n - 1)
        reference2[own] = np.maximum(without, 0.0)
    length = np.sqrt(norms2 * reference2)
    cosine: Floats = np.divide(dots, length, out=np.zeros_like(dots), where=length > 0)
    return cosine


@dataclass(frozen=True)
class CosineSums:
    """Cosines summed over some records: (s,) totals and how many records they are of."""

    total: Floats
    count: int

    @property
    def mean(self) -> Floats:
        """(s,) the mean; 0 of no records."""
        return self.total / max(1, self.count)

    def __add__(self, other: CosineSums) -> CosineSums:
        return CosineSums(self.total + other.total, self.count + other.count)


def cosine_sums(
    slices: GradientSlices, fits: Sequence[Fit], rule: Rule
) -> list[tuple[CosineSums, CosineSums]]:
    """Sum every slice's cosine with each fold's reference, over its members and non-members.

    One pass over the slices, whatever the number of folds.
    """
    nothing = CosineSums(np.zeros(slices.reference_norms2.shape[1]), 0)
    sums = [[nothing, nothing] for _ in fits]
    for block in slices.blocks():
        for k, fit in enumerate(fits):
            if rule.leave_one_out and slices.reference_sizes[k] < 2:
                continue
            for side, chosen in enumerate((fit.members, fit.nonmembers)):
                part = block.some(chosen[block.rows])
                if len(part.rows):
                    cosine = cosines(part, slices, k, leave_one_out=rule.leave_one_out)
                    sums[k][side] += CosineSums(cosine.sum(axis=0), len(part.rows))
    return [(members, nonmembers) for members, nonmembers in sums]


def sensitive(axes: Sequence[SliceAxis], gaps: Floats, rule: Rule) -> NDArray[np.bool_]:
    """(s,) which slices are kept; each axis of each matrix is judged on its own.

    Args:
        axes: what the slices are.
        gaps: (s,) mean cosine of calibration members minus that of non-members.
        rule: the mask strategy.
    """
    kept = np.zeros(len(gaps), dtype=bool)
    for axis in axes:
        part = slice(axis.start, axis.stop)
        kept[part] = keep(gaps[part], rule.strategy, rule.tau, rule.q)
    return kept


def keep(gaps: Floats, strategy: str, tau: float, q: float) -> NDArray[np.bool_]:
    """Which slices of one axis of one matrix are kept, by the published strategies."""
    above = gaps > tau
    if strategy == "fixed_tau":
        return above
    if strategy == "tau_or_topq":
        return above if above.any() else gaps >= np.quantile(gaps, q)
    if strategy == "tau_or_topq_union":
        return np.asarray(above | (gaps >= np.quantile(gaps, q)))
    if strategy == "adaptive_keep":
        enough = above.mean() >= _LEAST_SHARE
        return above if enough else gaps >= np.quantile(gaps, 1 - _LEAST_SHARE)
    if strategy == "quantile_topk":
        above = gaps > np.quantile(gaps, q)
        if not above.any():
            above[np.argsort(-gaps, kind="stable")[:_FEWEST_KEPT]] = True
        return above
    raise ValueError(f"unknown mask strategy {strategy!r}")
