"""How far forecasts agreed with training, where that was measured on this audit."""

from __future__ import annotations

from shlex import quote

import streamlit as st

from concept_audit import Audit, forecast_table, forecast_verdict, probe_table
from concept_audit_app.components.tables import NOTHING, records


def measured(audit: Audit) -> None:
    """What came out of the latest trial on the present data; how to make one, where there is none."""
    kept = [row for row in records(audit.evidence.of_forecasts()) if row["current"]]
    st.subheader("Against training")
    if not kept:
        st.caption(
            "Nobody has measured on this audit how far its forecast agrees with training. It takes minutes to hours, so it "
            "runs in a terminal, goes on where it was if it is stopped, and shows up here when it is done:"
        )
        st.code(f"concept-audit validate {quote(str(audit.root))} --forecast --quick", None, wrap_lines=True)
        return
    evidence = audit.evidence.get(kept[0]["evidence_id"])
    for place, sentence in enumerate(forecast_verdict(evidence)):
        st.markdown(("Measured on this audit: " if not place else "") + sentence)
    about = evidence.about
    st.caption(
        f"On {about['n_prompts']} prompts, all {about['n_live']:,} features that fire on the data; brackets are 95% intervals "
        "over features, which are no independent draws."
    )
    features, probes = forecast_table(evidence), probe_table(evidence)
    with st.expander("Beside baselines, and by probe"):
        if len(features):
            st.dataframe(
                features,
                hide_index=True,
                placeholder=NOTHING,
                key="trial-features",
                alt="The forecast and its baselines against training",
            )
        if len(probes):
            st.dataframe(
                probes,
                hide_index=True,
                placeholder=NOTHING,
                key="trial-probes",
                alt="What training did to each probe's projection",
            )
        for name, why in about["lacking"].items():
            st.caption(f"Not told: {name.replace('_', ' ')}, since {why}.")
