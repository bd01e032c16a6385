"""Figures as SVG, drawn by Matplotlib: the same numbers give the same bytes, whatever a user's settings.

Axes have a fixed size in inches and the canvas grows around them, so no label is cut off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import cycle
from textwrap import fill
from threading import Lock
from typing import Any

import numpy as np

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")
GREY, INK = "#8a8a8a", "#222222"
WIDTH, LETTERS = 5.0, 64
"""Of the axes in inches, and of a line of words about as wide."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "concept-audit",
    "text.parse_math": False,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}
_one_at_a_time = Lock()
"""Matplotlib's settings are the whole process's, and the app draws in several threads."""


@dataclass(frozen=True)
class Bar:
    """A value with its interval, NaN where there is none; grey for what others are compared with."""

    label: str
    value: float
    low: float
    high: float
    grey: bool = False


@dataclass(frozen=True)
class Series:
    """Points joined by a line, each with an interval where `low` and `high` are given: [points] each."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    grey: bool = False


def intervals(bars: Sequence[Bar], axis: str) -> str:
    """Values with their intervals, one a line, on an axis that shows 0 and is named `axis`."""
    shown = [bar for bar in bars if math.isfinite(bar.value)]
    places = range(len(shown))

    def draw(axes: Any) -> None:
        colours = [GREY if bar.grey else COLOURS[0] for bar in shown]
        axes.barh(places, [bar.value for bar in shown], 0.62, color=colours, alpha=0.55)
        axes.hlines(places, [bar.low for bar in shown], [bar.high for bar in shown], INK, linewidth=1.5)
        for place, bar in enumerate(shown):
            axes.text(1.02, place, number(bar.value), va="center", transform=axes.get_yaxis_transform())
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(places, [bar.label for bar in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel(fill(axis, LETTERS))

    return _svg(draw, WIDTH, 0.3 * max(len(shown), 1))


def lines(series: Sequence[Series], across: str, up: str) -> str:
    """Curves on common axes named `across` and `up`, which show 0 upward, with a legend."""

    def draw(axes: Any) -> None:
        colours = cycle(COLOURS)
        for s in series:
            colour, marker = GREY if s.grey else next(colours), "o" if len(s.x) < 20 else ""
            axes.plot(s.x, s.y, color=colour, marker=marker, markersize=5, label=s.label)
            if len(s.low):
                axes.vlines(s.x, s.low, s.high, colour, alpha=0.5)
        axes.axhline(0, color=INK, linewidth=1)
        axes.grid()
        axes.set_xlabel(across)
        axes.set_title(fill(up, LETTERS), loc="left", fontsize="medium")
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.02))

    return _svg(draw, WIDTH, 3.6)


def matrix(names: Sequence[str], values: np.ndarray) -> str:
    """Numbers from −1 (red) to 1 (blue) of all pairs: [names, names]."""
    from matplotlib.colors import LinearSegmentedColormap

    def draw(axes: Any) -> None:
        colours = LinearSegmentedColormap.from_list("signed", [COLOURS[2], "#ffffff", COLOURS[0]])
        axes.pcolormesh(values, cmap=colours, vmin=-1, vmax=1, edgecolors="white")
        for (row, column), value in np.ndenumerate(values):
            text = f"{value:.2f}".replace("-", "−") if math.isfinite(value) else "–"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color="w" if value > 0.7 else INK)
        middles = np.arange(len(names)) + 0.5
        axes.set_yticks(middles, names)
        axes.set_xticks(middles, names, rotation=40, ha="left", rotation_mode="anchor")
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)
        axes.invert_yaxis()

    return _svg(draw, 0.6 * len(names), 0.6 * len(names))


def number(value: float) -> str:
    """Three significant digits, with a true minus sign."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.3g}".replace("-", "−") if value else "0"


def _svg(draw: Callable[[Any], None], width: float, height: float) -> str:
    """What `draw` puts on Matplotlib axes of this size in inches."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawn, anonymous = StringIO(), {"Date": None, "Creator": None}
    with _one_at_a_time, style.context(["default", STYLE]):
        figure = Figure((width, height))
        draw(figure.add_axes((0, 0, 1, 1)))
        FigureCanvasSVG(figure).print_figure(drawn, format="svg", bbox_inches="tight", metadata=anonymous)
    return drawn.getvalue()
