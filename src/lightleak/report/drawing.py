"""Drawing: inline SVG that needs no script, no font file and no colour vision."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

SUSPECT, CONTROL, INK, FAINT = "#0b5c94", "#6b7280", "#1c2430", "#c9ced6"
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": "#8b93a0",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.xmargin": 0.0,
    "axes.ymargin": 0.02,
    "xtick.color": "#4a5361",
    "ytick.color": "#4a5361",
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
}
INCHES = (4.6, 3.5)


class Canvas:
    """One pair of axes that ends as SVG."""

    def __init__(self, name: str, height: float) -> None:
        self.name = name
        self.figure = Figure(figsize=(INCHES[0], height), layout="constrained")
        self.axes: Any = self.figure.add_subplot()

    def drawing(self, words: str) -> Markup:
        """Freeze it; `words` say what it shows. No two figures of a page share an id."""
        stream = StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        self.figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
        svg = stream.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", svg)
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
        label = f'<svg role="img" aria-label="{escape(words)}"'
        return Markup(svg.replace("<svg", label, 1))


@contextmanager
def canvas(name: str, height: float = INCHES[1]) -> Iterator[Canvas]:
    """Axes that draw in one style."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        yield Canvas(name, height)
