"""Figures as SVG, written by hand: the same numbers give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")
GREY = "#8a8a8a"
WIDTH, LINE, LEFT, RIGHT = 760, 26, 250, 90
_TICK_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Bar:
    """A value with its interval.

    Attributes:
        grey: drawn in grey, for what others are compared with.
    """

    label: str
    value: float
    low: float
    high: float
    grey: bool = False


def intervals(bars: Sequence[Bar], axis: str) -> str:
    """Values with their intervals, one a line, on an axis that shows 0.

    Args:
        axis: what the numbers are.
    """
    shown = [bar for bar in bars if math.isfinite(bar.value)]
    ends = [e for bar in shown for e in (bar.value, bar.low, bar.high) if math.isfinite(e)]
    low, high = _padded(min([0.0, *ends]), max([0.0, *ends]))
    height = LINE * len(shown) + 56
    span = WIDTH - LEFT - RIGHT

    def x(value: float) -> float:
        return LEFT + span * (value - low) / (high - low)

    parts = _grid(_ticks(low, high), x, 8, height - 44)
    parts.append(f'<line x1="{x(0):.1f}" y1="8" x2="{x(0):.1f}" y2="{height - 44}" stroke="#444"/>')
    for place, bar in enumerate(shown):
        y = 8 + LINE * place + LINE / 2
        colour = GREY if bar.grey else COLOURS[0]
        left, right = sorted((x(0), x(bar.value)))
        parts.append(_text(LEFT - 8, y + 4, bar.label, "end"))
        parts.append(
            f'<rect x="{left:.1f}" y="{y - 8:.1f}" width="{right - left:.1f}" height="16" fill="{colour}" '
            'fill-opacity="0.55"/>'
        )
        if math.isfinite(bar.low) and math.isfinite(bar.high):
            parts.append(
                f'<line x1="{x(bar.low):.1f}" y1="{y:.1f}" x2="{x(bar.high):.1f}" y2="{y:.1f}" '
                'stroke="#222" stroke-width="1.5"/>'
            )
        parts.append(_text(WIDTH - RIGHT + 10, y + 4, number(bar.value)))
    parts.append(_text(LEFT + span / 2, height - 8, axis, "middle"))
    return _svg(WIDTH, height, parts)


@dataclass(frozen=True)
class Series:
    """Points joined by a line, each with an interval where one is given.

    Attributes:
        x, y: [points].
        low, high: [points], or empty.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    grey: bool = False


def lines(series: Sequence[Series], across: str, up: str, zero: bool = True) -> str:
    """Curves on common axes, with a legend.

    Args:
        zero: the upward axis shows 0.
    """
    height, top, bottom, left, right = 380, 12, 330, 70, 520
    xs = [v for s in series for v in s.x]
    ys = [v for s in series for v in (*s.y, *s.low, *s.high) if math.isfinite(v)]
    x_low, x_high = _padded(min(xs, default=0.0), max(xs, default=1.0))
    y_low, y_high = _padded(min([0.0] * zero + ys, default=0.0), max([0.0] * zero + ys, default=1.0))

    def x(value: float) -> float:
        return left + (right - left) * (value - x_low) / (x_high - x_low)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - y_low) / (y_high - y_low)

    parts = _grid(_ticks(x_low, x_high), x, top, bottom)
    for tick in _ticks(y_low, y_high):
        parts.append(f'<line x1="{left}" y1="{y(tick):.1f}" x2="{right}" y2="{y(tick):.1f}" stroke="#ddd"/>')
        parts.append(_text(left - 6, y(tick) + 4, number(tick), "end"))
    colours = iter(COLOURS * (1 + len(series) // len(COLOURS)))
    for place, s in enumerate(series):
        colour = GREY if s.grey else next(colours)
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(s.x, s.y, strict=True) if math.isfinite(b))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(s.x) < 20:
            for a, b in zip(s.x, s.y, strict=True):
                if math.isfinite(b):
                    parts.append(f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5" fill="{colour}"/>')
        for a, lowest, highest in zip(s.x, s.low, s.high, strict=False):
            if math.isfinite(lowest) and math.isfinite(highest):
                parts.append(
                    f'<line x1="{x(a):.1f}" y1="{y(lowest):.1f}" x2="{x(a):.1f}" y2="{y(highest):.1f}" '
                    f'stroke="{colour}" stroke-opacity="0.5"/>'
                )
        parts.append(f'<rect x="540" y="{top + 22 * place}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(558, top + 10 + 22 * place, s.label))
    parts.append(_text((left + right) / 2, height - 8, across, "middle"))
    parts.append(
        f'<text x="16" y="{(top + bottom) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 16 {(top + bottom) / 2})">{escape(up)}</text>'
    )
    return _svg(WIDTH, max(height, top + 22 * len(series)), parts)


def matrix(names: Sequence[str], values: np.ndarray) -> str:
    """A square of numbers from −1 to 1: blue above 0, red below.

    Args:
        values: [names, names].
    """
    cell, top = 58, 24
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    marks = [letters[i % 26] + (str(i // 26) if i >= 26 else "") for i in range(len(names))]
    parts = []
    for i, name in enumerate(names):
        parts.append(_text(LEFT - 8, top + cell * i + cell / 2 + 4, f"{name}  {marks[i]}", "end"))
        parts.append(_text(LEFT + cell * i + cell / 2, top - 8, marks[i], "middle"))
        for j in range(len(names)):
            value = float(values[i, j])
            share = min(abs(value), 1.0) if math.isfinite(value) else 0.0
            colour = "#4269d0" if value >= 0 else "#ff725c"
            parts.append(
                f'<rect x="{LEFT + cell * j}" y="{top + cell * i}" width="{cell}" height="{cell}" '
                f'fill="{colour}" fill-opacity="{share:.2f}" stroke="#fff"/>'
            )
            told = f"{value:.2f}".replace("-", "−") if math.isfinite(value) else "–"
            middle = (LEFT + cell * j + cell / 2, top + cell * i + cell / 2 + 4)
            parts.append(_text(*middle, told, "middle", "#fff" if share > 0.7 else "#222"))
    return _svg(max(WIDTH, LEFT + cell * len(names) + 10), top + cell * len(names) + 10, parts)


def number(value: float) -> str:
    """Three significant digits, with a true minus sign."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.3g}".replace("-", "−") if value else "0"


def _padded(low: float, high: float) -> tuple[float, float]:
    if low == high:
        return low - 1.0, high + 1.0
    more = 0.04 * (high - low)
    return low - more, high + more


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * s for s in _TICK_STEPS if size * s >= rough)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def _grid(ticks: Sequence[float], x, top: float, bottom: float) -> list[str]:
    parts = []
    for tick in ticks:
        parts.append(f'<line x1="{x(tick):.1f}" y1="{top}" x2="{x(tick):.1f}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(_text(x(tick), bottom + 16, number(tick), "middle"))
    return parts


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13" fill="#222">\n'
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n{body}\n</svg>\n'
    )
