"""Drawings of an identity audit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from scipy import stats

from lightleak.report.drawing import CONTROL, INK, SUSPECT, canvas
from lightleak.report.identity.contents import SETS, Spread
from lightleak.report.identity.words import CURVES
from lightleak.report.words import percent
from lightleak.validity.identity import ControlFinding

Floats = npt.NDArray[np.float64]

# Fewer p-values draw no shape.
FEWEST_P_VALUES = 5
# Name, colour, line and marker of each rule.
RULES = {
    "p_value": ("p-value", SUSPECT, "-", "D"),
    "published": ("published", INK, (0, (4, 2)), "o"),
    "majority": ("majority", CONTROL, (0, (1, 1.5)), "s"),
}


@dataclass(frozen=True)
class Scale:
    """The common axis of all people's decoys."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @staticmethod
    def over(spreads: Iterable[Spread]) -> Scale:
        """An axis that holds every true name and decoy."""
        values = [value for spread in spreads for value in (spread.true, *spread.decoys)]
        low, high = min(values), max(values)
        room = 0.02 * (high - low) or 1.0
        low, high = low - room, high + room
        ticks = MaxNLocator(5).tick_values(low, high)
        return Scale(low, high, tuple(float(tick) for tick in ticks if low <= tick <= high))

    def at(self, value: float) -> str:
        """Where a value lies, in percent of the width."""
        return f"{100 * (value - self.low) / (self.high - self.low):.2f}%"

    def between(self, low: float, high: float) -> str:
        """How wide a range is, in percent of the width."""
        return f"{100 * (high - low) / (self.high - self.low):.2f}%"


@dataclass(frozen=True)
class Null:
    """A negative control and how its p-values are spread."""

    control: ControlFinding
    drawing: Markup


def curves(rows: Sequence[Mapping[str, Any]], alpha: float) -> dict[str, Markup]:
    """For each set the share that is found from so many photos, by each rule."""
    return {
        side: _curve([row for row in rows if row["set"] == side], side, alpha)
        for side in SETS
        if any(row["set"] == side for row in rows)
    }


def _curve(rows: Sequence[Mapping[str, Any]], side: str, alpha: float) -> Markup:
    most = max(row["n_photos"] for row in rows)
    said = []
    with canvas(f"curve-{side}", 2.9) as sheet:
        axes = sheet.axes
        for rule, (name, colour, line, marker) in RULES.items():
            own = [row for row in rows if row["rule"] == rule]
            sizes, rate, sd = (np.array([r[c] for r in own]) for c in ("n_photos", "rate", "sd"))
            low, high = np.clip(rate - sd, 0, 1), np.clip(rate + sd, 0, 1)
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(sizes, rate, color=colour, ls=line, marker=marker, ms=3.5, lw=1.4, label=name)
            said.append(f"{name} {percent(rate[-1])}")
        if side == "control":
            axes.axhline(alpha, color=INK, lw=0.7, zorder=0)
        axes.set_xlim(0.5, most + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(-0.02, 1.03)
        axes.yaxis.set_major_formatter(lambda rate, _: f"{100 * rate:g} %")
        axes.set_xlabel("photos of each person")
        axes.set_ylabel("share of the people")
        axes.legend(loc="upper right" if side == "control" else "lower right")
        return sheet.drawing(f"{CURVES[side]}, with {most} photos: {', '.join(said)}.")


def nulls(found: Iterable[Floats], controls: Iterable[ControlFinding], alpha: float) -> list[Null]:
    """How the p-values of each negative control are spread, against chance."""
    return [
        Null(control, _null(control.name, p_values, alpha))
        for control, p_values in zip(controls, found, strict=True)
        if len(p_values) >= FEWEST_P_VALUES
    ]


def _null(name: str, values: Floats, alpha: float) -> Markup:
    grid = np.linspace(0, 1, 201)
    low, high = np.clip(stats.binom.interval(0.95, len(values), grid), 0, None) / len(values)
    at_most = np.searchsorted(np.sort(values), grid, side="right") / len(values)
    with canvas("-".join(["null", *re.findall(r"\w+", name)]), 2.9) as sheet:
        axes = sheet.axes
        axes.fill_between(grid, low, high, color=CONTROL, alpha=0.18, lw=0)
        axes.plot(grid, grid, color=CONTROL, lw=1, ls=(0, (4, 3)))
        axes.step(grid, at_most, where="post", color=INK, lw=1.5)
        axes.axvline(alpha, color=INK, lw=0.7, zorder=0)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.01)
        axes.set_xlabel("p-value")
        axes.set_ylabel("share with at most that")
        axes.yaxis.set_major_formatter(lambda rate, _: f"{100 * rate:g} %")
        share = percent(float((values <= alpha).mean()))
        words = f"{len(values)} p-values of {name}: {share} are at most {alpha:g}."
        return sheet.drawing(words)
