"""Features that fire on a text of the visitor's own."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from concept_audit import Audit, AuditError, Heatmap, Segment, TextFeatures
from concept_audit_app.components.heatmap import ramp, text_html, turn_html
from concept_audit_app.components.url import choose

SHOWN = 40


@st.cache_data(show_spinner="Running the model on your text …", max_entries=64)
def _found(_audit: Audit, root: str, text: str) -> TextFeatures:
    return _audit.concepts.of_text(text)


def _new_text() -> None:
    """Remember that the text was typed just now, and did not come with the URL, which names a feature too."""
    st.session_state["sentence-new"] = True


def own_text(audit: Audit, every: pd.DataFrame) -> pd.DataFrame:
    """A box for a text, its tokens coloured by the strongest chosen feature, and the features that fire on it.

    A text typed just now opens its strongest feature, unless the one that is open fires on it too.

    Args:
        every: all features by their number.
    """
    text = st.text_area(
        "Your text",
        key="sentence",
        bind="query-params",
        height=90,
        max_chars=2000,
        placeholder="Type what a model might say: which features fire on which token?",
        on_change=_new_text,
    )
    if not text or not text.strip():
        st.info("Type a sentence above, and press Ctrl+Enter.", icon=":material/edit:")
        return every.iloc[:0].reset_index()
    try:
        found = _found(audit, f"{audit.root}:{audit.manifest.created}", text)
    except AuditError as error:
        st.error(str(error), icon=":material/error:")
        return every.iloc[:0].reset_index()
    strongest = [each for each in found.strongest() if every.density[each[0]] > 0][:SHOWN]
    if not strongest:
        st.info("No feature fires on this text. Try a longer one.", icon=":material/search_off:")
        return every.iloc[:0].reset_index()
    shown = st.session_state.get("feature-box")
    if st.session_state.pop("sentence-new", False) and shown not in [str(each[0]) for each in strongest]:
        shown = str(strongest[0][0])
        choose("feature", shown)
    number, _, fired = next((each for each in strongest if str(each[0]) == shown), strongest[0])
    values = dict(fired)
    segments = tuple(Segment(token, values.get(i, 0.0)) for i, token in enumerate(found.tokens))
    heatmap = Heatmap(-1, (segments,), signed=False)
    st.html(
        f'<div style="white-space:pre-wrap;line-height:1.7" dir="auto">{turn_html(segments, ramp([heatmap], 0.0))}</div>'
        f'<div style="font-size:.8rem;opacity:.8">coloured by feature {number}: {text_html(every.label[number])}</div>'
    )
    listed = every.loc[[number for number, _, _ in strongest]].reset_index()
    # The table's last column is then the strength on this text.
    return listed.assign(max_activation=[highest for _, highest, _ in strongest])
