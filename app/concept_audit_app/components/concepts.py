"""Choosing a concept."""

from __future__ import annotations

import json

import streamlit as st

from concept_audit import Audit
from concept_audit_app.components.paging import first_page
from concept_audit_app.components.url import select_by_id


def concept_picker(audit: Audit, key: str = "concept", label: str = "Concept", bare: bool = False) -> str | None:
    """A select box of probes and SAE features, bound to the URL as `key`; None if there are none."""
    concepts = audit.concepts.list(live_only=True)
    if concepts.empty:
        return None
    names = {
        concept_id: concept_title(kind, concept_id, name, words)
        for kind, concept_id, name, words in sorted(
            zip(*(concepts[c].tolist() for c in ("kind", "concept_id", "name", "label")), strict=True),
            key=lambda row: row[0],
        )
    }
    # Where a link names the concept, the method that it names beside it is meant too.
    st.session_state[f"{key}-linked"] = st.query_params.get(key) not in (None, st.session_state.get(f"{key}-seen"))
    return select_by_id(
        label,
        list(names),
        lambda concept_id: names.get(concept_id, concept_id),
        key=key,
        on_change=first_page,
        help="A probe, or an SAE feature: type a few letters of a feature's tokens to find it",
        bare=bare,
    )


def concept_title(kind: str, concept_id: str, name: str, label: str) -> str:
    """A concept in one line."""
    if kind == "sae_feature":
        return f"Feature {concept_id.removeprefix('sae:')}: {label}"
    return f"Probe: {name}"


def probe_quality(details: str | dict) -> str:
    """Held-out AUROC of a probe with its interval, in words."""
    values = json.loads(details) if isinstance(details, str) else details
    if "auroc" not in values:
        return ""
    return f"{values['auroc']:.2f} ({values['auroc_low']:.2f}–{values['auroc_high']:.2f})"
