"""Views that have a name: a page with its filters, kept for everybody."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qsl, urlencode

import streamlit as st
from streamlit.navigation.page import StreamlitPage

from concept_audit_app.components.plain import plain
from concept_audit_app.components.session import current_audit, person, read_only
from concept_audit_app.components.tables import records


def named_views(pages: Mapping[str, StreamlitPage], here: str) -> None:
    """A popover with the views that have a name, and a box to name the present one.

    Args:
        pages: by their URL path.
        here: the present page's URL path.
    """
    audit = current_audit()
    views = audit.views.list()
    if views.empty and read_only():
        return
    with st.popover("Named views", icon=":material/bookmark:", type="tertiary"):
        if views.empty:
            st.caption(
                "A view is a page with its filters. Give the present one a name to find it again, and to show it to others."
            )
        for view in records(views):
            if view["page"] not in pages:
                continue
            with st.container(horizontal=True, vertical_alignment="center"):
                params = {**dict(parse_qsl(view["query"])), "audit": audit.name}
                st.page_link(pages[view["page"]], label=plain(view["name"]), query_params=params, width="stretch")
                if not read_only():
                    st.button(
                        "",
                        icon=":material/delete:",
                        key=f"forget-{view['name']}",
                        type="tertiary",
                        help=f"Forget the view {plain(view['name'])}",
                        on_click=audit.views.delete,
                        args=(view["name"],),
                    )
        if not read_only():
            with st.form("name-view", border=False, clear_on_submit=True):
                name = st.text_input("Name of this view", max_chars=60, placeholder="worth a second look")
                query = urlencode([(k, v) for k in st.query_params for v in st.query_params.get_all(k) if k != "audit"])
                if st.form_submit_button("Keep this view", icon=":material/bookmark_add:") and name.strip():
                    audit.views.save(name, here, query, person())
                    st.rerun()
