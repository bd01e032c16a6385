"""Ways to label examples: a queue, search results, typed text, a file."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import streamlit as st

from concept_audit import Audit, AuditError, LabelledExample, Message, RowFilter, messages_from_json, read_labelled
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
POSITIVE, NEGATIVE = "Shows it", "Does not"


def remember(name: str, action: str, content_hash: str) -> None:
    """Note what was done, so that it can be undone."""
    st.session_state.setdefault(f"labelled-{name}", []).append((action, content_hash))


def put_label(name: str, messages: tuple[Message, ...], label: int) -> None:
    """Keep one label; says why if it cannot be kept."""
    example = LabelledExample(messages, label)
    try:
        current_audit().labels.add(name, [example])
        remember(name, "label", example.content_hash)
    except AuditError as error:
        st.session_state["lab_error"] = str(error)


def skip_row(name: str, content_hash: str) -> None:
    """Offer a row no more."""
    try:
        current_audit().queue.skip(name, [content_hash])
        remember(name, "skip", content_hash)
    except AuditError as error:
        st.session_state["lab_error"] = str(error)


def undo_label(name: str) -> None:
    """Take back the latest label or skip of this session."""
    action, content_hash = st.session_state[f"labelled-{name}"].pop()
    audit = current_audit()
    if action == "label":
        audit.labels.remove(name, [content_hash])
    else:
        audit.queue.unskip(name, content_hash)


def queue(audit: Audit, name: str, trained: bool) -> None:
    """One row after another, labelled by button or key."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
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
                help="By the probe as it was trained last; taken in turn",
            )
        text = st.text_input(
            "With the text",
            key="with",
            bind="query-params",
            type="search",
            icon=":material/search:",
            placeholder="in prompt or response",
        )
    try:
        found = audit.queue.next(name, RowFilter(text=text or ""), kinds or list(KINDS))
    except AuditError as error:
        st.error(str(error), icon=":material/error:")
        return
    messages: tuple[Message, ...] = ()
    if found is not None:
        kind, row = found
        messages = messages_from_json(row["messages"])
    history = st.session_state.get(f"labelled-{name}", [])
    with st.container(horizontal=True, vertical_alignment="center"):
        none = found is None
        st.button(
            POSITIVE,
            icon=":material/thumb_up:",
            shortcut="Y",
            type="primary",
            on_click=put_label,
            args=(name, messages, 1),
            disabled=none,
        )
        st.button(
            NEGATIVE,
            icon=":material/thumb_down:",
            shortcut="N",
            on_click=put_label,
            args=(name, messages, 0),
            disabled=none,
        )
        st.button(
            "Skip",
            icon=":material/skip_next:",
            shortcut="S",
            type="tertiary",
            on_click=skip_row,
            args=(name, "" if none else row["content_hash"]),
            disabled=none,
        )
        st.button(
            "Undo",
            icon=":material/undo:",
            shortcut="U",
            type="tertiary",
            on_click=undo_label,
            args=(name,),
            disabled=not history,
            help="Take back the latest label or skip",
        )
    if found is None:
        st.info("No unlabelled row left here. Change the search, or type examples.", icon=":material/done_all:")
        return
    st.caption(f"Row {int(row['example_id']):,}, {WHY[kind]}")
    with st.container(border=True, key="offered"):
        st.html(conversation_html(row["messages"], None, None))


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
    st.caption(f"{audit.rows.count(where):,} rows; {len(rows)} of them")
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
