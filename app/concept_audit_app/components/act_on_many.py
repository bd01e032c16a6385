"""One act on many rows: what is offered for a row or a page, for all that pass the filter, or the first of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import streamlit as st

from concept_audit import Audit, AuditError, FlagChange, RowFilter
from concept_audit_app.components.exporting import Chosen, downloads
from concept_audit_app.components.flags import View, decided
from concept_audit_app.components.labelled_many import remember_labels
from concept_audit_app.components.plain import counted
from concept_audit_app.components.session import current_audit, person, read_only
from concept_audit_app.components.tables import records

SHOWN, SHOWN_CHARACTERS = 5, 90
"""Of the rows that are acted on: how many are shown, and how much of each."""
ROWS = {"all": "All that pass the filter", "top": "The first", "above": "Scores of at least"}
ACTS = {"flag": "Flag", "note": "Note", "label": "Label", "export": "Export"}
FLAGS: dict[str | None, str] = {
    "remove": "Flag to remove",
    "review": "Flag to review",
    "keep": "Keep",
    None: "Back to unseen",
}
SWAP: dict[str | None, str] = {"swap": "Flag to swap"}
"""Of preference pairs, besides."""
DONE = {
    "remove": "flagged to remove",
    "review": "flagged to review",
    "keep": "kept",
    "swap": "flagged to swap",
    None: "unseen again",
}
LABELS = {1: "Shows it", 0: "Does not"}


@dataclass(frozen=True)
class Many:
    """The rows that are acted on.

    Attributes:
        where: what they pass.
        top: only the first so many of them, by rank.
        count: how many they are.
        how: in words, how they were chosen.
    """

    view: View
    where: RowFilter
    top: int | None
    count: int
    how: str


def act_on_many(view: View) -> None:
    """A button for one act on many rows: it asks which, says how many they are, and then what to do."""
    if not read_only() and st.button(
        "Act on many", icon=":material/checklist:", disabled=not view.total, key="bulk", type="secondary"
    ):
        _dialog(view)


@st.dialog("Act on many rows", width="medium")
def _dialog(view: View) -> None:
    audit = current_audit()
    many = _choose(audit, view)
    _preview(audit, many)
    act = st.segmented_control(
        "What to do",
        list(ACTS),
        format_func=ACTS.__getitem__,
        default="flag",
        required=True,
        key="bulk-act",
        label_visibility="collapsed",
    )
    {"flag": _flag, "note": _note, "label": _label, "export": _export}[act or "flag"](audit, many)


def _choose(audit: Audit, view: View) -> Many:
    start = list(ROWS).index("top" if view.threshold is None else "above")
    how = st.radio("Rows", list(ROWS), start, format_func=ROWS.get, key="bulk-how", horizontal=True)
    top, where = None, view.where
    if how == "top":
        top = int(st.number_input("How many", 1, max(view.total, 1), min(20, view.total), key="bulk-top"))
    elif how == "above":
        least = st.number_input("Score", value=float(view.threshold or 0.0), format="%.4g", key="bulk-least")
        ceiling = where.scores[1] if where.scores else float("inf")
        floor = max(least, where.scores[0]) if where.scores else least
        where = replace(where, scores=(floor, ceiling))
    count = audit.rows.count(where, view.concept, view.method, view.options)
    chosen = f"{ROWS[how].lower()}{f' {top:,}' if top else ''} by {view.method} of {view.concept}"
    return Many(view, where, top, count if top is None else min(count, top), chosen)


def _preview(audit: Audit, many: Many) -> None:
    view = many.view
    # What is done to them is done to those, too, about which somebody has decided already.
    so_far = f": {decided(view, many.where, many.top)}" if many.count else ""
    st.markdown(f"**{counted(many.count, 'row')}** on all pages{so_far}")
    shown = min(many.count, SHOWN)
    rows = audit.rank(view.concept, view.method, shown, many.where, options=view.options) if shown else None
    for row in records(rows) if rows is not None else ():
        words = " ".join(f"{row['prompt']} {row['response']}".split())
        st.text(f"#{row['rank']:,}  {words[:SHOWN_CHARACTERS]}{'…' if len(words) > SHOWN_CHARACTERS else ''}")
    if many.count > SHOWN:
        st.caption(f"and {many.count - SHOWN:,} more")


def _flag(audit: Audit, many: Many) -> None:
    note, view = _note_box("why; if it is empty, each row keeps its own note"), many.view
    with st.container(horizontal=True):
        for name, label in (FLAGS | SWAP if audit.manifest.pair else FLAGS).items():
            if _button(f"{label}: {many.count:,}", f"bulk-{name}", not many.count, name == "remove"):
                asked = (
                    many.where,
                    name,
                    view.concept,
                    view.method,
                    note or None,
                    person(),
                    view.options,
                    many.top,
                    many.how,
                )
                _done(partial(audit.flags.set_matching, *asked), DONE[name])


def _note(audit: Audit, many: Many) -> None:
    note = _note_box("for every flagged row of these")
    st.caption("A note goes with a flag or a keep: unseen rows stay as they are, and the others keep what they have.")
    if _button(f"Write the note on flagged rows of {many.count:,}", "bulk-write", not many.count, True):
        view = many.view
        _done(
            lambda: audit.flags.note_matching(
                many.where, note, view.concept, view.method, person(), view.options, many.top, many.how
            ),
            "noted",
        )


def _label(audit: Audit, many: Many) -> None:
    names = audit.labels.counts()["probe"].tolist()
    probe = st.selectbox(
        "Probe",
        names,
        index=0 if names else None,
        key="bulk-probe",
        accept_new_options=True,
        placeholder="name of a probe, there or new",
    )
    with st.container(horizontal=True):
        for value, label in LABELS.items():
            if _button(f"{label}: {many.count:,}", f"bulk-label-{value}", not (many.count and probe), value == 1):
                _label_many(audit, many, str(probe), value)
                st.rerun()


def _label_many(audit: Audit, many: Many, probe: str, value: int) -> None:
    view = many.view
    try:
        change = audit.queue.label_matching(probe, value, many.where, view.concept, view.method, view.options, many.top)
    except AuditError as error:
        st.session_state["row_problem"] = str(error)
        return
    if change.before:
        remember_labels(audit, change)
    st.session_state["said"] = (
        f"{counted(len(change.before), 'text')} labelled for {change.probe}: {LABELS[value].lower()}"
        if change.before
        else "Nothing to change: they are labelled so already"
    )


def _export(audit: Audit, many: Many) -> None:
    view, where = many.view, many.where
    if many.top is not None:
        first = audit.rank(view.concept, view.method, many.top, where, options=view.options)
        where = replace(where, example_ids=tuple(int(i) for i in first["example_id"]))
    if many.count:
        downloads(
            audit, Chosen("view", "csv", "audit", False, where, view.concept, view.method, view.options), many.count
        )
    st.caption("Other formats and columns: the Export page.")


def _note_box(placeholder: str) -> str:
    return st.text_input("Note", key="bulk-note", placeholder=placeholder, max_chars=200) or ""


def _button(label: str, key: str, disabled: bool, primary: bool) -> bool:
    return st.button(label, key=key, disabled=disabled, type="primary" if primary else "secondary")


def _done(change: Callable[[], FlagChange], words: str) -> None:
    """Make a change of flags, say what came of it, and close the dialog."""
    try:
        made = change()
    except AuditError as error:
        st.session_state["row_problem"] = str(error)
    else:
        st.session_state["said"] = (
            f"{counted(made.n_texts, 'text')} {words}" if made.event_id else "Nothing to change: they are so already"
        )
    st.rerun()
