"""Token heatmaps as HTML: one colour ramp for the page, text untouched, values on hover.

Colours are classes of one style sheet for the page, so that a token costs few bytes.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import streamlit as st

from concept_audit import Heatmap, Segment

TOWARDS = (214, 96, 20)
AWAY = (70, 90, 190)
"""Orange and blue: told apart by people of any colour vision."""
STRONGEST = 0.62
"""Opacity of the strongest colour: text keeps its contrast on it, in light and in dark."""
LEVELS = 16
SHORT_CONTEXT = 12
"""Tokens shown on either side of the strongest, where the context is short."""
TOLD = 5


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

    def level(self, value: float) -> int:
        """How strong a value's colour is, from 0 (none) to `LEVELS`; negative for values below the centre."""
        distance = value - self.centre
        if not self.reach or (distance < 0 and not self.signed):
            return 0
        return round(max(-1.0, min(distance / self.reach, 1.0)) * LEVELS)


@dataclass(frozen=True)
class Look:
    """How the text of heatmaps is shown.

    Attributes:
        newlines: mark the ends of lines.
        short: only what stands around the strongest token of a turn.
    """

    newlines: bool = True
    short: bool = False


FULL = Look()


def ramp(heatmaps: Iterable[Heatmap], centre: float) -> Ramp:
    """The ramp whose strongest colour is the page's largest distance from the centre."""
    maps = list(heatmaps)
    signed = any(heatmap.signed for heatmap in maps)
    middle = centre if signed else 0.0
    values = [segment.value for heatmap in maps for turn in heatmap.turns for segment in turn]
    return Ramp(middle, max((abs(value - middle) for value in values), default=0.0), signed)


def style_sheet() -> None:
    """The classes of all heatmaps; once a page."""
    rules = [".hm i{font-style:normal;border-radius:.2rem}", ".hm u{text-decoration:none;opacity:.45}"]
    for name, colour in (("t", TOWARDS), ("a", AWAY)):
        for level in range(1, LEVELS + 1):
            shade = f"rgba({colour[0]},{colour[1]},{colour[2]},{STRONGEST * level / LEVELS:.2f})"
            rules.append(f".hm .{name}{level}{{background:{shade}}}")
    hidden = "position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap"
    rules.append(f".hidden-words{{{hidden}}}")
    st.html(f"<style>{''.join(rules)}</style>")


def turn_html(segments: Sequence[Segment], colours: Ramp, look: Look = FULL, bold: Collection[int] = ()) -> str:
    """One assistant turn with its tokens coloured, and its strongest tokens in words for screen readers.

    Args:
        bold: places of segments that are set in bold.
    """
    shown, before, after, first = list(segments), "", "", 0
    if look.short and shown:
        peak = max(range(len(shown)), key=lambda i: abs(shown[i].value - colours.centre))
        start, end = max(peak - SHORT_CONTEXT, 0), peak + SHORT_CONTEXT + 1
        before, after = ("… " if start else ""), (" …" if end < len(shown) else "")
        shown, first = shown[start:end], start
    drawn = [(place, _segment(segment, colours, look)) for place, segment in enumerate(shown, start=first)]
    coloured = "".join(f"<b>{text}</b>" if place in bold else text for place, text in drawn)
    return f'<span class="hm">{before}{coloured}{after}</span>{_in_words(shown, colours)}'


def text_html(text: str) -> str:
    """Plain text, safe to put into a page; characters that HTML cannot hold are shown as a sign."""
    return html.escape(text.replace("\0", "␀"))


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
        '<div style="display:flex;align-items:center;gap:.5rem;font-size:.8rem">'
        f"<span>{first}</span>"
        f'<span style="width:9rem;height:.7rem;border-radius:.35rem;border:1px solid rgba(128,128,128,.35);'
        f'background:{gradient}"></span>'
        f"<span>{last}</span></div>"
    )


def _segment(segment: Segment, colours: Ramp, look: Look) -> str:
    if segment.end_of_turn:
        shown, title = "<u>■</u>", f"end of turn {segment.value:+.3g}"
    else:
        shown, title = text_html(segment.text), f"{segment.value:+.3g}"
        if look.newlines:
            shown = shown.replace("\n", "<u>↵</u>\n")
    level = colours.level(segment.value)
    if not level:
        return shown
    return f'<i class={"t" if level > 0 else "a"}{abs(level)} title="{title}">{shown}</i>'


def _in_words(segments: Sequence[Segment], colours: Ramp) -> str:
    strongest = sorted(segments, key=lambda s: -abs(s.value - colours.centre))[:TOLD]
    words = [f"{s.text.strip()} {s.value:+.3g}" for s in strongest if colours.level(s.value) and s.text.strip()]
    return f'<span class="hidden-words">Strongest tokens: {text_html(", ".join(words))}</span>' if words else ""
