"""Drawings of a membership audit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from markupsafe import Markup

from lightleak import statistics as st
from lightleak.report.drawing import CONTROL, FAINT, INK, SUSPECT, canvas
from lightleak.report.membership.contents import PrimaryScores
from lightleak.validity import Verdict

Floats = npt.NDArray[np.float64]

LABELS = {
    "text": "Texts alone",
    "image": "Images alone",
    "joint": "Texts and images",
    "trees": "The same, by trees",
}


def curve(scores: PrimaryScores, seed: int) -> st.RocCurve:
    """The ROC curve; that of scores fitted on other folds is the mean of the folds'.

    So is its band: the mean of the folds' bounds holds however the folds depend on each other,
    as in `statistics.auc_across_folds`.
    """
    curves = [
        st.roc_curve(
            part.suspect,
            part.control,
            seed=seed + fold,
            member_groups=part.suspect_groups,
            nonmember_groups=part.control_groups,
        )
        for fold, part in enumerate(scores.folds())
    ]
    tpr, low, high = (
        np.mean([getattr(each, part) for each in curves], axis=0) for part in ("tpr", "low", "high")
    )
    return st.RocCurve(curves[0].fpr, tpr, low, high)


def roc(scores: PrimaryScores, seed: int) -> list[Markup]:
    """The ROC curve with its pointwise 95 % band, on a linear and on a logarithmic axis."""
    found = curve(scores, seed)
    least = 1 / min(part.control.size for part in scores.folds())
    auc = scores.auc
    words = f"ROC curve: AUC {auc.value:.3f}, 95 % interval {auc.low:.3f} to {auc.high:.3f}"
    at_five = int(np.flatnonzero(np.isclose(found.fpr, 0.05))[0])
    low_words = (
        f"ROC curve on a logarithmic axis: at a false-positive rate of 5 % the true-positive rate "
        f"is {found.tpr[at_five]:.2f}, band {found.low[at_five]:.2f} to {found.high[at_five]:.2f}; "
        f"rates below {least:.2g} cannot be resolved"
    )
    with canvas("roc-linear") as sheet:
        _draw_curve(sheet.axes, found)
        sheet.axes.set_xlim(0, 1)
        sheet.axes.text(0.66, 0.60, "chance", color=CONTROL, ha="left", va="top")
        linear = sheet.drawing(f"{words}.")
    with canvas("roc-log") as sheet:
        _draw_curve(sheet.axes, found)
        left = min(least / 2, 0.005)
        sheet.axes.set_xscale("log")
        sheet.axes.set_xlim(left, 1)
        sheet.axes.axvspan(left, least, facecolor="#eef0f3", edgecolor=FAINT, hatch="///", lw=0)
        sheet.axes.text(
            least * 1.08, 0.99, f"◂ below 1 in {1 / least:,.0f} controls", color=CONTROL, va="top"
        )
        ticks = [rate for rate in (0.0001, 0.001, 0.01, 0.05, 0.2, 1) if rate >= left]
        sheet.axes.set_xticks(ticks, [f"{100 * rate:g} %" for rate in ticks])
        sheet.axes.set_xticks([], minor=True)
        return [linear, sheet.drawing(f"{low_words}.")]


def _draw_curve(axes: Any, found: st.RocCurve) -> None:
    axes.fill_between(
        found.fpr, found.low, found.high, step="post", color=SUSPECT, alpha=0.18, lw=0
    )
    axes.step(found.fpr, found.tpr, where="post", color=SUSPECT, lw=1.6)
    axes.plot(found.fpr, found.fpr, color=CONTROL, lw=1, ls=(0, (4, 3)))
    axes.set_ylim(0, 1.005)
    axes.set_xlabel("false-positive rate: controls accused")
    axes.set_ylabel("true-positive rate: suspects found")
    axes.xaxis.set_major_formatter(lambda rate, _: f"{100 * rate:g} %")
    axes.yaxis.set_major_formatter(lambda rate, _: f"{100 * rate:g} %")


def distributions(scores: PrimaryScores, signal: str) -> list[Markup]:
    """How the scores of suspects and controls are spread: as histograms and cumulated."""
    suspect, control = _on_one_scale(scores)
    everyone = np.concatenate([suspect, control])
    # A few far outliers must not press all others into one bar; the ends hold what lies beyond.
    low, high = np.quantile(everyone, [0.002, 0.998])
    inside = np.clip(everyone, low, high)
    edges = np.histogram_bin_edges(inside, bins=int(np.clip(np.sqrt(everyone.size), 12, 40)))
    label = f"score of {signal}"
    if not scores.comparable:
        label += ", relative to the controls of its fold"
    medians = f"median {np.median(suspect):.3g} of the suspects, {np.median(control):.3g} of the "
    medians += "controls"
    sides = (("suspects", suspect, SUSPECT, "-"), ("controls", control, INK, (0, (4, 2))))
    with canvas("histogram") as sheet:
        for name, values, colour, line in sides:
            share = np.histogram(np.clip(values, low, high), edges)[0] / values.size
            filled = name == "suspects"
            sheet.axes.stairs(
                share,
                edges,
                fill=filled,
                color=colour,
                alpha=0.35 if filled else 1,
                lw=1.3,
                ls=line,
                label=name,
            )
        sheet.axes.set_xlabel(label)
        sheet.axes.set_ylabel("share of the records")
        sheet.axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
        sheet.axes.set_ylim(0, 1.15 * sheet.axes.get_ylim()[1])
        sheet.axes.legend(loc="upper left", ncols=2)
        histogram = sheet.drawing(f"Histogram of scores: {medians}.")
    with canvas("cumulated") as sheet:
        grid = np.linspace(edges[0], edges[-1], 300)
        for name, values, colour, line in sides:
            at_most = np.searchsorted(np.sort(values), grid, side="right") / values.size
            sheet.axes.step(grid, at_most, where="post", color=colour, ls=line, lw=1.4, label=name)
        sheet.axes.set_xlabel(label)
        sheet.axes.set_ylabel("share scoring at most that")
        sheet.axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        sheet.axes.legend(loc="upper left")
        return [histogram, sheet.drawing(f"Cumulated scores: {medians}.")]


def _on_one_scale(scores: PrimaryScores) -> tuple[Floats, Floats]:
    """Suspects' and controls' scores; where folds differ in scale, told from their controls."""
    if scores.comparable:
        return scores.suspect, scores.control
    moved: list[list[Floats]] = [[], []]
    for part in scores.folds():
        low, median, high = np.quantile(part.control, [0.25, 0.5, 0.75])
        for kept, values in zip(moved, (part.suspect, part.control), strict=True):
            kept.append((values - median) / ((high - low) or 1.0))
    return np.concatenate(moved[0]), np.concatenate(moved[1])


def _label(part: str, fields: Sequence[str]) -> str:
    return f"Texts, images, {', '.join(fields)}" if part == "joint" and fields else LABELS[part]


def blind_comparison(verdict: Verdict, fields: Sequence[str] = ()) -> Markup | None:
    """What is told apart without the model beside what the primary signal tells apart."""
    rows: list[tuple[str, float, Sequence[float], bool]] = [
        (_label(part, fields), each.auc, each.auc_ci95, False)
        for part, each in verdict.validity.blind.items()
    ]
    primary = verdict.primary
    if not rows or primary.auc is None or primary.auc_ci95 is None:
        return None
    rows.append((f"The model: {primary.signal}", primary.auc, primary.auc_ci95, True))
    words = "; ".join(
        f"{label} {auc:.3f}, interval {low:.3f} to {high:.3f}"
        for label, auc, (low, high), _ in rows
    )
    with canvas("blind", 2.1) as sheet:
        axes = sheet.axes
        for row, (_, auc, (low, high), is_model) in enumerate(reversed(rows)):
            colour = SUSPECT if is_model else INK
            axes.plot([low, high], [row, row], color=colour, lw=2, solid_capstyle="butt")
            axes.plot([auc], [row], marker="D" if is_model else "o", color=colour, ms=6)
        axes.axvline(0.5, color=CONTROL, lw=1, ls=(0, (4, 3)), zorder=0)
        axes.axvline(verdict.cutoffs.blind_refuse, color=FAINT, lw=1, zorder=0)
        axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        lowest = min(0.4, *(row[2][0] for row in rows))
        axes.set_xlim(max(0.0, lowest - 0.02), 1)
        axes.set_ylim(-0.6, len(rows) - 0.3)
        axes.set_xlabel("AUC, with 95 % interval")
        return sheet.drawing(f"AUC without and with the model: {words}.")


def set_size(curve: pa.Table, alpha: float) -> Markup | None:
    """How the p-value falls with the number of suspects; None where that is not known."""
    if not curve.num_rows:
        return None
    sizes, median, low, high = (
        curve[name].to_numpy() for name in ("sizes", "p_median", "p_low", "p_high")
    )
    # Far down, the normal approximation of the test is not to be believed.
    median, low, high = (np.clip(values, st.SMALLEST_P, 1) for values in (median, low, high))
    enough = sizes[median <= alpha]
    words = (
        f"half of all draws of {enough[0]:,} suspects reach p = {alpha:g}"
        if enough.size
        else f"not half of the draws reach p = {alpha:g}, not even of all {sizes[-1]:,} suspects"
    )
    with canvas("set-size", 2.6) as sheet:
        axes = sheet.axes
        axes.fill_between(sizes, low, high, color=SUSPECT, alpha=0.18, lw=0)
        axes.plot(sizes, median, color=SUSPECT, lw=1.6)
        axes.axhline(alpha, color=CONTROL, lw=1, ls=(0, (4, 3)))
        axes.text(sizes[-1], alpha, f"p = {alpha:g} ", color=CONTROL, ha="right", va="bottom")
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = sorted({int(sizes[0]), int(sizes[len(sizes) // 2]), int(sizes[-1])})
        axes.set_xticks(ticks, [f"{each:,}" for each in ticks])
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=max(st.SMALLEST_P, 0.5 * min(low.min(), alpha)), top=1)
        axes.set_xlabel("suspects (independent ones)")
        axes.set_ylabel("p, unadjusted")
        return sheet.drawing(f"p-value by the number of suspects: {words}.")
