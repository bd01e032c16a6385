"""The desk: a list of the page's rows beside the one that the cursor rests on, and keys for what is done to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from concept_audit import Audit, AuditError, RowFilter, Window
from concept_audit_app.components.acts import HERE, acting_component, said_to_be_done, waiting
from concept_audit_app.components.documents import metadata_of, window_words
from concept_audit_app.components.flags import flags_drawn, undo_change
from concept_audit_app.components.found import phrase_found
from concept_audit_app.components.labelled_many import labelled_last, undo_labels
from concept_audit_app.components.paging import go_to, page_in_url
from concept_audit_app.components.rows import FLAGS, SWAP
from concept_audit_app.components.scale import Scale
from concept_audit_app.components.session import current_audit, person, read_only
from concept_audit_app.components.tables import records

KEY = "desk-list"
QUEUE = "rows"
MOST_REMEMBERED = 500
"""Acts whose changes are remembered, so that each can be undone."""
SNIPPET = 160
"""Characters of a row that the list shows until its tokens are there."""
METADATA = 2
"""Metadata fields beside each row of the list."""
HTML = (HERE / "desk.html").read_text("utf-8")
CSS = (HERE / "desk.css").read_text("utf-8")
_component = acting_component("concept_audit_desk", HTML, CSS, "desk.js")


def do_acts() -> bool:
    """Do what was asked by keys and is not done yet; whether there was something."""
    changed = False
    for audit, act in waiting(QUEUE):
        changed = True
        try:
            _do(audit, act)
        except AuditError as error:
            st.session_state["row_problem"] = f"Row {act.get('id', '')}: {error}"
    if changed:
        flags_drawn()
    return changed


def _do(audit: Audit, act: Mapping[str, Any]) -> None:
    events: dict[int, int | None] = st.session_state.setdefault(f"events-{audit.name}", {})
    if act.get("undo"):
        _undo(audit, events[act["of"]] if act.get("of") in events else _latest(audit))
        return
    flag = act["flag"]
    if flag is None:
        change = audit.flags.clear([str(act["hash"])], by=person())
    elif flag in (FLAGS | SWAP if audit.manifest.pair else FLAGS):
        change = audit.flags.set([str(act["hash"])], flag, by=person())
    else:
        return
    events[act["n"]] = change.event_id
    if len(events) > MOST_REMEMBERED:
        del events[min(events)]


def _undo(audit: Audit, event: int | None) -> None:
    if event is None and labelled_last(audit) is not None:
        undo_labels(audit)
    elif event is None:
        st.session_state["said"] = "Nothing to undo"
    else:
        undo_change(audit, event)


def _latest(audit: Audit) -> int | None:
    if labelled_last(audit) is not None:
        return None
    mine = audit.flags.undoable(person())
    return None if mine.empty else int(mine["event_id"].iloc[0])


def list_rows(
    rows: pd.DataFrame, scale: Scale, where: RowFilter, windows: Mapping[int, Window]
) -> list[dict[str, Any]]:
    """What the list shows of each row, from above to below; of a search, where its words are.

    Args:
        windows: number of a row → where it lies in its document.
    """
    words = where.words()
    return [
        {
            "id": int(row["example_id"]),
            "hash": str(row["content_hash"]),
            "rank": f"#{int(row['rank']):,}",
            "value": scale.of(row["score"]),
            "score": scale.short(row["score"]),
            "raw": scale.told(row["score"]),
            "text": " ".join(row["response"].split())[:SNIPPET] or "(no response)",
            "about": _about(row["metadata"], windows.get(int(row["example_id"]))),
            "found": phrase_found(row, words, where.text_in) if words else None,
        }
        for row in records(rows)
    ]


def _about(metadata: str, window: Window | None) -> str:
    fields = list(metadata_of(metadata, window).values())[:METADATA]
    told = [(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))[:40] for value in fields]
    return " · ".join(part for part in (*told, window_words(window)) if part)


@st.fragment
def desk(rows: Sequence[Mapping[str, Any]], furthest: float, pages: int, where: RowFilter) -> None:
    """The list, and the keys that act on its rows; the row that its cursor rests on is the card that shows.

    Args:
        rows: of `list_rows`.
        furthest: the value of the longest bar.
        pages: how many there are.
        where: the filter; the words that it looks for are marked in the row.
    """
    audit = current_audit()
    flags = audit.flags.of([row["hash"] for row in rows])
    found = _component(
        key=KEY,
        data={
            "rows": [{**row, "flag": flags.get(row["hash"])} for row in rows],
            "furthest": furthest,
            "words": where.words(),
            "place": where.text_in,
            "pairs": audit.manifest.pair is not None,
            "writes": not read_only(),
            "page": page_in_url(pages),
            "pages": pages,
            **said_to_be_done(QUEUE),
        },
        on_settled_change=lambda: None,
        on_turned_change=lambda: _turn(pages),
    )
    if found.settled or found.turned:
        st.rerun(scope="app")


def _turn(pages: int) -> None:
    """Go to the page that was asked for below the list, or by keys."""
    page = (st.session_state.get(KEY) or {}).get("turned")
    if isinstance(page, int) and 1 <= page <= pages:
        go_to(page)
