"""The gradient index: how far it is, and how faithful it is."""

from __future__ import annotations

import math
import threading
from shlex import quote

import streamlit as st

from concept_audit import Audit
from concept_audit_app.components.plain import plain
from concept_audit_app.components.session import current_audit, read_only

SECONDS_BETWEEN_LOOKS = 2.0


def index_state(audit: Audit) -> None:
    """Say what the index is good for, how far its building is, or how to build it."""
    index = audit.index.describe()
    if index is not None:
        st.caption(index_in_words(audit))
    elif audit.index.progress() is not None:
        watch_index()
    else:
        st.caption(
            "There is no gradient index. With one, the influence of a new concept takes seconds; build it with "
            f"`concept-audit index {quote(str(audit.root))}`."
        )


def index_in_words(audit: Audit) -> str:
    """What the index holds, and what was measured when it was built."""
    return f"Gradient index: {audit.index.holdings()}. {audit.index.agreement()}"


def minutes_left(audit: Audit) -> str:
    """How long the step of the building that is under way takes, in words; empty where nobody knows."""
    building = audit.index.progress()
    seconds = (building or {}).get("seconds_left")
    return f"about {max(1, math.ceil(seconds / 60))} min" if seconds else ""


@st.fragment(run_every=SECONDS_BETWEEN_LOOKS)
def watch_index() -> None:
    """How far the building is; the page is drawn anew as soon as the index answers."""
    audit = current_audit()
    building = audit.index.progress()
    if audit.index.describe() is not None:
        st.rerun(scope="app")
    if building is None:
        st.caption("The building of the gradient index has stopped; `concept-audit index` goes on where it was.")
        return
    left = f", {minutes_left(audit)} left of this step" if minutes_left(audit) else ""
    pace = f" ({plain(building['detail'])})" if building["detail"] else ""
    words = f"The gradient index is being built: {building['stage'].lower()}{left}{pace}"
    st.progress(min(building["share"], 1.0), words)


@st.cache_resource(show_spinner=False)
def _warmed(_audit: Audit, root: str, built: str) -> threading.Thread:
    thread = threading.Thread(target=_audit.index.warm, daemon=True)
    thread.start()
    return thread


def warm(audit: Audit) -> None:
    """Load the model and the index in the background, once, so that the first new concept is as fast as the next."""
    if not read_only() and (index := audit.index.describe()) is not None:
        _warmed(audit, str(audit.root), str(index["kept"]))
