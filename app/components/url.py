"""A select box whose value is in the URL by its id.

Streamlit's own binding writes the label that people read; for concepts the id is
shorter, and stays when a label changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import streamlit as st


def select_by_id(
    label: str,
    ids: Sequence[str],
    format_func: Callable[[str], str],
    key: str,
    default: str | None = None,
    on_change: Callable[[], None] | None = None,
    help: str | None = None,
    width: int | str = "stretch",
) -> str:
    """A select box of ids; `key` is the query parameter. An id in the URL that is not offered is ignored."""
    box, seen = f"{key}-box", f"{key}-seen"
    in_url = st.query_params.get(key)
    if in_url != st.session_state.get(seen):
        # The URL has changed since the last run: a link, or the browser's back button.
        st.session_state[seen] = in_url
        if in_url in ids:
            st.session_state[box] = in_url
    if st.session_state.get(box) not in ids:
        st.session_state[box] = default if default in ids else ids[0]
    chosen = st.selectbox(
        label, ids, format_func=format_func, key=box, on_change=on_change, help=help, width=width
    )
    if chosen != in_url:
        st.query_params[key] = st.session_state[seen] = chosen
    return chosen


def choose(key: str, chosen: str) -> None:
    """Set the value of a `select_by_id` from a callback."""
    st.session_state[f"{key}-box"] = chosen
