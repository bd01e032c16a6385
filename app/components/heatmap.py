"""Token heatmaps as HTML: one colour ramp for the page, text untouched, values on hover."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from backend import Heatmap, Segment

TOWARDS = (214, 96, 20)
AWAY = (70, 90, 190)
STRONGEST = 0.62
"""Opacity of the strongest colour: text keeps its contrast on it, in light and in dark."""
INVISIBLE = 0.03


@dataclass(frozen=True)
class Ramp:
    """How values become colours.

    Attributes:
        centre: the value without colour: the data's mean score for a probe, 0 for an SAE feature.
        reach: the distance from the centre that has the strongest colour.
        signed: whether values below the centre have a colour too.
    """

    centre: float
    reach: float
    signed: bool

    def colour(self, value: float) -> str | None:
        """CSS colour of a value, or None if it is too close to the centre to see."""
        distance = value - self.centre
        strength = min(abs(distance) / self.reach, 1.0) * STRONGEST if self.reach else 0.0
        if strength < INVISIBLE or (distance < 0 and not self.signed):
            return None
        red, green, blue = TOWARDS if distance > 0 else AWAY
        return f"rgba({red},{green},{blue},{strength:.2f})"


def ramp(heatmaps: Iterable[Heatmap], centre: float) -> Ramp:
    """The ramp whose strongest colour is the page's largest distance from the centre."""
    maps = list(heatmaps)
    signed = any(heatmap.signed for heatmap in maps)
    middle = centre if signed else 0.0
    values = [segment.value for heatmap in maps for turn in heatmap.turns for segment in turn]
    return Ramp(middle, max((abs(value - middle) for value in values), default=0.0), signed)


def turn_html(segments: Sequence[Segment], colours: Ramp) -> str:
    """One assistant turn with its tokens coloured."""
    return "".join(_segment(segment, colours) for segment in segments)


def text_html(text: str) -> str:
    """Plain text, safe to put into a page."""
    return html.escape(text)


def legend_html(colours: Ramp) -> str:
    """What the colours mean."""
    low, high = colours.centre - colours.reach, colours.centre + colours.reach
    away = f"rgba({','.join(map(str, AWAY))},{STRONGEST})" if colours.signed else "transparent"
    towards = f"rgba({','.join(map(str, TOWARDS))},{STRONGEST})"
    first, last = (f"{low:+.3g} away", f"{high:+.3g} towards") if colours.signed else ("0", f"{high:.3g}")
    gradient = (
        f"linear-gradient(90deg,{away},transparent,{towards})"
        if colours.signed
        else f"linear-gradient(90deg,transparent,{towards})"
    )
    return (
        '<div style="display:flex;align-items:center;gap:.5rem;font-size:.8rem;opacity:.85">'
        f"<span>{first}</span>"
        f'<span style="width:9rem;height:.7rem;border-radius:.35rem;border:1px solid rgba(128,128,128,.35);'
        f'background:{gradient}"></span>'
        f"<span>{last}</span></div>"
    )


def _segment(segment: Segment, colours: Ramp) -> str:
    if segment.end_of_turn:
        shown = '<span style="opacity:.55">■</span>'
        title = f"end of turn {segment.value:+.4g}"
    else:
        shown = html.escape(segment.text).replace("\n", '<span style="opacity:.45">↵</span>\n')
        title = f"{segment.value:+.4g}"
    colour = colours.colour(segment.value)
    if colour is None:
        return shown
    return f'<span style="background:{colour};border-radius:.2rem" title="{title}">{shown}</span>'
