"""Concepts: search the SAE features, look at one, and rank the data by it."""

from __future__ import annotations

import streamlit as st

from app.components.heatmap import legend_html, ramp
from app.components.rows import RowCard
from app.components.session import current_audit
from app.components.url import choose, select_by_id

ORDERS = {
    "telling": "Stands out",
    "max_activation": "Strongest",
    "density": "Most frequent",
    "rarest": "Rarest",
    "feature_id": "Number",
}
TOP_ROWS = 5

audit = current_audit()
st.title("Concepts")
st.caption(
    "SAE features are directions that a sparse autoencoder found in the model's activations on this data. "
    "Each is named by the tokens on which it fires most reliably."
)
if not audit.overview().n_features:
    st.info(
        "This audit was built without an SAE (`--sae none`). Draw a probe instead.", icon=":material/info:"
    )
    st.page_link("app_pages/probe_lab.py", label="Probe lab", icon=":material/science:")
    st.stop()


def choose_from_table() -> None:
    """Put the row chosen in the table into the select box, and so into the URL."""
    chosen = st.session_state["features_table"].selection.rows
    if chosen:
        choose("feature", str(st.session_state["features_listed"][chosen[0]]))


table_side, feature_side = st.columns([6, 7], gap="medium")
with table_side:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        search = st.text_input(
            "Token", key="token", bind="query-params", type="search", placeholder="money, never, Einstein …",
            icon=":material/search:",
        )  # fmt: skip
        order = st.selectbox("Order", list(ORDERS), format_func=ORDERS.get, key="order", bind="query-params")
    features = audit.features(search or "", order)
    if features.empty:
        st.info(
            f"No feature fires on a token with “{search}”. Try a shorter piece of it.",
            icon=":material/search_off:",
        )
        st.stop()
    st.session_state["features_listed"] = features["feature_id"].tolist()
    st.caption(f"{len(features):,} features. Choose a row to see where it fires.")
    st.dataframe(
        features[["feature_id", "label", "n_examples", "max_activation"]],
        hide_index=True, height=560, key="features_table", on_select=choose_from_table,
        selection_mode="single-row", alt="SAE features with top tokens, density and maximum activation",
        column_config={
            "feature_id": st.column_config.NumberColumn("Feature", width=70),
            "label": st.column_config.TextColumn("Top tokens", width=210),
            "n_examples": st.column_config.NumberColumn("Rows", width=60, help="rows in which it fires"),
            "max_activation": st.column_config.NumberColumn("Max", width=60, format="%.1f", help="its highest activation"),
        },
    )  # fmt: skip

with feature_side:
    by_number = audit.features(order="feature_id").set_index("feature_id")
    feature = select_by_id(
        "Feature", [str(number) for number in by_number.index],
        lambda number: f"{number}: {by_number.label[int(number)]}", key="feature",
        default=str(features["feature_id"].iloc[0]),
    )  # fmt: skip
    about = by_number.loc[int(feature)]
    concept = f"sae:{feature}"
    with st.container(horizontal=True):
        st.metric("Fires on", f"{about.density:.2%}", border=True, help="share of response tokens")
        st.metric("Rows", f"{about.n_examples:,}", border=True)
        st.metric("Max activation", f"{about.max_activation:.1f}", border=True)
        st.metric("Layer", int(about.layer), border=True)
    st.page_link(
        "app_pages/ranking.py", label="Rank the data by this feature", icon=":material/format_list_numbered:",
        query_params={"concept": concept, "audit": audit.name},
    )  # fmt: skip
    top = audit.strongest_rows(int(feature), TOP_ROWS)
    heatmaps = audit.heatmaps(concept, top["example_id"].tolist())
    colours = ramp(heatmaps.values(), 0.0)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown("**Rows in which it fires highest**", width="content")
        st.html(legend_html(colours), width="content")
    for row in top.to_dict("records"):
        RowCard(row).fill(heatmaps.get(row["example_id"]), colours)
