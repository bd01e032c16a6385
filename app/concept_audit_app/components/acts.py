"""What people do by keys, from the browser to here: every act is done once, in its order.

The browser's half (`acts.js`) numbers the acts of a tab and keeps each until this half says that it is done. Acts come
through the courier, a component that is on every page: the one that they were made on may have been left.
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
COURIER = "courier"
"""The key of the component that brings acts."""


def acting_component(name: str, html: str, css: str, script: str, isolated: bool = True) -> ComponentRenderer:
    """A component whose script begins with `acts.js`."""
    js = (HERE / "acts.js").read_text("utf-8") + (HERE / script).read_text("utf-8")
    return st.components.v2.component(name, html=html, css=css, js=js, isolate_styles=isolated)


def waiting(queue: str) -> Iterator[tuple[Audit, dict[str, Any]]]:
    """The acts of a queue that are not done yet, each with its audit, which the visitor may have left.

    One counts as done when the next is asked for.
    """
    sent = (st.session_state.get(COURIER) or {}).get("acts")
    if not sent or queue not in sent or read_only():
        return
    asked = sent[queue]
    client, done = _done(queue)
    for act in asked["acts"]:
        if client != asked["client"] or act["n"] > done:
            audit = audit_named(str(act["audit"]))
            if audit is not None:
                yield audit, act
            # After each, since the run may be interrupted at any time.
            client, done = st.session_state[f"{queue}-done"] = (asked["client"], act["n"])


def said_to_be_done(queue: str) -> dict[str, Any]:
    """What the browser is told: which audit is open, which tab's acts are done, and up to which."""
    client, done = _done(queue)
    return {"audit": current_audit().name, "client": client, "done": done}


def _done(queue: str) -> tuple[str, int]:
    return st.session_state.get(f"{queue}-done", ("", 0))
