"""Drawings of a comparison: a block for each signal, the primary one first, with a row an audit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup

from lightleak.report.comparison.contents import Audit, by_signal
from lightleak.report.comparison.words import auc as auc_words
from lightleak.report.comparison.words import share, whole
from lightleak.report.drawing import CONTROL, FAINT, INK, SUSPECT, canvas
from lightleak.validity.verdict import Range

NAME = 22
BLIND = "without the model"
# What a block's heading and the gap below it take, in rows.
HEAD, GAP = 1.1, 0.6
ROW_INCHES, AXIS_INCHES = 0.17, 0.6
OPEN_END = 0.985
PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 1}


@dataclass(frozen=True)
class _Row:
    """One audit in a block.

    Attributes:
        label: its name.
        draw: draws it on given axes at a given height.
        number: what stands at its end.
        sentence: the same with its interval, for those who cannot see it.
    """

    label: str
    draw: Callable[[Any, float], None]
    number: str
    sentence: str


def prevalence(audits: Sequence[Audit]) -> Markup:
    """The share of the suspects that was used: estimated, or only bounded from below."""
    blocks = {
        _head(name, audits): [_share(each, name) for each in own] for name, own in by_signal(audits)
    }

    def scale(axes: Any) -> None:
        axes.set_xlim(-0.02, 1.02)
        axes.xaxis.set_major_formatter(lambda part, _: f"{100 * part:g} %")
        axes.set_xlabel("share of the suspects that was used")

    return _drawing("prevalence", "Share used", blocks, scale)


def auc(audits: Sequence[Audit]) -> Markup:
    """How well suspects and controls are told apart: by every signal, and without the model."""
    blocks: dict[str, list[_Row]] = {}
    for name, own in by_signal(audits):
        blocks[_head(name, audits)] = [_auc(each, name) for each in own]
        blocks.setdefault(BLIND, [_auc(each, None) for each in audits])  # Next to the primary.

    def scale(axes: Any) -> None:
        axes.axvline(0.5, color=CONTROL, lw=1, ls=(0, (4, 3)), zorder=0)
        axes.set_xlim(min(0.44, axes.dataLim.x0 - 0.02), 1.01)
        axes.set_xlabel("AUC, with 95 % interval")

    return _drawing("auc", "AUC", blocks, scale)


def _head(signal: str, audits: Sequence[Audit]) -> str:
    is_primary = any(signal == audit.verdict.primary.signal for audit in audits)
    return f"{signal} (primary)" if is_primary else signal


def _share(audit: Audit, signal: str) -> _Row:
    found = audit.verdict.signals[signal].prevalence
    words, colour = share(audit.verdict, signal), _colour(audit, signal)
    if found is None:
        return _Row(audit.label, partial(_draw_words, x=0.0, words=words), "", words)
    if found.estimate is None:
        draw = partial(_draw_bound, low=found.ci95[0], colour=colour)
        return _Row(audit.label, draw, f"≥ {whole(found.ci95[0])}", words)
    told = found.ci95 != (0.0, 1.0)  # Else the estimate is only the middle between them.
    value = found.estimate if told else None
    draw = partial(_draw_estimate, value=value, interval=found.ci95, colour=colour)
    return _Row(audit.label, draw, whole(found.estimate) if told else "–", words)


def _auc(audit: Audit, signal: str | None) -> _Row:
    """Of a signal, or of classifiers that never met the model."""
    if signal is None:
        validity, colour, marker = audit.verdict.validity, CONTROL, "s"
        value, interval = validity.blind_auc, validity.blind_auc_ci95
    else:
        finding, colour, marker = audit.verdict.signals[signal], _colour(audit, signal), "D"
        value, interval = finding.auc, finding.auc_ci95
    words = auc_words(value, interval)
    if value is None or interval is None:
        return _Row(audit.label, partial(_draw_words, x=0.51, words=words), "", words)
    draw = partial(_draw_estimate, value=value, interval=interval, colour=colour, marker=marker)
    return _Row(audit.label, draw, f"{value:.3f}", words)


def _colour(audit: Audit, signal: str) -> str:
    return SUSPECT if signal == audit.verdict.primary.signal else INK


def _draw_estimate(
    axes: Any, y: float, *, value: float | None, interval: Range, colour: str, marker: str = "D"
) -> None:
    axes.plot(interval, [y, y], color=colour, lw=1.8, solid_capstyle="butt")
    if value is not None:
        axes.plot([value], [y], marker=marker, color=colour, ms=4.5, clip_on=False)


def _draw_bound(axes: Any, y: float, *, low: float, colour: str) -> None:
    """A pale bar from the bound on, which ends in an arrow and in no value."""
    axes.barh(y, OPEN_END - low, left=low, height=0.58, color=colour, alpha=0.15, lw=0)
    axes.plot([OPEN_END], [y], marker=">", color=colour, alpha=0.4, ms=5, mew=0)
    axes.vlines(low, y - 0.36, y + 0.36, color=colour, lw=2)


def _draw_words(axes: Any, y: float, *, x: float, words: str) -> None:
    axes.text(x, y, words, va="center", color=CONTROL, style="italic")


def _drawing(
    name: str, title: str, blocks: dict[str, list[_Row]], scale: Callable[[Any], None]
) -> Markup:
    rows = len(blocks) * (HEAD + GAP) + sum(map(len, blocks.values()))
    said = []
    with canvas(name, AXIS_INCHES + ROW_INCHES * rows) as sheet:
        axes, y = sheet.axes, 0.0
        beside = {"transform": axes.get_yaxis_transform(), "va": "center"}
        places: dict[float, str] = {}
        for head, block in blocks.items():
            if y:
                axes.axhline(y - (1 + GAP) / 2, color=FAINT, lw=0.7)
            axes.text(0.01, y, _plain(head), weight="bold", bbox=PLAIN, **beside)
            y += HEAD
            for row in block:
                row.draw(axes, y)
                axes.text(1.02, y, row.number, color=CONTROL, **beside)
                said.append(f"{head}, {row.label}: {row.sentence}")
                places[y] = _plain(row.label)
                y += 1
            y += GAP
        scale(axes)
        axes.set_yticks(list(places), list(places.values()))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(y - GAP - 0.3, -0.7)
        return sheet.drawing(f"{title}, by signal and audit. {'; '.join(said)}.")


def _plain(name: str) -> str:
    """A name as a label: short, and dollars are no formula."""
    shown = name if len(name) <= NAME else f"{name[: NAME - 1]}…"
    return shown.replace("$", r"\$")
