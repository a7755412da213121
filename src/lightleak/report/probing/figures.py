"""Drawings of a probe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap

from lightleak.report.drawing import CONTROL, FAINT, INK, SUSPECT, canvas
from lightleak.report.probing.contents import TOWERS, Contents, Row, is_at
from lightleak.report.probing.words import (
    COMPARISONS,
    METHODS,
    gained,
    model,
    place,
    question,
    where,
)
from lightleak.report.words import percent, score
from lightleak.validity.probing import ConditionFinding

Cell = tuple[str, int]
Style = tuple[str, Any, str]

# Colour, line and marker, so that no two are told apart by colour alone.
STYLES: tuple[Style, ...] = (
    (SUSPECT, "-", "D"),
    ("#b4531a", (0, (5, 2)), "o"),
    ("#2a6a4b", (0, (2, 1.2)), "s"),
    ("#6b4a94", (0, (6, 2, 1, 2)), "^"),
    (INK, (0, (1, 1.2)), "v"),
)
BEFORE: Style = (CONTROL, (0, (4, 3)), "")
LOSS_TO_GAIN = LinearSegmentedColormap.from_list("gain", ["#b4531a", "#ffffff", SUSPECT], N=21)
POINTS_DRAWN = 400
TICKS = 10
NAME = 28
ENDS = ("accuracy", "low", "high")
LEAST_TURN = 0.0001


@dataclass(frozen=True)
class Flow:
    """Layers along an axis in the order that data flow, with a gap between towers."""

    cells: tuple[Cell, ...]

    @staticmethod
    def over(cells: Iterable[Cell]) -> Flow:
        """All layers that occur."""
        return Flow(tuple(sorted(set(cells), key=lambda cell: (TOWERS.index(cell[0]), cell[1]))))

    def towers(self) -> list[tuple[str, list[Cell]]]:
        """The layers of each tower."""
        return [(tower, list(cells)) for tower, cells in groupby(self.cells, lambda cell: cell[0])]

    def at(self, cell: Cell) -> int:
        """Where a layer stands."""
        before = [tower for tower, _ in self.towers()].index(cell[0])
        return self.cells.index(cell) + before

    def label(self, axes: Any) -> None:
        """Number the layers and name their towers, with a line between two towers."""
        step = -(-len(self.cells) // TICKS)
        ticks = []
        for tower, cells in self.towers():
            first, last = self.at(cells[0]), self.at(cells[-1])
            if first:
                axes.axvline(first - 1, color=FAINT, lw=0.7)
            if len(cells) > 1:
                ticks += [cell for cell in cells if cell[1] % step == 0]
            top = axes.get_xaxis_transform()
            axes.text((first + last) / 2, 1.02, tower, transform=top, ha="center", color=CONTROL)
        axes.set_xticks([self.at(cell) for cell in ticks], [str(layer) for _, layer in ticks])
        axes.set_xlim(-0.7, self.at(self.cells[-1]) + 0.7)
        axes.set_xlabel("layer, as data flow")


@dataclass(frozen=True)
class Line:
    """Values along the layers, with the ends of their intervals where they have some."""

    name: str
    style: Style
    values: Mapping[Cell, tuple[float, ...]]

    def draw(self, axes: Any, flow: Flow) -> None:
        """Draw it, broken between towers."""
        colour, line, marker = self.style
        name: str | None = _plain(self.name)
        for _, cells in flow.towers():
            own = [cell for cell in cells if cell in self.values]
            if not own:
                continue
            places = [flow.at(cell) for cell in own]
            values, *ends = np.array([self.values[cell] for cell in own], dtype=float).T
            if len(own) > 1 and ends:
                axes.fill_between(places, *ends, color=colour, alpha=0.13, lw=0)
            elif ends:
                axes.vlines(places, *ends, color=colour, lw=1)
            many = len(flow.cells) > 30 and len(own) > 1
            axes.plot(
                places,
                values,
                color=colour,
                ls=line,
                lw=1.4,
                marker=marker,
                ms=2 if many else 3.5,
                label=name,
            )
            name = None


def layer_curves(contents: Contents) -> list[tuple[list[ConditionFinding], Markup]]:
    """Accuracy at every layer: of the model at each rate, and of all else that was probed."""
    conditions, styles = contents.verdict.conditions, _styles(contents)
    asked = [each for each in conditions if _is_rate(each)]
    others = [each for each in conditions if not _is_rate(each)]
    if len(others) == 1:  # One control needs no figure of its own.
        asked, others = conditions, []
    least = min([0.4, *(row["low"] for row in contents.probes)]) - 0.02
    found = []
    for i, group in enumerate(filter(None, (asked, others))):
        lines = [
            Line(each.name, styles[each.name], _by_layer(contents.of(each.name), *ENDS))
            for each in group
        ]
        before = _before(contents, group)
        if before:
            lines.insert(0, Line("before fine-tuning", BEFORE, before))
        found.append((group, _accuracies(f"layers-{i}", lines, least)))
    return found


def _accuracies(name: str, lines: Sequence[Line], least: float) -> Markup:
    flow = Flow.over(cell for line in lines for cell in line.values)
    said = []
    with canvas(name, 3.5) as sheet:
        axes = sheet.axes
        axes.axhline(0.5, color=CONTROL, lw=0.8, zorder=0)
        for line in lines:
            line.draw(axes, flow)
            best = max(line.values, key=lambda cell: line.values[cell][0])
            value, *ends = line.values[best]
            interval = f" ({percent(ends[0])} to {percent(ends[1])})" if ends else ""
            said.append(f"{line.name[:NAME]} {percent(value)}{interval} in {place(*best)}")
        flow.label(axes)
        axes.set_ylim(least, 1.02)
        axes.yaxis.set_major_formatter(_as_percent)
        axes.set_ylabel("seen told from unseen")
        sheet.figure.legend(loc="outside upper left", ncols=3)
        return sheet.drawing(f"Accuracy by layer, at most: {'; '.join(said)}. Chance is 50 %.")


def _is_rate(condition: ConditionFinding) -> bool:
    """Whether it is the model as it was trained, at some rate; nought too."""
    return condition.kind == "tuned" or (condition.kind == "control" and condition.rate is not None)


def _by_layer(rows: Iterable[Row], *columns: str) -> dict[Cell, tuple[float, ...]]:
    """Means over the questions, and of the ends of their intervals.

    However the questions depend on each other, their mean varies no more than they do on average.
    """
    cells: dict[Cell, list[list[float]]] = {}
    for row in rows:
        values = [row[column] for column in columns]
        cells.setdefault((row["tower"], row["layer"]), []).append(values)
    return {cell: tuple(np.mean(values, axis=0).tolist()) for cell, values in cells.items()}


def _before(
    contents: Contents, conditions: Iterable[ConditionFinding]
) -> dict[Cell, tuple[float, ...]]:
    """The base's accuracy, as it was probed beside the first of the fine-tuned models."""
    first = next((each.name for each in conditions if each.kind == "tuned"), "")
    rows = [row for row in contents.of(first) if row["base_accuracy"] is not None]
    return _by_layer(rows, "base_accuracy")


def _styles(contents: Contents) -> dict[str, Style]:
    """One style a condition, the plainest for the highest rate."""
    ranked = sorted(
        contents.verdict.conditions, key=lambda each: (each.kind != "tuned", -(each.rate or 0))
    )
    return {each.name: STYLES[i % len(STYLES)] for i, each in enumerate(ranked)}


def gains(contents: Contents) -> list[tuple[ConditionFinding, Markup]]:
    """The gain of each fine-tuned model by layer and question, where several were asked."""
    rows = {each.name: contents.of(each.name) for each in contents.verdict.tuned}
    # A scale that follows the data alone would paint noise as deep as a trace.
    least = contents.verdict.cutoffs.detectable
    most = max([least, *(abs(row["delta"]) for own in rows.values() for row in own)])
    return [
        (each, _gain(f"gain-{i}", each, rows[each.name], most, contents.verdict.cutoffs.alpha))
        for i, each in enumerate(contents.verdict.tuned)
        if len(_questions(rows[each.name])) > 1
    ]


def _questions(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["field"] for row in rows if row["field"] != "image"))


def _gain(
    name: str, condition: ConditionFinding, rows: Sequence[Row], most: float, alpha: float
) -> Markup:
    flow = Flow.over((row["tower"], row["layer"]) for row in rows)
    fields = _questions(rows)
    values = np.full((len(fields), flow.at(flow.cells[-1]) + 1), np.nan)
    marked = []
    for row in rows:
        x = flow.at((row["tower"], row["layer"]))
        # No question is asked at the image side: its column is one cell.
        questions = [fields.index(row["field"])] if row["field"] in fields else range(len(fields))
        values[questions, x] = row["delta"]
        if row["p_value"] <= alpha:
            marked.append((x, float(np.mean(questions))))
    edges = [np.arange(size + 1) - 0.5 for size in reversed(values.shape)]
    few = len(flow.cells) <= 30
    with canvas(name, 1.3 + 0.24 * len(fields)) as sheet:
        axes = sheet.axes
        shades = axes.pcolormesh(
            *edges, values, cmap=LOSS_TO_GAIN, vmin=-most, vmax=most, ec="white", lw=0.4 * few
        )
        across, down = np.array(marked, dtype=float).reshape(-1, 2).T
        axes.plot(across, down, ls="", marker="D", ms=3.2, color=INK, mec="white", mew=0.6)
        flow.label(axes)
        axes.set_yticks(range(len(fields)), [_plain(question(field)) for field in fields])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        bar = sheet.figure.colorbar(shades, pad=0.02, aspect=12, label="gain in points")
        bar.ax.yaxis.set_major_formatter(lambda delta, _: gained(delta))
        bar.outline.set_visible(False)
        best = condition.best
        return sheet.drawing(
            f"Gain by layer and question, {condition.name[:NAME]}: {len(marked)} of {len(rows)} "
            f"stand out beyond chance; the surest, {where(best)}, by {gained(best.delta)} points."
        )


def by_seed(contents: Contents) -> Markup | None:
    """The gain where it is surest, from each seed alone; None with one seed."""
    rows: list[tuple[str, Row, Style]] = []
    for each in contents.verdict.tuned:
        own = [row for row in contents.by_seed if is_at(row, each)]
        if len(own) > 1:
            joint = next(row for row in contents.probes if is_at(row, each))
            rows.append((f"{each.name[:NAME]}, all", joint, STYLES[0]))
            rows += [(f"seed {row['seed']}", row, (INK, "-", "o")) for row in own]
    if not rows:
        return None
    said = "; ".join(
        f"{name} {gained(row['delta'])} ({gained(row['delta_low'])} to {gained(row['delta_high'])})"
        for name, row, _ in rows
    )
    with canvas("seeds", 0.8 + 0.2 * len(rows)) as sheet:
        axes = sheet.axes
        for y, (_, row, style) in enumerate(rows):
            _interval(axes, y, [row[end] for end in ("delta", "delta_low", "delta_high")], style)
        axes.axvline(0, color=CONTROL, lw=1, ls=(0, (4, 3)), zorder=0)
        _name_rows(axes, [name for name, _, _ in rows])
        axes.margins(x=0.03)
        axes.xaxis.set_major_formatter(lambda delta, _: gained(delta))
        axes.set_xlabel("gain in points, with 95 % interval")
        return sheet.drawing(f"Gain where it is surest: {said}.")


def published(contents: Contents) -> Markup | None:
    """What the published probe says of each condition beside what ours does, at the same layer."""
    rows = contents.published()
    if not rows:
        return None
    kinds = (("published", STYLES[1], "published_"), ("people held out", STYLES[0], ""))
    said = []
    with canvas("published", 1.2 + 0.36 * len(rows)) as sheet:
        axes = sheet.axes
        for y, (name, row) in enumerate(rows.items()):
            for step, (kind, style, prefix) in enumerate(kinds):
                values = [row[f"{prefix}{end}"] for end in ENDS]
                _interval(axes, y + 0.3 * step - 0.15, values, style, "" if y else kind)
                value, low, high = map(percent, values)
                said.append(f"{name[:NAME]}, {kind} {value} ({low} to {high})")
        axes.axvline(0.5, color=CONTROL, lw=1, ls=(0, (4, 3)), zorder=0)
        _name_rows(axes, list(rows))
        ends = [row[end] for row in rows.values() for end in ("low", "published_low")]
        axes.set_xlim(min(0.35, *ends) - 0.02, 1.02)
        axes.xaxis.set_major_formatter(_as_percent)
        axes.set_xlabel("accuracy, with 95 % interval")
        sheet.figure.legend(loc="outside upper left", ncols=2)
        return sheet.drawing(f"Accuracy of two probes of the same states: {'; '.join(said)}.")


def _interval(axes: Any, y: float, values: Sequence[float], style: Style, name: str = "") -> None:
    value, low, high = values
    colour, _, marker = style
    axes.plot([low, high], [y, y], color=colour, lw=1.6, solid_capstyle="butt")
    axes.plot([value], [y], ls="", marker=marker, color=colour, ms=5, label=name or None)


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(names) - 0.4, -0.6)


def projections(contents: Contents) -> dict[str, dict[str, Markup]]:
    """By condition the states of one layer in the plane, by each method."""
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in contents.projections:
        panels.setdefault(row["condition"], {}).setdefault(row["method"], []).append(row)
    return {
        condition: {
            method: _panel(f"plane-{i}-{method}", condition, method, methods[method])
            for method in METHODS
            if method in methods
        }
        for i, (condition, methods) in enumerate(panels.items())
    }


def _panel(name: str, condition: str, method: str, rows: Sequence[Row]) -> Markup:
    drawn = np.random.default_rng(0).permutation(len(rows))[:POINTS_DRAWN]
    shown = [rows[i] for i in drawn]
    with canvas(name, 2.5) as sheet:
        axes = sheet.axes
        for label, seen, colour, marker in (
            ("unseen", False, "#b4531a", "^"),
            ("seen", True, SUSPECT, "o"),
        ):
            points = [(row["x"], row["y"]) for row in shown if row["seen"] is seen]
            across, up = np.array(points, dtype=float).reshape(-1, 2).T
            axes.plot(across, up, ls="", marker=marker, ms=3.4, mfc="none", mec=colour, label=label)
        axes.margins(0.04)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=FAINT)
        sheet.figure.legend(loc="outside upper left", ncols=2)
        return sheet.drawing(
            f"{METHODS[method]} of the states of {len(shown)} images, seen and unseen, "
            f"{model(condition)[:NAME]}."
        )


def turning(contents: Contents) -> list[Markup]:
    """How far the gradient turns, by the size of the batch; and by layer, for the details."""
    if not contents.dynamics:
        return []
    return [_by_size(contents), *_turned_layers(contents.dynamics)]


def _by_size(contents: Contents) -> Markup:
    said = []
    with canvas("turning", 3.5) as sheet:
        axes = sheet.axes
        for comparison, style in zip(COMPARISONS, STYLES, strict=True):
            own = contents.turned(comparison)
            if not own:
                continue
            sizes = [row["batch_size"] for row in own]
            value, high, low = (_turned(own, end) for end in ("cosine", "low", "high"))
            colour, line, marker = style
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(
                sizes, value, color=colour, ls=line, marker=marker, ms=3.5, lw=1.4, label=comparison
            )
            said.append(f"{comparison} {score(value[0])} to {score(value[-1])}")
        axes.set_xscale("log", base=2)
        every = sorted({row["batch_size"] for row in contents.dynamics})
        axes.set_xticks(every, [str(size) for size in every])
        axes.set_xticks([], minor=True)
        axes.margins(x=0.03)
        axes.set_xlabel("images in a batch")
        _scale_turn(axes)
        sheet.figure.legend(loc="outside upper left", ncols=3)
        return sheet.drawing(
            f"How far the gradient is turned, from batches of {every[0]} to {every[-1]}: "
            f"{'; '.join(said)}."
        )


def _turned_layers(rows: Sequence[Row]) -> list[Markup]:
    own = [r for r in rows if r["comparison"] == "watermark" and _cell(r["layer"])[0] in TOWERS]
    if not own:
        return []
    every = sorted({row["batch_size"] for row in own})
    flow = Flow.over(_cell(row["layer"]) for row in own)
    with canvas("turning-layers", 3.5) as sheet:
        axes = sheet.axes
        for size, style in zip((every[0], every[-1]), STYLES, strict=False):
            at_size = [row for row in own if row["batch_size"] == size]
            ends = zip(*(_turned(at_size, end) for end in ("cosine", "high", "low")), strict=True)
            cells = (_cell(row["layer"]) for row in at_size)
            Line(f"batches of {size}", style, dict(zip(cells, ends, strict=True))).draw(axes, flow)
        flow.label(axes)
        _scale_turn(axes)
        sheet.figure.legend(loc="outside upper left", ncols=2)
        return [
            sheet.drawing(
                "How far the details turn the gradient of each layer, in batches of "
                f"{every[0]} and of {every[-1]}."
            )
        ]


def _turned(rows: Sequence[Row], end: str) -> npt.NDArray[np.float64]:
    return np.clip(1 - np.array([row[end] for row in rows], dtype=np.float64), LEAST_TURN, None)


def _scale_turn(axes: Any) -> None:
    """A logarithmic axis: what turns the gradient little and what turns it much are seen alike."""
    axes.set_yscale("log")
    axes.set_ylim(0.8 * LEAST_TURN, 2.2)
    axes.set_yticks([], minor=True)
    ticks = [LEAST_TURN, 0.001, 0.01, 0.1, 1]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylabel("turned by (1 − cosine)")


def _cell(layer: str) -> Cell:
    """ "language.3" → ("language", 3); the projector is one."""
    tower, _, index = layer.partition(".")
    return tower, int(index or 0)


def _as_percent(share: float, _: int) -> str:
    return f"{100 * share:.3g} %"


def _plain(name: str) -> str:
    """A name of the run's as a label: short, and dollars are no formula."""
    return name[:NAME].replace("$", r"\$")
