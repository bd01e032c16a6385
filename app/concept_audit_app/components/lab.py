"""The Probe lab's frame: which probe is open, what to do where none is, and what its training changed."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from concept_audit import MIN_EACH, Audit, AuditError
from concept_audit_app.components.plain import plain
from concept_audit_app.components.session import read_only
from concept_audit_app.components.tables import records

LATEST = "concept-latest"
"""Where the pages keep the concept that was looked at last; see `select_by_id`."""
LISTED = 40
"""Probes that are named where none is open."""
SNIPPET = 90


def choose_probe(audit: Audit) -> tuple[str | None, bool]:
    """A box for the probe, or the name of a new one; the concept of the other pages, where it is a probe.

    Returns:
        its name, None where none is chosen; and whether it has labels.
    """
    latest, typed = st.session_state.get("probe-latest"), st.session_state.get("probe")  # a new one has no labels yet
    names = audit.labels.counts()["probe"].tolist()
    elsewhere = str(st.session_state.get(LATEST, "")).removeprefix("probe:")
    open_ = next((each for each in (elsewhere, latest) if each in names), names[0] if len(names) == 1 else None)
    name = st.selectbox(
        "Probe",
        [*names, *([typed] if typed and typed not in names else [])],
        index=None if open_ is None else names.index(open_),
        key="probe",
        bind="query-params",
        accept_new_options=not read_only(),
        placeholder="Choose a probe, or type a name for a new one" if names else "Type a name for a new probe",
        help="Choose one, or type a new name and press Enter",
        label_visibility="collapsed",
        width=340,
    )
    st.session_state["probe-latest"] = name
    if name and audit.probes.find(name):
        st.session_state[LATEST] = f"probe:{name}"
    return name, name in names


def invitation(audit: Audit) -> None:
    """What a probe is, how one is made, and those that there are."""
    counts = audit.labels.counts()

    def begin(name: str | None = None) -> None:
        chosen = (name or st.session_state.get("new-probe") or "").strip()
        if chosen:
            st.session_state["probe"] = chosen

    with st.container(border=True, key="invitation"):
        st.subheader("Draw a concept of your own")
        st.markdown(
            "A probe is a direction in the model's activations that tells examples of a behaviour from examples "
            "without it."
        )
        if read_only():
            st.info("This dashboard is read-only: probes can be looked at, not made.", icon=":material/lock:")
        else:
            st.markdown(
                "1. **Name** the behaviour that you are after.\n"
                f"2. **Label** rows by key: Y shows it, N does not. {MIN_EACH} of each will do to begin with.\n"
                "3. **Train**, see how well it tells held-out examples, and rank all rows by it."
            )
            with st.container(horizontal=True, vertical_alignment="bottom"):
                st.text_input(
                    "Name of a new probe",
                    key="new-probe",
                    placeholder="flattery, insecure code, a brand …",
                    on_change=begin,
                    width=340,
                )
                st.button("Begin", type="primary", icon=":material/arrow_forward:", on_click=begin)
    if counts.empty:
        if read_only():
            st.caption("There is no probe yet.")
        return
    st.markdown("**Or go on with one of these**")
    for row in records(counts.head(LISTED)):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.button(
                plain(row["probe"]),
                icon=":material/science:",
                type="tertiary",
                key=f"open-{row['probe']}",
                on_click=begin,
                args=(row["probe"],),
            )
            trained = "trained" if row["trained"] else "not trained yet"
            st.caption(f"{row['positives']} show it · {row['negatives']} do not · {trained}", width="content")


def top_change(audit: Audit, name: str) -> None:
    """The rows that entered, and left, the first rows of the ranking by the latest training."""
    try:
        change = audit.trainings.change(name)
    except AuditError:
        return  # an earlier training of other data or another model cannot be ranked by
    if change is None:
        return
    with st.container(border=True, key="top-change"):
        st.markdown(f"**What training changed** (version {change.before} to {change.now})")
        if change.entered.empty and change.left.empty:
            st.caption(f"The {change.top} strongest rows are the same.")
            return
        st.caption(f"{len(change.entered)} of the {change.top} strongest rows are new.")
        _rows(audit, name, "Entered", change.entered)
        _rows(audit, name, "Left", change.left)


def _rows(audit: Audit, name: str, title: str, rows: pd.DataFrame) -> None:
    with st.expander(f"{title}: {len(rows)}", expanded=title == "Entered"):
        for row in records(rows):
            st.page_link(
                "app_pages/ranking.py",
                label=f"#{row['before']:,} → **#{row['rank']:,}** {plain(row['response'][:SNIPPET])}",
                query_params={"audit": audit.name, "concept": f"probe:{name}", "row": str(row["example_id"])},
                help=f"Row {row['example_id']:,}",
            )
