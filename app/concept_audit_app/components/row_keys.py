"""Keys that act on the rows of a page: through them, flags, notes and undoing, as fast as anyone types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from concept_audit import Audit, AuditError
from concept_audit_app.components.acts import acting_component, said_to_be_done, waiting
from concept_audit_app.components.flags import flags_drawn, undo_change
from concept_audit_app.components.rows import FLAGS, SWAP
from concept_audit_app.components.session import current_audit, person, read_only

KEY = "keys-of-rows"
MOST_REMEMBERED = 500
"""Acts whose changes are remembered, so that each can be undone."""
HTML = """<div class="keys" role="toolbar" aria-label="Keys for the rows">
<button value="k" title="Row above">↑ <kbd>K</kbd></button><button value="j" title="Row below">↓ <kbd>J</kbd></button>
<button value="x">Remove <kbd>X</kbd></button><button value="v">Review <kbd>V</kbd></button>
<button value="w">Swap <kbd>W</kbd></button><button value="n">Note <kbd>N</kbd></button>
<span role="status"></span></div>
"""
CSS = """.keys { display: flex; white-space: nowrap; gap: .25rem; align-items: center; font-size: .875rem;
  color: var(--st-text-color) }
button { font: inherit; color: inherit; background: none; border: 1px solid var(--st-border-color);
  border-radius: .5rem; padding: .15rem .5rem; cursor: pointer }
button[hidden] { display: none }
button:hover, button:focus-visible { border-color: var(--st-primary-color) }
kbd { font: inherit; opacity: .8; margin-left: .2rem }
span { margin-left: .5rem }
"""
_component = acting_component("concept_audit_row_keys", HTML, CSS, "row_keys.js")


def do_acts() -> None:
    """Do what was asked by keys and is not done yet; before the rows are read, so that they show it."""
    changed = False
    for audit, act in waiting(KEY):
        changed = True
        try:
            _do(audit, act)
        except AuditError as error:
            st.session_state["row_problem"] = f"Row {act.get('id', '')}: {error}"
    if changed:
        flags_drawn()


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
    if event is None:
        st.session_state["said"] = "Nothing to undo"
    else:
        undo_change(audit, event)


def _latest(audit: Audit) -> int | None:
    mine = audit.flags.undoable(person())
    return None if mine.empty else int(mine["event_id"].iloc[0])


@st.fragment
def row_keys(rows: Sequence[tuple[int, str]]) -> None:
    """The keys, and a bar that says them.

    Args:
        rows: number and content hash of each row on the page, from above to below.
    """
    if read_only():
        return
    audit = current_audit()
    do_acts()
    flags = audit.flags.of([content for _, content in rows])
    shown = [{"id": number, "hash": content, "flag": flags.get(content)} for number, content in rows]
    found = _component(
        key=KEY,
        data={"rows": shown, "pairs": audit.manifest.pair is not None, **said_to_be_done(KEY)},
        on_acts_change=lambda: None,
        on_settled_change=lambda: None,
        width="content",
    )
    if found.settled:
        st.rerun(scope="app")
