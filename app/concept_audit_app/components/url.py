"""Values that live in the URL by hand, where Streamlit's own binding does not fit.

Its binding writes the label that people read; for concepts the id is shorter, and
stays when a label changes. And a span that is brushed in a chart has no widget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import streamlit as st


def in_url(key: str) -> str | None:
    """The value of a query parameter that callbacks may change by `put`."""
    values = all_in_url(key)
    return values[-1] if values else None


def put(key: str, value: str | None) -> None:
    """Change the value of `in_url` from a callback; None takes it out of the URL."""
    put_all(key, () if value is None else (value,))


def all_in_url(key: str) -> tuple[str, ...]:
    """As `in_url`, of a parameter that may be there many times; changed by `put_all`."""
    kept, seen = f"{key}-value", f"{key}-seen"
    there = tuple(st.query_params.get_all(key))
    if there != st.session_state.get(seen, ()):
        # The URL has changed since the last run: a link, or the browser's back button.
        st.session_state[seen] = st.session_state[kept] = there
    values: tuple[str, ...] = st.session_state.get(kept, ())
    if values != there:
        st.session_state[seen] = values
        if values:
            st.query_params[key] = values
        else:
            del st.query_params[key]
    return values


def put_all(key: str, values: Sequence[str]) -> None:
    """Change the values of `all_in_url` from a callback; none takes it out of the URL."""
    st.session_state[f"{key}-value"] = tuple(values)
    # What the browser sent with this act may be older than what an act just before it wrote: not a change to follow.
    st.session_state[f"{key}-seen"] = tuple(st.query_params.get_all(key))


def select_by_id(
    label: str,
    ids: Sequence[str],
    format_func: Callable[[str], str],
    key: str,
    default: str | None = None,
    on_change: Callable[[], None] | None = None,
    help: str | None = None,
    width: int | Literal["stretch"] = "stretch",
    bare: bool = False,
) -> str:
    """A select box of ids; `key` is the query parameter. An id in the URL that is not offered is ignored.

    Args:
        bare: show no label above the box; its words are there for screen readers.
    """
    box, seen = f"{key}-box", f"{key}-seen"
    there = st.query_params.get(key)
    if there != st.session_state.get(seen):
        st.session_state[seen] = there
        if there in ids:
            st.session_state[box] = there
    latest = f"{key}-latest"
    if st.session_state.get(box) not in ids:
        # A box that another page had is forgotten with it; what was chosen there is not.
        before = st.session_state.get(latest)
        st.session_state[box] = next((each for each in (before, default) if each in ids), ids[0])
    chosen = st.selectbox(
        label,
        ids,
        format_func=format_func,
        key=box,
        on_change=on_change,
        help=None if bare else help,
        width=width,
        label_visibility="collapsed" if bare else "visible",
    )
    if on_change is not None and st.session_state.get(latest, chosen) != chosen and "page" not in st.query_params:
        on_change()  # it may have come by a link, or have been chosen on another page
    st.session_state[latest] = chosen
    if chosen != there:
        st.query_params[key] = st.session_state[seen] = chosen
    return chosen


def choose(key: str, chosen: str) -> None:
    """Set the value of a `select_by_id` from a callback."""
    st.session_state[f"{key}-box"] = chosen
