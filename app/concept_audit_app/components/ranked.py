"""A ranking that pages look at: chosen, computed if it has to be, and its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from concept_audit import Audit, AuditError, Concept, InfluenceOptions, Window
from concept_audit_app.components.asking import answers_asked
from concept_audit_app.components.concepts import concept_picker, probe_quality
from concept_audit_app.components.heatmap import legend_html, ramp
from concept_audit_app.components.methods import NAMES, SLOW, WITH_GRADIENTS, offer
from concept_audit_app.components.progress import PageProgress
from concept_audit_app.components.refining import ranking_key, refiner
from concept_audit_app.components.rows import RowCard
from concept_audit_app.components.scale import Scale
from concept_audit_app.components.session import read_only
from concept_audit_app.components.tables import records

QUERY_NOTE = "This row is one of the examples that influence is measured on."
OWN_LEFT_OUT = " It is scored by the others alone, so that it does not rank high by its likeness to itself."
PROJECTIONS = ("vector_filter", "projection_difference")
"""Methods whose scores are projections on the concept's direction, also of an SAE feature."""
COLOURS = {"influence": "Influence", "activation": "Activation"}


def chosen_concept(audit: Audit, key: str = "concept", label: str = "Concept", bare: bool = False) -> Concept:
    """The concept that the visitor picks; says what to do and stops where there is none.

    Args:
        bare: show no label above the box.
    """
    concept_id = concept_picker(audit, key, label, bare)
    if concept_id is None:
        st.info("There is no concept yet to rank the data by. Draw a probe first.", icon=":material/science:")
        st.page_link("app_pages/probe_lab.py", label="Probe lab", icon=":material/science:")
        st.stop()
    try:
        return audit.concept(concept_id)
    except AuditError as error:
        st.error(str(error), icon=":material/error:")
        st.stop()


def ready(audit: Audit, concept: Concept, method: str, options: InfluenceOptions) -> bool:
    """See that a ranking is there; returns whether the gradient index answers it.

    One that takes long is offered first, and the page stops until it is wanted.
    """
    wanted = (concept.concept_id, method, options)
    try:
        indexed = method in WITH_GRADIENTS and audit.rankings.served_by_index(*wanted)
        slow = method in SLOW and not read_only() and not audit.rankings.has(*wanted)
        if slow and not indexed:
            offer(audit, concept, method, options)
            st.stop()
        progress = PageProgress()
        alone = refiner().aside(ranking_key(audit, *wanted), progress) if slow else nullcontext()
        with st.spinner("Ranking the rows …"), alone:
            audit.rankings.ensure(*wanted, progress)
    except AuditError as error:
        st.error(str(error), icon=":material/error:")
        st.stop()
    return indexed


def colour_choice(method: str, indexed: bool) -> str:
    """What colours the tokens: ``activation``, or ``influence`` where the method has gradients."""
    if method not in WITH_GRADIENTS:
        return "activation"
    return st.segmented_control(
        "Colour tokens by",
        list(COLOURS),
        label_visibility="collapsed",
        default="activation" if indexed else "influence",
        required=True,
        format_func=COLOURS.__getitem__,
        key="colour-index" if indexed else "colour",
        bind="query-params",
    )


def cards(
    audit: Audit,
    rows: pd.DataFrame,
    concept: Concept,
    method: str,
    options: InfluenceOptions,
    colour_by: str,
    indexed: bool,
    legend: DeltaGenerator,
    scale: Scale,
    windows: Mapping[int, Window],
) -> None:
    """The rows as cards: at once as text, then with their tokens coloured.

    Args:
        legend: the container that takes the legend.
        scale: of the ranking's scores.
        windows: where rows lie in their documents, by example id.
    """
    ids = [int(i) for i in rows["example_id"]]
    own = audit.rows.own_answers(ids) if method == "projection_difference" else {}
    own |= answers_asked(ids)
    elsewhere = _elsewhere(audit, concept, method, ids)
    parameters = audit.rankings.find(concept.concept_id, method, options).request.parameters
    note = QUERY_NOTE + (OWN_LEFT_OUT if parameters.get("leave_out_own") else "")
    waiting = st.container()
    # The order is there before the colours are: people may read on meanwhile.
    drawn = [
        RowCard(
            row,
            own.get(number),
            elsewhere.get(number, ""),
            ask=not read_only(),
            layer=concept.layer,
            query_note=note,
            says_exact=indexed,
            scale=scale,
            window=windows.get(number),
        )
        for number, row in zip(ids, records(rows), strict=True)
    ]
    exact: dict[int, float] = {}
    centre = 0.0
    # A heatmap tells what the score does.
    projected = concept.kind == "probe" or method in PROJECTIONS
    try:
        with waiting, st.spinner("Computing the token values of these rows …"):
            if colour_by == "influence":
                heatmaps = audit.rows.influence_heatmaps(concept.concept_id, method, ids, options, PageProgress())
                estimated = [int(i) for i in rows["example_id"][~rows["exact"].astype(bool)]]
                exact = audit.rows.exact_scores(concept.concept_id, method, estimated, options) if indexed else {}
            else:
                heatmaps = audit.rows.heatmaps(concept.concept_id, ids, projected)
            if projected and colour_by == "activation":
                # Tokens are coloured by what they say, whatever the advantage of a rollout is.
                alike = InfluenceOptions.of(alike=True)
                centre = audit.rankings.summary(concept.concept_id, "vector_filter", alike)["mean"]
    except AuditError as error:
        waiting.warning(f"No heatmaps: {error}", icon=":material/warning:")
        return
    colours = ramp(heatmaps.values(), centre)
    with legend:
        st.html(legend_html(colours), width="content")
        words, more = _legend_words(audit, concept, colour_by, projected)
        if audit.manifest.rollouts is not None and colour_by == "activation":
            # Colours tell what the response says, whatever it got.
            words = f"before the advantage · {words}"
            more += ". The score is that of the tokens times the rollout's advantage"
        st.caption(words, help=more, width="content")
    for number, card in zip(ids, drawn, strict=True):
        card.fill(heatmaps.get(number), colours, exact.get(number))


def _legend_words(audit: Audit, concept: Concept, colour_by: str, projected: bool) -> tuple[str, str]:
    """What the colours of the tokens are: in a few words, that fit beside the legend, and in a sentence."""
    if colour_by == "influence":
        return (
            "what each token adds",
            "What each token adds to the row's score; prompt tokens add the rest, which the card names",
        )
    layer = f"layer {concept.layer}"
    if concept.kind == "sae_feature":
        if projected:
            return (
                "projection on the decoder",
                f"Each token's projection on the feature's decoder ({layer}), about the data's mean",
            )
        return "activation at each token", f"Activation of the feature at each token ({layer})"
    quality = next((dict(probe.details) for probe in audit.probes.list() if probe.name == concept.name), {})
    return (
        f"held-out AUROC {probe_quality(quality)}",
        f"Each token's projection on the probe ({layer}), about the data's mean. Held-out AUROC: how well the probe "
        "tells labelled examples apart that it was not trained on",
    )


def _elsewhere(audit: Audit, concept: Concept, method: str, ids: Sequence[int]) -> dict[int, str]:
    """Where the other methods that have been computed rank rows."""
    elsewhere = audit.rankings.scores_elsewhere(concept.concept_id, ids)
    found: dict[int, dict[str, str]] = {}
    for row in records(elsewhere):
        if row["method"] != method:
            words = f"{NAMES[row['method']]} #{row['rank']:,}"
            found.setdefault(int(row["example_id"]), {})[row["method"]] = words
    return {number: " · ".join(words.values()) for number, words in found.items()}
