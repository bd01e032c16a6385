"""What people do by keys, from the browser to here: every act is done once, in its order.

The browser's half (`acts.js`) numbers the acts of a tab and keeps each until this half says that it is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.components.v2.types import ComponentRenderer

from concept_audit import Audit
from concept_audit_app.components.session import audit_named, current_audit, read_only

HERE = Path(__file__).parent


def acting_component(name: str, html: str, css: str, script: str, isolated: bool = True) -> ComponentRenderer:
    """A component whose script begins with `acts.js`."""
    js = (HERE / "acts.js").read_text("utf-8") + (HERE / script).read_text("utf-8")
    return st.components.v2.component(name, html=html, css=css, js=js, isolate_styles=isolated)


def waiting(key: str) -> Iterator[tuple[Audit, dict[str, Any]]]:
    """The acts of a component that are not done yet, each with its audit, which the visitor may have left.

    One counts as done when the next is asked for.
    """
    asked = (st.session_state.get(key) or {}).get("acts")
    if not asked or read_only():
        return
    client, done = _done(key)
    for act in asked["acts"]:
        if client != asked["client"] or act["n"] > done:
            audit = audit_named(str(act["audit"]))
            if audit is not None:
                yield audit, act
            # After each, since the run may be interrupted at any time.
            client, done = st.session_state[f"{key}-done"] = (asked["client"], act["n"])


def said_to_be_done(key: str) -> dict[str, Any]:
    """What the browser is told: which audit is open, which tab's acts are done, and up to which."""
    client, done = _done(key)
    return {"audit": current_audit().name, "client": client, "done": done}


def _done(key: str) -> tuple[str, int]:
    return st.session_state.get(f"{key}-done", ("", 0))
