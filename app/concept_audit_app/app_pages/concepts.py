"""Concepts: search the SAE features, look at one, and rank the data by it."""

from __future__ import annotations

import streamlit as st

from concept_audit_app.components.features import (
    figures,
    label_origin,
    meaning,
    name_box,
    rows_by_quantile,
    similar,
    walk,
)
from concept_audit_app.components.heatmap import style_sheet
from concept_audit_app.components.own_text import own_text
from concept_audit_app.components.rows import page_problem
from concept_audit_app.components.session import current_audit
from concept_audit_app.components.url import choose, select_by_id

ORDERS = {
    "telling": "Stands out",
    "max_activation": "Strongest",
    "density": "Most frequent",
    "rarest": "Rarest",
    "feature_id": "Number",
}

audit = current_audit()
style_sheet()
st.title("Concepts")
st.caption(
    "SAE features are directions that a sparse autoencoder found in the model's activations on this data. "
    "Each is named by the tokens on which it fires most reliably, or by a label that tells more."
)
if not audit.overview().n_features:
    st.info("This audit was built without an SAE (`--sae none`). Draw a probe instead.", icon=":material/info:")
    st.page_link("app_pages/probe_lab.py", label="Probe lab", icon=":material/science:")
    st.stop()
page_problem()


def choose_from_table() -> None:
    """Put the row chosen in the table into the select box, and so into the URL."""
    chosen = st.session_state["features_table"].selection.rows
    if chosen:
        choose("feature", str(st.session_state["features_listed"][chosen[0]]))


every = audit.concepts.features(order="feature_id", live_only=False).set_index("feature_id")
table_side, feature_side = st.columns([6, 7], gap="medium")
with table_side:
    way = st.segmented_control(
        "Find features",
        ["By token", "By your own text"],
        default="By token",
        required=True,
        key="way",
        bind="query-params",
    )
    if way == "By your own text":
        features = own_text(audit, every)
    else:
        with st.container(horizontal=True, vertical_alignment="bottom"):
            search = st.text_input(
                "Token or label",
                key="token",
                bind="query-params",
                type="search",
                placeholder="money, never …",
                icon=":material/search:",
                help="In the label, the tokens on which a feature fires, or the tokens that it makes more likely",
            )
            order = st.selectbox(
                "Order", list(ORDERS), format_func=ORDERS.__getitem__, key="order", bind="query-params", width=160
            )
        with st.container(horizontal=True, vertical_alignment="bottom"):
            shares = [0.0, 0.0001, 0.001, 0.01, 0.1, 1.0]
            low, high = st.select_slider(
                "Fires on (share of tokens)",
                shares,
                value=(shares[0], shares[-1]),
                format_func=lambda s: f"{s:.2%}",
                key="density",
                bind="query-params",
            )
            dead = st.toggle("Dead too", key="dead", bind="query-params", help="Features that never fire on this data")
        features = audit.concepts.features(search or "", order, live_only=not dead)
        features = features[(features.density >= low) & (features.density <= high)]
        if features.empty:
            st.info(
                f"No feature for “{search}”. Try a shorter piece of it, or other shares."
                if search
                else "No feature fires so often. Widen the span of shares.",
                icon=":material/search_off:",
            )
    if len(features):
        st.session_state["features_listed"] = features["feature_id"].tolist()
        st.caption(f"{len(features):,} features. Choose a row to see where it fires.")
        # Until `concept-audit label` has been run no label has a score.
        scored = ["label_score"] if features["label_score"].notna().any() else []
        st.dataframe(
            features[["feature_id", "label", *scored, "n_examples", "max_activation"]],
            hide_index=True,
            height=560,
            key="features_table",
            on_select=choose_from_table,
            selection_mode="single-row",
            alt="SAE features with top tokens, density and maximum activation",
            column_config={
                "feature_id": st.column_config.NumberColumn("Feature", width=65),
                "label": st.column_config.TextColumn("Label", width=150),
                "label_score": st.column_config.NumberColumn(
                    "Tells",
                    width=50,
                    format="%.2f",
                    help="how well the label tells where the feature fires: balanced accuracy, 0.50 for a guess; "
                    "made by `concept-audit label`",
                ),
                "n_examples": st.column_config.NumberColumn("Rows", width=50, help="rows in which it fires"),
                "max_activation": st.column_config.NumberColumn(
                    "Max", width=60, format="%.1f", help="its highest activation"
                ),
            },
        )

with feature_side:
    listed = features if len(features) else every.reset_index()
    feature = select_by_id(
        "Feature",
        [str(number) for number in every.index],
        lambda number: f"{number}: {every.label[int(number)]}",
        key="feature",
        default=str(listed["feature_id"].iloc[0]),
    )
    walk(listed, feature)
    about = audit.concepts.feature(int(feature))
    figures(about)
    if not about.density:
        st.info(
            "This feature is dead: it fires on no token of this data, so there is nothing to show or to rank.",
            icon=":material/do_not_disturb_on:",
        )
        st.stop()
    with st.container(horizontal=True, vertical_alignment="center"):
        st.page_link(
            "app_pages/ranking.py",
            label="Rank the data by this feature",
            icon=":material/format_list_numbered:",
            query_params={"concept": f"sae:{feature}", "audit": audit.name},
        )
        name_box(audit, about)
        st.caption(f"layer {int(about.layer)}", width="content")
    label_origin(audit, about)
    meaning(audit, about)
    similar(audit, f"sae:{feature}", int(feature))
    rows_by_quantile(audit, f"sae:{feature}", int(feature))
