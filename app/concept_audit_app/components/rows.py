"""A row of the data as a card: score, metadata, conversation with heatmap, flags."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pandas as pd
import streamlit as st

from concept_audit import AuditError, Heatmap, Message, Segment, Window, messages_from_json
from concept_audit_app.components.asking import ask_later
from concept_audit_app.components.documents import document_link, metadata_of, window_words
from concept_audit_app.components.heatmap import FULL, LEVELS, Look, Ramp, text_html, turn_html
from concept_audit_app.components.scale import Scale
from concept_audit_app.components.session import current_audit, person, read_only
from concept_audit_app.components.similar import similar_rows

FLAGS = {
    "remove": ("Remove", ":material/delete:"),
    "review": ("Review", ":material/visibility:"),
    "keep": ("Keep", ":material/check:"),
}
SWAP = {"swap": ("Swap", ":material/swap_horiz:")}
"""Of preference pairs, besides."""
SHOWN_METADATA = 6
LONG_PROMPT = 600
LONG_RESPONSE = 4000
LONG = {"tool": 300, "tools": 0}
"""The same of what tools answer, and of the descriptions of those that are offered."""
"""Beyond so many characters the rest of a text is folded away, and sent for the row on screen alone."""
MOST_CHARACTERS = 20_000
MOST_COMPARED = 1_500
"""Tokens of a side beyond which two sides are not compared token by token."""


def conversation_html(messages: str, heatmap: Heatmap | None, colours: Ramp | None, look: Look = FULL) -> str:
    """The turns of a row as HTML; assistant turns that count are coloured where there is a heatmap.

    Of a preference pair the sides stand beside each other, with the words in bold that the other has not.
    """
    turns = messages_from_json(messages)
    place = next((place for place, turn in enumerate(turns) if turn.role == "rejected"), None)
    if place is None:
        return _turns_html(turns, heatmap.turns if heatmap else None, colours, look)
    sides = turns[:place], turns[place + 1 :]
    least = min(len(side) for side in sides) - 1
    alike = next((n for n in range(least) if not _same(sides[0][n], sides[1][n])), least)
    coloured: list[Sequence[Sequence[Segment]] | None] = [None, None]
    if heatmap is not None and heatmap.rejected is not None:
        coloured = [heatmap.turns[: heatmap.rejected], heatmap.turns[heatmap.rejected :]]
    columns = []
    names = ("chosen", "rejected")
    for side, other, values, beside, name in zip(sides, sides[::-1], coloured, coloured[::-1], names, strict=True):
        own, narrow = side[alike:], len(side[alike:]) == 1
        if values is None or beside is None:
            text = "".join(turn.text for turn in other[alike:])
            said = "".join(
                _turn_html("" if narrow else turn.role, _difference_html(turn.text[:MOST_CHARACTERS], text))
                for turn in own
            )
        else:
            said = _turns_html(own, values, colours, look, _differing(values, beside), narrow)
        columns.append(f'<div style="min-width:0"><strong>{name}</strong>{said}</div>')
    shared = _turns_html(sides[0][:alike], None, None, look)
    grid = "display:grid;grid-template-columns:1fr 1fr;gap:1rem"
    return f'{shared}<div style="{grid}">{"".join(columns)}</div>'


def _differing(own: Sequence[Sequence[Segment]], other: Sequence[Sequence[Segment]]) -> dict[int, set[int]]:
    """Turn → places of its segments that the other side has not, where both are short enough to compare."""
    mine = [(turn, place, segment.text) for turn, said in enumerate(own) for place, segment in enumerate(said)]
    theirs = [segment.text for said in other for segment in said]
    found: dict[int, set[int]] = {}
    if max(len(mine), len(theirs)) > MOST_COMPARED:
        return found
    matcher = difflib.SequenceMatcher(None, [text for _, _, text in mine], theirs, autojunk=False)
    for kind, start, end, _, _ in matcher.get_opcodes():
        for turn, place, _ in mine[start:end] if kind != "equal" else ():
            found.setdefault(turn, set()).add(place)
    return found


def _same(one: Message, other: Message) -> bool:
    return (one.role, one.text) == (other.role, other.text)


def _turns_html(
    turns: Sequence[Message],
    coloured: Sequence[Sequence[Segment]] | None,
    colours: Ramp | None,
    look: Look,
    bold: Mapping[int, Collection[int]] = MappingProxyType({}),
    narrow: bool = False,
) -> str:
    """Turns one below the other; `narrow` leaves out whose they are, where a heading says it."""
    blocks = []
    answered = 0
    for turn in turns:
        if turn.role != "assistant":
            blocks.append(
                _turn_html(f"{turn.role} {turn.name}".strip(), _folded(turn.content, LONG.get(turn.role, LONG_PROMPT)))
            )
            continue
        note, body = "" if turn.trained else " (not trained on)", _said_html(turn)
        if coloured is not None and colours is not None and turn.trained:
            if answered < len(coloured):
                told = turn_html(coloured[answered], colours, look, bold.get(answered, ()))
                body = _called_html(turn, told, _strong(coloured[answered], colours)) if turn.calls else told
                body += _beyond(turn.content.strip(), coloured[answered])
            else:
                note = " (beyond the longest row that the model was given)"
        answered += turn.trained
        blocks.append(_turn_html("" if narrow and not note else turn.role + note, body))
    return "".join(blocks)


def _last_answer(messages: str) -> str:
    """What the last turn of a row says; of a pair, of its chosen side."""
    turns = messages_from_json(messages)
    until = next((place for place, turn in enumerate(turns) if turn.role == "rejected"), len(turns))
    return turns[until - 1].text


def _said_html(turn: Message) -> str:
    """An assistant turn without colours: what it thought, faint; what it said; and what it called, folded away."""
    thought = f'<span style="opacity:.7">{_folded(turn.reasoning, LONG_PROMPT)}</span>\n\n' if turn.reasoning else ""
    called = (
        _called_html(turn, _folded(replace(turn, content="", reasoning="").text, LONG_RESPONSE)) if turn.calls else ""
    )
    return thought + _folded(turn.content, LONG_RESPONSE) + called


def _strong(segments: Sequence[Segment], colours: Ramp) -> bool:
    """Whether a turn has a token of at least half the strongest colour."""
    return any(abs(colours.level(segment.value)) >= LEVELS // 2 for segment in segments)


def _called_html(turn: Message, body: str, opened: bool = False) -> str:
    """Under the names of the tools that a turn calls; `body` is HTML already."""
    names = ", ".join(call["name"] for call in json.loads(turn.calls))
    return f"<details{' open' if opened else ''}><summary>calls {text_html(names)}</summary>{body}</details>"


def metadata_text(metadata: str, window: Window | None = None) -> str:
    """The first metadata fields as one line of plain text."""
    parts = []
    for name, value in list(metadata_of(metadata, window).items())[:SHOWN_METADATA]:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        parts.append(f"{name}: {text[:80]}{'…' if len(text) > 80 else ''}")
    return " · ".join(parts)


class RowCard:
    """One row with buttons to flag it, drawn at once; what is computed for it is filled in later.

    Args:
        row: from `Audit.rows`, `Audit.rank` and the like.
        own_answer: what the model itself would answer, shown beside the row's.
        elsewhere: what other rankings say of the row, in words.
        ask: offer to ask the model for its own answer.
        layer: offer the rows that are nearest at this layer.
        opens: the query of the Audit page that shows this row alone, for a link to it.
        query_note: what is said of a row that is one of the ranking's query examples.
        says_exact: say whether the score is exact or estimated by the gradient index.
        scale: shows the score in standard deviations, and as it is on hover.
        window: where the row lies in its document, where that may have been split.
    """

    def __init__(
        self,
        row: Mapping[str, Any],
        own_answer: str | None = None,
        elsewhere: str = "",
        ask: bool = False,
        layer: int | None = None,
        opens: Mapping[str, str] | None = None,
        query_note: str = "",
        says_exact: bool = False,
        scale: Scale | None = None,
        window: Window | None = None,
    ):
        self._row, self._elsewhere, self._says_exact, self._scale = row, elsewhere, says_exact, scale
        self._window = window
        badge = _badge_html("query example", query_note) if row.get("is_query", False) else ""
        self._badge = " · ".join(part for part in (window_words(window), badge) if part)
        self._flag = row["flag"] if isinstance(row["flag"], str) else None
        example_id = int(row["example_id"])
        with st.container(border=True, key=f"row-{example_id}"):
            with st.container(horizontal=True, vertical_alignment="center", key=f"head-{example_id}"):
                with st.container(width="stretch"):
                    self._heading = st.empty()
                # Together, so that they stand in a line of their own where there is no room beside the words.
                with st.container(horizontal=True, vertical_alignment="center", width="content"):
                    if opens is not None:
                        st.page_link(
                            "app_pages/ranking.py",
                            label=f"Open row {example_id:,}",
                            icon=":material/open_in_full:",
                            query_params={**opens, "row": str(example_id)},
                        )
                    document_link(window)
                    if ask and own_answer is None:
                        st.button(
                            "",
                            icon=":material/smart_toy:",
                            key=f"ask-{example_id}",
                            type="tertiary",
                            help=f"Row {example_id}: what would the model itself have answered?",
                            on_click=ask_later,
                            args=(example_id,),
                        )
                    if layer is not None:
                        similar_rows(example_id, layer)
                    if not read_only():
                        if self._flag:
                            _note_box(row, self._flag)
                        _flag_buttons(row, self._flag)
            self._turns = st.empty()
            if own_answer is not None:
                response = _last_answer(row["messages"])
                st.html(_turn_html("the model's own answer", _difference_html(own_answer, response), dashed=True))
        self.fill()

    def fill(
        self, heatmap: Heatmap | None = None, colours: Ramp | None = None, exact: float | None = None, look: Look = FULL
    ) -> None:
        """Colour the tokens, and put what they add up to beside an estimated score."""
        score = _score_words(self._row, self._says_exact, exact, self._scale) if "rank" in self._row else ""
        self._heading.html(_heading(self._row, self._flag, heatmap, score, self._small(), self._badge))
        self._turns.html(conversation_html(self._row["messages"], heatmap, colours, look))

    def _small(self) -> str:
        """What stands below the heading, in small print: a line, where it has room."""
        parts = (metadata_text(self._row["metadata"], self._window), self._elsewhere)
        return " · ".join(part for part in parts if part)


def _flag_buttons(row: Mapping[str, Any], present: str | None) -> None:
    example_id = int(row["example_id"])
    for name, (label, icon) in (FLAGS | SWAP if current_audit().manifest.pair else FLAGS).items():
        st.button(
            label,
            icon=icon,
            key=f"{name}-{example_id}",
            type="primary" if present == name else "tertiary",
            help=f"Row {example_id}: " + ("take the flag off" if present == name else f"flag to {label.lower()}"),
            on_click=_toggle,
            args=(row["content_hash"], name, present),
        )


def _note_box(row: Mapping[str, Any], flag: str) -> None:
    example_id, written = int(row["example_id"]), row["note"] if isinstance(row["note"], str) else ""
    opened = st.popover(
        "Note", icon=":material/edit_note:", type="tertiary", key=f"note-of-{example_id}", on_change="rerun"
    )
    if opened.open:
        with opened:
            st.text_input(
                f"Why row {example_id:,} is flagged",
                value=written,
                key=f"note-{example_id}",
                max_chars=200,
                on_change=_note,
                args=(row["content_hash"], flag, f"note-{example_id}"),
            )


def _note(content_hash: str, flag: str, key: str) -> None:
    try:
        current_audit().flags.set([content_hash], flag, st.session_state[key].strip(), person())
    except AuditError as error:
        st.session_state["row_problem"] = str(error)


def page_problem() -> None:
    """Say what went wrong in a callback, once."""
    if problem := st.session_state.pop("row_problem", None):
        st.error(problem, icon=":material/error:")


def _folded(text: str, length: int, why: str = "") -> str:
    """Text of which what is beyond a length is folded away."""
    if len(text) <= length:
        return text_html(text)
    rest = text[length:MOST_CHARACTERS]
    left = len(text) - length - len(rest)
    more = f" … and {left:,} characters more" if left else ""
    return (
        f"{text_html(text[:length])}<details><summary>… {len(text) - length:,} characters more{why}</summary>"
        f"{text_html(rest)}{more}</details>"
    )


def _beyond(content: str, segments: Sequence[Segment]) -> str:
    """What the model was not given of a turn, folded away."""
    given = sum(len(segment.text) for segment in segments)
    if len(content) <= given:
        return ""
    return _folded(content[given:], 0, " beyond the longest row that the model was given")


def _turn_html(role: str, body: str, dashed: bool = False) -> str:
    """One turn, beside it whose it is, if that is told; `body` is HTML already."""
    edge = "border-top:1px dashed rgba(128,128,128,.5);padding-top:.5rem;" if dashed else ""
    gutter = f'<span style="opacity:.8;font-size:.8rem;padding-top:.15rem">{text_html(role)}</span>' if role else ""
    columns = "5.2rem minmax(0,1fr)" if role else "minmax(0,1fr)"
    part = "response" if role.startswith("assistant") or not role else "prompt"
    return (
        f'<div class="turn" data-part="{part}" '
        f'style="display:grid;grid-template-columns:{columns};gap:.6rem;margin-bottom:.35rem;{edge}">{gutter}'
        '<div dir="auto" style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.65;unicode-bidi:isolate">'
        f"{body}</div></div>"
    )


def _difference_html(own: str, response: str) -> str:
    """The model's own answer, with the words in bold that the row's response does not have."""
    mine, theirs = re.findall(r"\s+|\S+", own), re.findall(r"\s+|\S+", response[: len(own) * 2 + 200])
    parts = []
    for kind, start, end, _, _ in difflib.SequenceMatcher(None, mine, theirs, autojunk=False).get_opcodes():
        words = text_html("".join(mine[start:end]))
        if kind != "insert":
            parts.append(words if kind == "equal" else f"<strong>{words}</strong>")
    return "".join(parts)


def _badge_html(text: str, note: str) -> str:
    """A small frame around a word or two; the note is shown while the pointer rests on it."""
    style = "border:1px solid rgba(128,128,128,.6);border-radius:.6rem;padding:0 .4rem;font-size:.8rem"
    return f'<span title="{text_html(note)}" style="{style}">{text_html(text)}</span>'


def _score_words(row: Mapping[str, Any], says_exact: bool, exact: float | None, scale: Scale | None) -> str:
    """A row's score as HTML, and whether it is exact where that is not so of every row."""
    raw = f"score {row['score']:+.4g}"
    kind = "" if not says_exact else " (exact)" if row["exact"] else " (estimated)"
    if scale is None:
        beside = f" (estimated; exact {exact:+.4g})" if kind == " (estimated)" and exact is not None else kind
        return raw + beside
    beside = f" (estimated; exact {scale.short(exact)})" if kind == " (estimated)" and exact is not None else kind
    return f'<span title="{raw}{kind}">{scale.short(row["score"])} SD{beside}</span>'


def _heading(
    row: Mapping[str, Any], flag: str | None, heatmap: Heatmap | None, score: str, small: str, badge: str = ""
) -> str:
    parts = []
    if "rank" in row and not pd.isna(row["rank"]):
        parts.append(f"<strong>#{int(row['rank']):,}</strong>")
        parts.append(score)
        parts.append(f"percentile {row['percentile']:.1f}")
    if heatmap is not None and heatmap.elsewhere:
        parts.append(f"of which the prompt {heatmap.elsewhere:+.3g}")
    if "max_activation" in row:
        parts.append(f"fires at {row['max_activation']:.1f}")
    parts.append(f"row {int(row['example_id']):,}")
    if badge:
        parts.append(badge)
    if not pd.isna(row["duplicate_of"]):
        parts.append(f"copy of row {int(row['duplicate_of']):,}")
    if row["truncated"]:
        parts.append("cut at the longest row")
    # By keys a flag changes before the page is drawn anew: see `desk.js`.
    words = ""
    if flag:
        note = f" ({text_html(row['note'])})" if isinstance(row.get("note"), str) and row["note"] else ""
        words = f"{'kept' if flag == 'keep' else f'flagged: {text_html(flag)}'}{note}"
    shown = (
        f' <strong class="flag-words" style="margin-left:.4rem" data-flag="{text_html(flag or "")}">{words}</strong>'
    )
    first = " · ".join(parts) + shown
    below = f"<br><span style='opacity:.8;font-size:.85rem'>{text_html(small)}</span>" if small else ""
    return f"<div>{first}{below}</div>"


def _toggle(content_hash: str, name: str, present: str | None) -> None:
    audit = current_audit()
    try:
        if present == name:
            audit.flags.clear([content_hash], by=person())
        else:
            audit.flags.set([content_hash], name, by=person())
    except AuditError as error:
        st.session_state["row_problem"] = str(error)
