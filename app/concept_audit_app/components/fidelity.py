"""How far a ranking can be relied on, behind a button above it."""

from __future__ import annotations

import streamlit as st

from concept_audit import Audit, Concept, InfluenceOptions
from concept_audit_app.components.index import index_in_words
from concept_audit_app.components.refining import refinement_state


def fidelity(audit: Audit, concept: Concept, method: str, options: InfluenceOptions, indexed: bool) -> None:
    """The button: which scores are exact, what was measured of the index, and where the rows stand that read as the concept.

    Nothing where nothing is known. A warning sign where those stand below the others.
    """
    asked = (concept.concept_id, method, options)
    own = audit.comparisons.on_own_rows(asked)
    index = indexed and audit.index.describe() is not None
    if not index and own is None:
        return
    below = own is not None and own.below
    with st.popover("Fidelity", icon=":material/warning:" if below else ":material/verified:", key="fidelity"):
        if own is not None and below:
            st.warning(own.in_words(), icon=":material/swap_vert:")
        if index:
            refinement_state(audit, *asked)
        if own is not None and not below:
            st.caption(own.in_words())
        if index:
            st.caption(index_in_words(audit))
