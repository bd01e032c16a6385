"""A row that is a window of a document: where it lies in it, and the way to all of its windows."""

from __future__ import annotations

import json
from typing import Any

import streamlit as st

from concept_audit import Window

DOCUMENT, NUMBER = "document_number", "window_number"
"""Metadata fields of a window, by which lists are filtered."""


def window_words(window: Window | None) -> str:
    """Where a row lies in its document; empty where it is no part of one."""
    if window is None or window.of == 1:
        return ""
    return f"window {window.number:,} of {window.of:,} of document {window.document:,}"


def metadata_of(metadata: str, window: Window | None) -> dict[str, Any]:
    """The metadata fields of a row, less those that say where a window lies, which `window_words` does.

    Args:
        metadata: as JSON.
    """
    fields: dict[str, Any] = json.loads(metadata)
    return fields if window is None else {name: fields[name] for name in fields if name not in (DOCUMENT, NUMBER)}


def document_link(window: Window | None) -> None:
    """To all windows of a row's document, where the acts on many rows are on these."""
    if window is None or window.of == 1:
        return
    kept = {name: value for name, value in st.query_params.items() if name in ("audit", "concept", "method")}
    st.page_link(
        "app_pages/ranking.py",
        label="Document",
        icon=":material/article:",
        help=f"All {window.of:,} windows of document {window.document:,}",
        query_params={**kept, f"where_{DOCUMENT}": str(window.document)},
    )
