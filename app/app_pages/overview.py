"""Overview: the data, the model, the concepts."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from app.components.concepts import probe_table
from app.components.index import index_state
from app.components.session import current_audit

FEATURES_SHOWN = 12

audit = current_audit()
counts = audit.overview()
made = audit.manifest.configuration

st.title(audit.name)
st.caption(
    f"{Path(made['data']).name} · {made['model']} ({made['dtype']}) · layers {', '.join(map(str, made['layers']))}".replace(
        "$", "\\$"
    )
)

with st.container(horizontal=True):
    st.metric("Rows", f"{counts.n_rows:,}", border=True)
    st.metric(
        "Response tokens", f"{counts.n_response_tokens:,}", border=True, help=f"of {counts.n_tokens:,} in all"
    )
    st.metric(
        "Duplicates",
        f"{counts.n_duplicates:,}",
        border=True,
        help="rows whose text came before; kept and scored",
    )
    st.metric(
        "Cut", f"{counts.n_truncated:,}", border=True,
        help=f"rows longer than {made['max_tokens']:,} tokens; {counts.n_unscored:,} have no response left to score",
    )  # fmt: skip
    st.metric("SAE features", f"{counts.n_features:,}", border=True, help="features that fire on this data")
    st.metric("Probes", f"{counts.n_probes:,}", border=True)
    st.metric("Flagged", f"{counts.n_flagged:,}", border=True)

left, right = st.columns(2, gap="large")
with left:
    st.subheader("Probes")
    probes = probe_table(audit)
    if probes.empty:
        st.info(
            "No probes yet. A probe is a concept that you draw yourself, from a few labelled examples.",
            icon=":material/science:",
        )
        st.page_link("app_pages/probe_lab.py", label="Draw a probe", icon=":material/science:")
    else:
        st.dataframe(probes, hide_index=True, alt="Probes with layer, held-out AUROC and number of examples")
        with st.container(horizontal=True):
            for name in probes["Probe"]:
                st.page_link(
                    "app_pages/ranking.py", label=f"Rank by {name}", icon=":material/format_list_numbered:",
                    query_params={"concept": f"probe:{name}", "audit": audit.name},
                )  # fmt: skip
    st.subheader("Influence")
    index_state(audit)
    st.subheader("Metadata")
    fields = audit.metadata_fields()
    if fields.empty:
        st.caption("The rows have no columns besides the conversation.")
    else:
        shown = fields.assign(top_values=[", ".join(values[:8]) for values in fields.top_values])
        st.dataframe(
            shown, hide_index=True, alt="Metadata fields with their most frequent values",
            column_config={
                "field": "Field", "n_rows": "Rows", "n_values": "Values", "top_values": "Most frequent",
            },
        )  # fmt: skip
with right:
    st.subheader("SAE features that stand out")
    features = audit.features(order="telling")
    if features.empty:
        st.info("This audit was built without an SAE (`--sae none`); use probes.", icon=":material/info:")
    else:
        quality = audit.manifest.report("sae")
        if quality:
            st.caption(
                f"Layer {made['sae_layer']}, trained on this data: held-out explained variance "
                f"{quality['explained_variance']:.2f}, {quality['l0']:.0f} features a token"
            )
        st.dataframe(
            features.head(FEATURES_SHOWN)[["feature_id", "label", "density", "max_activation"]],
            hide_index=True, height="content", alt="The SAE features that stand out most",
            column_config={
                "feature_id": "Feature", "label": "Top tokens",
                "density": st.column_config.NumberColumn("Density", format="percent"),
                "max_activation": st.column_config.NumberColumn("Max activation", format="%.1f"),
            },
        )  # fmt: skip
        st.page_link("app_pages/concepts.py", label="Search all features", icon=":material/category:")
