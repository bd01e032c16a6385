"""The courier: brings what people do by keys to the server, from whatever page they are on by then."""

from __future__ import annotations

import streamlit as st

from concept_audit_app.components.acts import COURIER, HERE, said_to_be_done
from concept_audit_app.components.desk import QUEUE as ROWS
from concept_audit_app.components.desk import do_acts
from concept_audit_app.components.labelling import QUEUE as LABELS
from concept_audit_app.components.labelling import do_labels

WITH_DESK = ("audit", "probe_lab")
"""Pages on which people act by keys: these ask to be drawn anew when the keys have been quiet."""
# The one component that is on every page has the manners of the Back button and of the focus beside its own.
JS = "".join((HERE / name).read_text("utf-8") for name in ("steps.js", "focus.js", "courier.js"))
_component = st.components.v2.component("concept_audit_courier", js=JS)


def do_what_was_asked() -> bool:
    """Do what was asked by keys and is not done yet; whether there was something."""
    return any([do_acts(), do_labels()])


@st.fragment
def courier(page: str) -> None:
    """Take what comes from the browser while the page stays; before it, `do_what_was_asked`.

    Args:
        page: which one shows.
    """
    changed = do_what_was_asked()
    _component(
        key=COURIER,
        data={"page": page, "done": {queue: said_to_be_done(queue) for queue in (ROWS, LABELS)}},
        on_acts_change=lambda: None,
    )
    if changed and page not in WITH_DESK:
        st.rerun(scope="app")
