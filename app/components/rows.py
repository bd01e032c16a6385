"""A row of the data as a card: score, metadata, conversation with heatmap, flags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from app.components.heatmap import Ramp, text_html, turn_html
from app.components.session import current_audit
from backend import Heatmap

FLAGS = {"remove": ("Remove", ":material/delete:"), "review": ("Review", ":material/visibility:")}
SHOWN_METADATA = 6
LONG_PROMPT = 600


def conversation_html(messages: str, heatmap: Heatmap | None, colours: Ramp | None) -> str:
    """The turns of a row as HTML; assistant turns coloured where there is a heatmap."""
    blocks = []
    answered = 0
    for turn in json.loads(messages):
        body = text_html(turn["content"])
        note = ""
        if turn["role"] == "assistant":
            if heatmap is not None and colours is not None:
                if answered < len(heatmap.turns):
                    body = turn_html(heatmap.turns[answered], colours)
                else:
                    note = " (beyond the longest row that the model was given)"
            answered += 1
        elif len(body) > LONG_PROMPT:
            head = text_html(turn["content"][:LONG_PROMPT])
            rest = text_html(turn["content"][LONG_PROMPT:])
            body = f"{head}<details><summary style='opacity:.7'>… the rest</summary>{rest}</details>"
        blocks.append(_turn_html(turn["role"] + note, body))
    return "".join(blocks)


def metadata_text(metadata: str) -> str:
    """The first metadata fields as one line of plain text."""
    parts = []
    for name, value in list(json.loads(metadata).items())[:SHOWN_METADATA]:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        parts.append(f"{name}: {text[:80]}{'…' if len(text) > 80 else ''}")
    return " · ".join(parts)


class RowCard:
    """One row with buttons to flag it, drawn at once; what is computed for it is filled in later.

    Args:
        row: from `Audit.rows`, `Audit.rank` and the like.
        own_answer: what the model itself would answer, shown beside the row's.
    """

    def __init__(self, row: Mapping[str, Any], own_answer: str | None = None):
        self._row = row
        example_id = int(row["example_id"])
        self._flag = row["flag"] if isinstance(row["flag"], str) else None
        with st.container(border=True, key=f"row-{example_id}"):
            with st.container(horizontal=True, vertical_alignment="center"):
                with st.container(width="stretch"):
                    self._heading = st.empty()
                for name, (label, icon) in FLAGS.items():
                    st.button(
                        label,
                        icon=icon,
                        key=f"{name}-{example_id}",
                        type="primary" if self._flag == name else "tertiary",
                        help="Take the flag off" if self._flag == name else f"Flag: {label.lower()}",
                        on_click=_toggle,
                        args=(row["content_hash"], name, self._flag),
                    )
            self._turns = st.empty()
            if own_answer is not None:
                st.html(_turn_html("the model's own answer", text_html(own_answer), dashed=True))
        self.fill()

    def fill(
        self, heatmap: Heatmap | None = None, colours: Ramp | None = None, exact: float | None = None
    ) -> None:
        """Colour the tokens, and put the exact score beside the index's."""
        self._heading.html(_heading(self._row, self._flag, heatmap, exact))
        self._turns.html(conversation_html(self._row["messages"], heatmap, colours))


def _turn_html(role: str, body: str, dashed: bool = False) -> str:
    """One turn; `body` is HTML already."""
    edge = "border-top:1px dashed rgba(128,128,128,.5);padding-top:.5rem;" if dashed else ""
    return (
        f'<div style="display:grid;grid-template-columns:5.2rem 1fr;gap:.6rem;margin-bottom:.35rem;{edge}">'
        f'<span style="opacity:.6;font-size:.8rem;padding-top:.15rem">{text_html(role)}</span>'
        f'<div style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.65">{body}</div></div>'
    )


def _heading(
    row: Mapping[str, Any], flag: str | None, heatmap: Heatmap | None, exact: float | None = None
) -> str:
    parts = []
    if "rank" in row and not pd.isna(row["rank"]):
        parts.append(f"<strong>#{int(row['rank']):,}</strong>")
        parts.append(f"score {row['score']:+.4g}" + (f" (exact {exact:+.4g})" if exact is not None else ""))
        parts.append(f"percentile {row['percentile']:.1f}")
    if heatmap is not None and heatmap.elsewhere:
        parts.append(f"of which the prompt {heatmap.elsewhere:+.3g}")
    if "max_activation" in row:
        parts.append(f"fires at {row['max_activation']:.1f}")
    parts.append(f"row {int(row['example_id']):,}")
    if not pd.isna(row["duplicate_of"]):
        parts.append(f"copy of row {int(row['duplicate_of']):,}")
    if row["truncated"]:
        parts.append("cut at the longest row")
    if flag:
        parts.append(f"<strong>flagged: {text_html(flag)}</strong>")
    first = " · ".join(parts)
    metadata = text_html(metadata_text(row["metadata"]))
    return f"<div>{first}<br><span style='opacity:.65;font-size:.85rem'>{metadata}</span></div>"


def _toggle(content_hash: str, name: str, present: str | None) -> None:
    audit = current_audit()
    if present == name:
        audit.unflag([content_hash])
    else:
        audit.flag([content_hash], name)
