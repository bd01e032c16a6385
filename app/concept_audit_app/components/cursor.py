"""The row on which keys act: walked through by key, and kept in sight."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from concept_audit_app.components.session import read_only


def cursor_of(ids: Sequence[int]) -> int:
    """The example under the cursor: where the visitor left it, or the first of the page."""
    kept = st.session_state.get("cursor")
    return kept if isinstance(kept, int) and kept in ids else int(ids[0])


def cursor_buttons(ids: Sequence[int], cursor: int) -> None:
    """Buttons to the row above and below, with their keys."""
    if read_only():
        return
    place = list(ids).index(cursor)
    for label, icon, key, step in (
        ("Row above", ":material/keyboard_arrow_up:", "K", -1),
        ("Row below", ":material/keyboard_arrow_down:", "J", 1),
    ):
        there = place + step
        inside = 0 <= there < len(ids)
        st.button(
            label,
            icon=icon,
            shortcut=key,
            key=f"cursor{step}",
            type="tertiary",
            disabled=not inside,
            on_click=_move,
            args=(int(ids[there]) if inside else cursor,),
            help="X and V flag the row with the coloured edge",
        )


def _move(example_id: int) -> None:
    st.session_state["cursor"] = example_id
    st.session_state["scroll"] = True


def scroll_to(cursor: int) -> None:
    """Mark the card under the cursor, and bring it into sight when it has just been moved."""
    st.html(f"<style>.st-key-current-{cursor}{{box-shadow:inset .25rem 0 0 #2b8a94;border-radius:.5rem}}</style>")
    if st.session_state.pop("scroll", False):
        st.html(
            f"<script>document.querySelector('.st-key-current-{cursor}')"
            "?.scrollIntoView({block: 'nearest', behavior: 'smooth'});</script>",
            unsafe_allow_javascript=True,
        )
