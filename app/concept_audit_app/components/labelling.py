"""Ways to label examples: a queue, search results, typed text, a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from concept_audit import Audit, AuditError, LabelledExample, Message, RowFilter, messages_from_json, read_labelled
from concept_audit_app.components.acts import HERE, acting_component, said_to_be_done, waiting
from concept_audit_app.components.plain import counted
from concept_audit_app.components.rows import conversation_html
from concept_audit_app.components.session import current_audit
from concept_audit_app.components.tables import records

KINDS = {"likely": "Likely", "uncertain": "Uncertain", "unlikely": "Unlikely"}
WHY = {
    "likely": "offered because the probe scores it high",
    "uncertain": "offered because it is near the probe's boundary",
    "unlikely": "offered because the probe scores it low",
    "shuffled": "drawn at random",
}
FOUND_SHOWN = 10
AT_HAND, MOST_OFFERED = 24, 500
"""Rows of the queue that the browser has beforehand, and that are remembered here while their labels may come."""
LONGEST_TURN = 8_000
KEY = "keys-of-labels"
QUEUE = "labels"
HTML = (HERE / "label_keys.html").read_text("utf-8")
CSS = (HERE / "label_keys.css").read_text("utf-8")
POSITIVE, NEGATIVE = "Shows it", "Does not"
_component = acting_component("concept_audit_label_keys", HTML, CSS, "label_keys.js", isolated=False)


def put_label(name: str, messages: tuple[Message, ...], label: int, audit: Audit | None = None) -> None:
    """Keep one label; says why if it cannot be kept.

    Args:
        audit: None for the one that is open.
    """
    audit, example = audit or current_audit(), LabelledExample(messages, label)
    try:
        audit.labels.add(name, [example])
        _remember(audit, name, "label", example.content_hash)
    except AuditError as error:
        st.session_state["lab_error"] = str(error)


def _remember(audit: Audit, name: str, action: str, content_hash: str) -> None:
    st.session_state.setdefault(f"labelled-{audit.name}-{name}", []).append((action, content_hash))


def _skip(audit: Audit, name: str, content_hash: str) -> None:
    audit.queue.skip(name, [content_hash])
    _remember(audit, name, "skip", content_hash)


def _undo(audit: Audit, name: str) -> None:
    """Take back the latest label or skip of this session."""
    history = st.session_state.get(f"labelled-{audit.name}-{name}")
    if not history:
        return
    action, content_hash = history.pop()
    if action == "label":
        audit.labels.remove(name, [content_hash])
    else:
        audit.queue.unskip(name, content_hash)


def queue(audit: Audit, name: str, trained: bool, bar: DeltaGenerator) -> None:
    """Rows beside each other, labelled by button or key.

    Args:
        bar: takes the widgets that narrow the queue.
    """
    with bar:
        kinds = list(KINDS)
        if trained:
            kinds = st.segmented_control(
                "Offer rows that are",
                list(KINDS),
                format_func=KINDS.__getitem__,
                default=list(KINDS),
                key="kinds",
                selection_mode="multi",
                bind="query-params",
                label_visibility="collapsed",
            )
        text = st.text_input(
            "With the text",
            key="with",
            bind="query-params",
            type="search",
            icon=":material/search:",
            placeholder="with the text, in prompt or response",
            label_visibility="collapsed",
        )
    try:
        _offer(name, text or "", tuple(kinds or KINDS))
    except AuditError as error:
        st.error(str(error), icon=":material/error:")


@st.fragment
def _offer(name: str, text: str, kinds: Sequence[str]) -> None:
    """The rows of the queue, the next few of them at hand in the browser."""
    audit = current_audit()
    rows = audit.queue.upcoming(name, RowFilter(text=text), AT_HAND, kinds)
    known = st.session_state.setdefault("offered", {})
    for _, row in rows:
        known.pop(row["content_hash"], None)  # put last, so that none of those on offer is forgotten
        known[row["content_hash"]] = messages_from_json(row["messages"])
    while len(known) > MOST_OFFERED:
        del known[next(iter(known))]
    labels = audit.labels.list(name)
    positive = sum(example.label for example in labels)
    found = _component(
        key=KEY,
        data={
            "name": name,
            "items": [
                {
                    "hash": row["content_hash"],
                    "row": int(row["example_id"]),
                    "kind": KINDS.get(kind, "").lower(),
                    "why": WHY[kind],
                    "turns": [(turn.role, turn.text[:LONGEST_TURN]) for turn in known[row["content_hash"]]],
                }
                for kind, row in rows
            ],
            "positive": positive,
            "negative": len(labels) - positive,
            "nothing": "No unlabelled row left here. Change the search, or type examples.",
            **said_to_be_done(QUEUE),
        },
        on_filled_change=lambda: None,
        on_settled_change=lambda: None,
    )
    if found.settled:
        st.rerun(scope="app")


def do_labels() -> bool:
    """Do what was asked by keys and is not done yet; whether there was something."""
    changed = False
    for audit, act in waiting(QUEUE):
        changed = True
        name, messages = str(act["probe"]), st.session_state.get("offered", {}).get(act["hash"])
        try:
            if act["kind"] == "undo":
                _undo(audit, name)
            elif act["kind"] == "skip":
                _skip(audit, name, act["hash"])
            elif messages is not None and act["label"] in (0, 1):
                put_label(name, messages, act["label"], audit)
        except AuditError as error:
            st.session_state["lab_error"] = str(error)
    return changed


def search_results(audit: Audit, name: str) -> None:
    """Rows with a text, each with buttons."""
    text = st.text_input(
        "Rows with the text",
        key="seek",
        bind="query-params",
        type="search",
        icon=":material/search:",
        placeholder='words, or "a phrase"',
    )
    if not text:
        st.info("Type words that an example may have, then label the rows that are found.", icon=":material/search:")
        return
    where = RowFilter(text=text)
    rows = audit.rows.sample(where, name, FOUND_SHOWN)
    known = {example.content_hash: example.label for example in audit.labels.list(name)}
    st.caption(f"{counted(audit.rows.count(where), 'row')}; {len(rows)} of them")
    for row in records(rows):
        with st.container(border=True, key=f"found-{row['example_id']}"):
            messages, label = messages_from_json(row["messages"]), known.get(row["content_hash"])
            with st.container(horizontal=True, vertical_alignment="center"):
                st.caption(f"row {row['example_id']:,}")
                for value, words in ((1, POSITIVE), (0, NEGATIVE)):
                    st.button(
                        words,
                        key=f"found-{value}-{row['example_id']}",
                        on_click=put_label,
                        args=(name, messages, value),
                        type="primary" if label == value else "secondary",
                        help=f"Row {row['example_id']}",
                    )
            st.html(conversation_html(row["messages"], None, None))


def typed(name: str) -> None:
    """A form for an example of one's own."""

    def add() -> None:
        prompt, response = (st.session_state["typed_prompt"].strip(), st.session_state["typed_response"].strip())
        if not response:
            st.session_state["lab_error"] = "The response is empty: type what the assistant says."
            return
        turns = ([Message("user", prompt)] if prompt else []) + [Message("assistant", response)]
        put_label(name, tuple(turns), 1 if st.session_state["typed_label"] == POSITIVE else 0)
        st.session_state["typed_prompt"] = st.session_state["typed_response"] = ""

    with st.form("typed", clear_on_submit=False, border=True):
        st.text_area("Prompt", key="typed_prompt", height=90, placeholder="What the user says (may be empty)")
        st.text_area("Response", key="typed_response", height=140, placeholder="What the assistant says")
        st.segmented_control("This response", [POSITIVE, NEGATIVE], default=POSITIVE, required=True, key="typed_label")
        st.form_submit_button("Add example", icon=":material/add:", on_click=add)


def uploaded(audit: Audit, name: str) -> None:
    """A box for a file of labelled examples."""
    st.caption(
        'Rows like those of the data (messages, or prompt and response), each with a "label" of 1 or 0. '
        "JSONL, JSON, CSV, TSV or Parquet."
    )
    file = st.file_uploader(
        "File of labelled examples", type=["jsonl", "json", "csv", "tsv", "parquet"], key="examples-file"
    )
    if file is None:
        return
    try:
        with TemporaryDirectory() as place:
            path = Path(place) / Path(file.name).name
            path.write_bytes(file.getvalue())
            examples = read_labelled(path)
    except AuditError as error:
        st.error(str(error), icon=":material/error:")
        return
    positive = sum(example.label for example in examples)
    st.markdown(f"**{positive}** show it · **{len(examples) - positive}** do not")
    if st.button(f"Add {len(examples):,} examples", type="primary", icon=":material/add:", key="add-file"):
        audit.labels.add(name, examples)
        st.rerun()
