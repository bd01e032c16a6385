"""Probe lab: draw a concept from labelled examples."""

from __future__ import annotations

import json

import streamlit as st

from app.components.index import warm
from app.components.progress import PageProgress
from app.components.rows import conversation_html
from app.components.session import current_audit
from backend import MIN_EACH, AuditError, LabelledExample, Message, RowFilter

QUEUES = {"shuffled": "Shuffled", "likely": "Likely", "unlikely": "Unlikely"}
QUEUE_LENGTH = 20

audit = current_audit()
warm(audit)
st.title("Probe lab")
st.caption(
    "A probe is a direction in the model's activations that tells examples of a behaviour from examples without it. "
    "Label some of both, train, and rank the whole data set by it."
)

known = audit.label_counts()
names = known["probe"].tolist()
with st.container(horizontal=True, vertical_alignment="bottom"):
    name = st.selectbox(
        "Probe", names, index=0 if names else None, key="probe", bind="query-params", accept_new_options=True,
        placeholder="Type a name for a new probe", help="Choose one, or type a new name and press Enter",
    )  # fmt: skip
    if name in names:
        with st.popover("Delete", icon=":material/delete:"):
            st.write("Delete the probe and its labels?")
            st.button(
                "Delete for good",
                type="primary",
                on_click=lambda: audit.delete_probe(st.session_state["probe"]),
            )
if not name:
    st.info(
        "Type a name for your probe above, for instance the behaviour that you are after.",
        icon=":material/edit:",
    )
    st.stop()

labels = audit.labels(name)
positives = [example for example in labels if example.label == 1]
negatives = [example for example in labels if example.label == 0]
saved = next((probe for probe in audit.probes() if probe.name == name), None)


def put_label(messages: tuple[Message, ...], label: int) -> None:
    """Keep one label; says why if it cannot be kept."""
    try:
        audit.label(name, [LabelledExample(messages, label)])
    except AuditError as error:
        st.session_state["lab_error"] = str(error)


def skip_row(content_hash: str) -> None:
    """Show another row."""
    st.session_state.setdefault("skipped", set()).add(content_hash)


def add_typed() -> None:
    """Keep a typed example and empty the form."""
    prompt, response = st.session_state["typed_prompt"].strip(), st.session_state["typed_response"].strip()
    if not response:
        st.session_state["lab_error"] = "The response is empty: type what the assistant says."
        return
    turns = ([Message("user", prompt)] if prompt else []) + [Message("assistant", response)]
    put_label(tuple(turns), 1 if st.session_state["typed_label"] == "Shows it" else 0)
    st.session_state["typed_prompt"] = st.session_state["typed_response"] = ""


if problem := st.session_state.pop("lab_error", None):
    st.error(problem, icon=":material/error:")

left, right = st.columns([7, 5], gap="large")
with left:
    source = st.segmented_control(
        "Examples", ["From the data", "Typed"], default="From the data", required=True, key="source",
        bind="query-params",
    )  # fmt: skip
    if source == "From the data":
        with st.container(horizontal=True, vertical_alignment="bottom"):
            queues = list(QUEUES) if saved else ["shuffled"]
            queue = st.segmented_control(
                "Offer rows", queues, format_func=QUEUES.get, default="shuffled", required=True, key="queue",
                bind="query-params", help="Likely and unlikely rows are offered once the probe is trained",
            )  # fmt: skip
            text = st.text_input(
                "With the text", key="with", bind="query-params", type="search", icon=":material/search:",
                placeholder="in prompt or response",
            )  # fmt: skip
        where = RowFilter(text=text or "")
        done = {example.content_hash for example in labels} | st.session_state.get("skipped", set())
        offered_at_most = QUEUE_LENGTH + len(done)
        try:
            if queue == "shuffled":
                offered = audit.sample(where, name, offered_at_most)
            elif queue == "likely":
                offered = audit.rank(f"probe:{name}", top=offered_at_most, where=where)
            else:
                offset = max(audit.count(where, f"probe:{name}") - offered_at_most, 0)
                offered = audit.rank(f"probe:{name}", top=offered_at_most, where=where, offset=offset).iloc[
                    ::-1
                ]
        except AuditError as error:
            st.error(str(error), icon=":material/error:")
            st.stop()
        waiting = offered[~offered["content_hash"].isin(done)]
        if waiting.empty:
            st.info(
                "No unlabelled row left here. Change the search, or type examples.",
                icon=":material/done_all:",
            )
        else:
            row = waiting.iloc[0]
            messages = tuple(Message(m["role"], m["content"]) for m in json.loads(row["messages"]))
            with st.container(horizontal=True):
                st.button(
                    "Shows it",
                    icon=":material/thumb_up:",
                    shortcut="Y",
                    type="primary",
                    on_click=put_label,
                    args=(messages, 1),
                )
                st.button(
                    "Does not",
                    icon=":material/thumb_down:",
                    shortcut="N",
                    on_click=put_label,
                    args=(messages, 0),
                )
                st.button(
                    "Skip",
                    icon=":material/skip_next:",
                    shortcut="S",
                    type="tertiary",
                    on_click=skip_row,
                    args=(row["content_hash"],),
                )
            with st.container(border=True):
                st.html(conversation_html(row["messages"], None, None))
    else:
        with st.form("typed", clear_on_submit=False, border=True):
            st.text_area(
                "Prompt", key="typed_prompt", height=90, placeholder="What the user says (may be empty)"
            )
            st.text_area("Response", key="typed_response", height=140, placeholder="What the assistant says")
            st.segmented_control(
                "This response",
                ["Shows it", "Does not"],
                default="Shows it",
                required=True,
                key="typed_label",
            )
            st.form_submit_button("Add example", icon=":material/add:", on_click=add_typed)

with right:
    with st.container(border=True):
        st.markdown(f"**{len(positives)}** show it · **{len(negatives)}** do not")
        missing = [
            f"{MIN_EACH - len(group)} more that {what}"
            for group, what in ((positives, "show it"), (negatives, "do not"))
            if len(group) < MIN_EACH
        ]
        if missing:
            st.caption(f"To train: label {' and '.join(missing)}. Twenty of each is better.")
        clicked = st.button(
            "Train", icon=":material/model_training:", type="primary", disabled=bool(missing), width="stretch"
        )
        if clicked:
            try:
                with st.spinner("Training on the labelled examples …"):
                    audit.train_probe(name, progress=PageProgress())
                    audit.ranking(f"probe:{name}")
                st.rerun()
            except AuditError as error:
                st.error(str(error), icon=":material/error:")
        if saved:
            stale = (saved.details["n_positive"], saved.details["n_negative"]) != (
                len(positives),
                len(negatives),
            )
            st.metric(
                "Held-out AUROC", f"{saved.details['auroc']:.2f}",
                help="The probability that a held-out example that shows the behaviour scores above one that does not; 0.5 is chance",
            )  # fmt: skip
            st.caption(
                f"95% interval {saved.details['auroc_low']:.2f} to {saved.details['auroc_high']:.2f} · layer "
                f"{saved.layer} · {saved.fit.replace('_', ' ')}"
            )
            if stale:
                st.caption("Labels have changed since: train again to use them.")
            st.page_link(
                "app_pages/ranking.py", label="See the ranking", icon=":material/format_list_numbered:",
                query_params={"concept": f"probe:{name}", "audit": audit.name},
            )  # fmt: skip
            st.page_link(
                "app_pages/ranking.py", label="Rank by influence", icon=":material/bolt:",
                query_params={
                    "concept": f"probe:{name}", "audit": audit.name, "method": "concept_influence",
                },
                help="The rows by how much training on them would strengthen this concept",
            )  # fmt: skip
    with st.expander(f"Labelled examples ({len(labels)})", expanded=False):
        for example in reversed(labels):
            with st.container(horizontal=True, vertical_alignment="top"):
                st.badge(
                    "shows it" if example.label else "does not", color="orange" if example.label else "blue"
                )
                st.text(example.messages[-1].content[:160], width="stretch")
                st.button(
                    "", icon=":material/close:", key=f"unlabel-{example.content_hash}", type="tertiary",
                    help="Forget this label", on_click=audit.unlabel, args=(name, [example.content_hash]),
                )  # fmt: skip
