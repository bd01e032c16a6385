"""Choosing a method, and how influence is computed."""

from __future__ import annotations

from typing import Any

import streamlit as st

from concept_audit import Audit, AuditError, Concept, InfluenceOptions, methods_of, usual_method
from concept_audit_app.components.index import index_state, minutes_left, watch_index
from concept_audit_app.components.paging import first_page
from concept_audit_app.components.progress import PageProgress
from concept_audit_app.components.refining import refiner
from concept_audit_app.components.url import choose, select_by_id

NAMES = {
    "feature_activation": "Feature activation",
    "vector_filter": "Vector filter",
    "projection_difference": "Projection difference",
    "concept_influence": "Concept influence",
    "influence_function": "Influence function",
    "gradient_dot": "Gradient dot product",
    "activation_similarity": "Activation similarity",
    "bm25": "BM25",
}
MEANINGS = {
    "feature_activation": "How strongly the feature fires, on average over the tokens of the row's response.",
    "vector_filter": "How far the row's response points along the concept.",
    "projection_difference": "How much further the row's response points along the concept than the answer that "
    "the model itself would give. The model answers every prompt once; the answers are kept.",
    "concept_influence": "How much training on the row would strengthen the concept on the query examples: the "
    "row's gradient against the concept's, through the curvature.",
    "influence_function": "How much training on the row would lower the loss on the query examples.",
    "gradient_dot": "As the influence function, without curvature.",
    "activation_similarity": "Cosine between the row's mean activation and that of the query examples.",
    "bm25": "Words that the row shares with the query examples.",
}
WITH_GRADIENTS = ("concept_influence", "influence_function", "gradient_dot")
SLOW = (*WITH_GRADIENTS, "projection_difference")
CURVATURES = {"ekfac": "EK-FAC", "kfac": "K-FAC", "identity": "Identity"}
ENGINES = {"auto": "Index", "exact": "Exact"}


def method_picker(audit: Audit, concept: Concept, bare: bool = False) -> str:
    """A select box of the methods that a concept has, bound to the URL; its usual one until another is chosen.

    A bare one shows no label.
    """
    return select_method("method", "Method", audit, concept, bare=bare)


def select_method(
    key: str, label: str, audit: Audit, concept: Concept, default: str | None = None, bare: bool = False
) -> str:
    """A select box of the methods that a concept has, bound to the URL as `key`.

    Args:
        default: None for the usual one.
    """
    pairs = audit.manifest.pair is not None
    offered, usual = methods_of(concept.kind, pairs), usual_method(concept.kind, pairs)
    _follow(key, usual)
    return select_by_id(
        label,
        offered,
        NAMES.__getitem__,
        key,
        default=default or usual,
        on_change=first_page,
        help="\n".join(f"* **{NAMES[m]}**: {MEANINGS[m]}" for m in offered),
        width=200,
        bare=bare,
    )


def _follow(key: str, usual: str) -> None:
    """Where the method was the usual one of the concept before, take this one's, unless a link asks for the method."""
    before = st.session_state.get(f"{key}-usual")
    st.session_state[f"{key}-usual"] = usual
    asked = st.session_state.get(f"{key.replace('method', 'concept')}-linked") and key in st.query_params
    if before is not None and not asked:
        for part in ("box", "latest"):
            if st.session_state.get(f"{key}-{part}") == before:
                st.session_state[f"{key}-{part}"] = usual


def influence_options(audit: Audit, concept: Concept, method: str) -> InfluenceOptions:
    """The options of a method that has any, in a popover; bound to the URL."""
    if method not in WITH_GRADIENTS:
        return InfluenceOptions()
    chosen: dict[str, Any] = {}
    with st.popover("Options", icon=":material/tune:"):
        if method == "concept_influence" and audit.index.describe() is not None:
            chosen["engine"] = st.segmented_control(
                "Computed by",
                list(ENGINES),
                default="auto",
                required=True,
                format_func=ENGINES.__getitem__,
                key="engine",
                bind="query-params",
                on_change=first_page,
                help="The gradient index answers in seconds and approximates; the overview says how its ranks agreed with "
                "exact ones when it was built. Exact scores take a pass over every row.",
            )
        if method != "gradient_dot":
            chosen["curvature"] = st.segmented_control(
                "Curvature",
                list(CURVATURES),
                default="ekfac",
                required=True,
                format_func=CURVATURES.__getitem__,
                key="curvature",
                bind="query-params",
                on_change=first_page,
                help="What training has to overcome to move a weight. Of the three EK-FAC is the closest to the Fisher "
                "matrix; its factors are fitted once and serve every concept.",
            )
        if method == "concept_influence" and concept.kind == "probe":
            layer = st.segmented_control(
                "Layer of the probe",
                ["trained", *map(str, audit.layers)],
                default="trained",
                required=True,
                format_func=lambda name: f"{concept.layer}, as trained" if name == "trained" else name,
                key="layer",
                bind="query-params",
                on_change=first_page,
                help="At another layer the probe is trained again from its labels.",
            )
            chosen["layer"] = None if layer == "trained" else int(layer)
        if concept.kind == "probe":
            chosen["contrast"] = st.toggle(
                "Contrast",
                key="contrast",
                bind="query-params",
                on_change=first_page,
                help="The positive examples minus the negative ones, instead of the positive ones alone.",
            )
        chosen["unit_normalised"] = st.toggle(
            "Unit-normalised",
            key="unit",
            bind="query-params",
            on_change=first_page,
            help="Divide by the size of each row's gradient, so that long or surprising rows do not win by it.",
        )
        chosen["partial"] = st.toggle(
            "Partial",
            key="partial",
            bind="query-params",
            on_change=first_page,
            help="Score by the linear layers alone where a model has much else to learn with, such as the experts of a "
            "mixture. Without it, such rankings are refused.",
        )
    return InfluenceOptions.of(**chosen)


def offer(audit: Audit, concept: Concept, method: str, options: InfluenceOptions) -> None:
    """Say what a ranking that is not there yet would cost, and compute it on demand."""
    rows = audit.overview().n_rows
    soon = (
        method == "concept_influence"
        and options.scoring.engine == "auto"
        and audit.index.describe() is None
        and audit.index.progress() is not None
    )
    with st.container(border=True, key="offer"):
        if soon:
            _meanwhile(audit, concept, method)
            st.space("small")
        st.markdown(f"**{NAMES[method]} of “{concept.name}” has not been computed yet.**")
        st.markdown(MEANINGS[method])
        if method == "projection_difference":
            st.caption(f"Answering {rows:,} prompts takes about a second a row on a laptop, and a fraction on a GPU.")
        else:
            st.caption(
                f"A forward and a backward pass over {rows:,} rows: about half a second a row on a laptop, and a "
                "fraction on a GPU. The first time, the curvature is fitted as well. If you leave, it goes on where "
                "it was when you compute it again."
            )
        if method == "concept_influence" and not soon:
            index_state(audit)
        if st.button("Compute", type="secondary" if soon else "primary", icon=":material/play_arrow:", key="compute"):
            try:
                with refiner().aside():
                    audit.rankings.ensure(concept.concept_id, method, options, PageProgress(cancel=True))
            except AuditError as error:
                st.error(str(error), icon=":material/error:")
                return
            st.rerun()


def _meanwhile(audit: Audit, concept: Concept, method: str) -> None:
    """While the gradient index is being built: how long that takes, and which method of the concept answers now."""
    usual = usual_method(concept.kind, audit.manifest.pair is not None)
    left = minutes_left(audit)
    when = f"{left} left of the step under way" if left else "it is being built"
    st.markdown(
        f"**{NAMES[method]} answers in seconds once the gradient index is there ({when}); this page shows it by itself "
        f"then.** {NAMES[usual]} ranks the rows by the same concept now: by what they say, not by what training on "
        "them would do."
    )
    watch_index()
    if st.session_state.get("method-latest") == method != usual:
        st.button(
            f"{NAMES[usual]} now",
            type="primary",
            icon=":material/bolt:",
            key="meanwhile",
            on_click=choose,
            args=("method", usual),
        )
