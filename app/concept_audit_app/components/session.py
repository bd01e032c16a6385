"""Which audit the visitor looks at, loaded once and shared by all sessions; and who the visitor is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from urllib.parse import quote, unquote

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from concept_audit import Audit, AuditError, audit_names, is_allowed
from concept_audit.serve import (
    ALLOWED_VARIABLE,
    AUDIT_VARIABLE,
    CACHE_VARIABLE,
    DEVICE_VARIABLE,
    READ_ONLY_VARIABLE,
    TRUST_VARIABLE,
)
from concept_audit_app.components.plain import plain

LONGEST_NAME = 60
NAME_COOKIE, COOKIE_SECONDS = "concept-audit-name", 365 * 24 * 3600


def cache_directory() -> Path:
    """Where the audits lie."""
    return Path(os.environ.get(CACHE_VARIABLE, "cache"))


def served_audits() -> list[str]:
    """Names of the audits that visitors may see: the one that `concept-audit serve AUDIT` names, or all."""
    names = audit_names(cache_directory())
    wanted = os.environ.get(AUDIT_VARIABLE)
    return [name for name in names if name == wanted] if wanted else names


def read_only() -> bool:
    """Whether nothing may be changed (`concept-audit serve --read-only`)."""
    return os.environ.get(READ_ONLY_VARIABLE) == "1"


@st.cache_resource(show_spinner=False, max_entries=8)
def _load(root: str, manifest_changed: int, sealed: bool) -> Audit:
    audit = Audit(
        root,
        read_only=sealed,
        device=os.environ.get(DEVICE_VARIABLE) or None,
        trust_remote_code=os.environ.get(TRUST_VARIABLE) == "1",
    )
    audit.overview()  # says at once what is wrong with its store
    return audit


def sign_in() -> None:
    """Ask for a login where the server has an OpenID Connect provider configured; stops until it is given.

    Who logs in must also be on the list that the server was started with: a provider such
    as a public mail service knows everybody.
    """
    if not _has_login():
        return
    if st.user.is_logged_in:
        allowed = [entry for entry in os.environ.get(ALLOWED_VARIABLE, "").split("\n") if entry]
        if is_allowed(st.user.to_dict(), allowed):
            return
        st.title("Concept audit")
        st.error(f"{plain(person() or 'This account')} is not on this server's list.")
        st.write("Ask whoever runs it to start it with your address or its domain:")
        st.code("concept-audit serve --allow you@example.org,example.com", "bash")
        st.button("Log out", icon=":material/logout:", on_click=st.logout)
        st.stop()
    st.title("Concept audit")
    st.write("This server asks who you are, so that flags and labels carry your name.")
    st.button("Log in", type="primary", icon=":material/login:", on_click=st.login)
    st.stop()


def who_box() -> None:
    """Say who is logged in; or, without a login, let visitors say what to call them in the log of flags."""
    if _has_login():
        with st.popover("Account", icon=":material/person:", type="tertiary"):
            st.caption(f"Logged in as {plain(person())}")
            st.button("Log out", icon=":material/logout:", type="tertiary", on_click=st.logout)
    elif not read_only():
        with st.popover("You", icon=":material/person:", type="tertiary"):
            _name_box()


def _name_box() -> None:
    if "who" not in st.session_state:
        found = st.context.cookies.to_dict().get(NAME_COOKIE)
        kept = unquote(found)[:LONGEST_NAME] if isinstance(found, str) else ""
        st.session_state["who"] = st.session_state["who-kept"] = kept
    name = st.text_input(
        "Your name",
        key="who",
        max_chars=LONGEST_NAME,
        persist_state="session",
        placeholder="for the log of flags",
        help="Stands beside the flags that you set, and is kept in this browser. Empty: the account that the "
        "server runs under.",
    )
    if name != st.session_state.get("who-kept"):
        st.session_state["who-kept"] = name
        cookie = f"{NAME_COOKIE}={quote(name, safe='')}; path=/; max-age={COOKIE_SECONDS}; samesite=strict"
        st.html(f"<script>document.cookie = {json.dumps(cookie)};</script>", unsafe_allow_javascript=True)


def person() -> str:
    """The visitor's name, for the log; empty where nobody said."""
    if _has_login() and st.user.is_logged_in:
        return str(st.user.get("email") or st.user.get("name") or st.user.get("sub") or "")
    return str(st.session_state.get("who") or "").strip()


def _has_login() -> bool:
    try:
        return "auth" in st.secrets
    except FileNotFoundError:
        return False


def choose_audit(place: DeltaGenerator) -> None:
    """Let the visitor choose an audit, in a box in `place`; stops if there is none."""
    names = served_audits()
    if not names:
        st.title("No audit yet")
        st.write("Build the demo, or an audit of your own data, then reload this page:")
        st.code("concept-audit demo\nconcept-audit build --data train.jsonl --model smollm2-135m-instruct", "bash")
        st.stop()
    place.selectbox("Audit", names, key="audit", bind="query-params", label_visibility="collapsed", width=150)
    if st.session_state["audit"] not in names:
        st.error("There is no audit of this name here.", icon=":material/error:")
        st.stop()


def audit_named(name: str) -> Audit | None:
    """An audit that the visitor may see; None if there is none of this name, or it cannot be opened."""
    manifest = cache_directory() / name / "manifest.json"
    try:
        return (
            _load(str(manifest.parent), manifest.stat().st_mtime_ns, read_only()) if name in served_audits() else None
        )
    except (AuditError, OSError):
        return None


def current_audit() -> Audit:
    """The audit that the visitor has open; says what is wrong and stops if it cannot be opened."""
    root = cache_directory() / st.session_state["audit"]
    manifest = root / "manifest.json"
    try:
        return _load(str(root), manifest.stat().st_mtime_ns, read_only())
    except (AuditError, OSError) as error:
        st.error(str(error), icon=":material/error:")
        st.stop()
