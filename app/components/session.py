"""Which audit the visitor looks at, loaded once and shared by all sessions."""

from __future__ import annotations

import os
from pathlib import Path

import streamlit as st

from backend import Audit, AuditError, audit_names
from backend.serve import AUDIT_VARIABLE, CACHE_VARIABLE


def cache_directory() -> Path:
    """Where the audits lie."""
    return Path(os.environ.get(CACHE_VARIABLE, "cache"))


@st.cache_resource(show_spinner=False)
def _load(root: str, manifest_changed: int) -> Audit:
    return Audit(root)


def first_page() -> None:
    """Go back to the first page of a list, since what it lists has changed."""
    if "page" in st.session_state:
        st.session_state["page"] = 1


def choose_audit() -> None:
    """Let the visitor choose an audit in the sidebar, where there are several; stops if there is none."""
    names = audit_names(cache_directory())
    if not names:
        st.title("No audit yet")
        st.write("Build the demo, or an audit of your own data, then reload this page:")
        st.code(
            "concept-audit demo\nconcept-audit build --data train.jsonl --model smollm2-135m-instruct", "bash"
        )
        st.stop()
    wanted = os.environ.get(AUDIT_VARIABLE)
    with st.sidebar:
        st.selectbox(
            "Audit",
            names,
            index=names.index(wanted) if wanted in names else 0,
            key="audit",
            bind="query-params",
            help=f"Audits in {cache_directory()}",
        )


def current_audit() -> Audit:
    """The audit that the visitor has open; says what is wrong and stops if it cannot be opened."""
    root = cache_directory() / st.session_state["audit"]
    manifest = root / "manifest.json"
    try:
        return _load(str(root), manifest.stat().st_mtime_ns)
    except (AuditError, OSError) as error:
        st.error(str(error), icon=":material/error:")
        st.stop()
