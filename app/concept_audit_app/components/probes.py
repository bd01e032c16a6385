"""A probe being made: how good it would be, training it, its versions and files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import streamlit as st

from concept_audit import (
    MIN_EACH,
    Audit,
    AuditError,
    LabelledExample,
    ProbeReport,
    RowFilter,
    SavedProbe,
    precision_recall,
)
from concept_audit_app.components.charts import QUIET, precision_recall_chart
from concept_audit_app.components.plain import counted, plain
from concept_audit_app.components.progress import PageProgress
from concept_audit_app.components.session import read_only
from concept_audit_app.components.tables import records
from concept_audit_app.components.url import put

NEAREST = 5
STEPS = 60


def training(
    audit: Audit, name: str, labels: Sequence[LabelledExample], saved: SavedProbe | None, with_counts: bool
) -> None:
    """Counts, unless they stand elsewhere on the page; what is missing, and the button."""
    positive = sum(example.label for example in labels)
    negative = len(labels) - positive
    if with_counts:
        st.markdown(f"**{positive}** show it · **{negative}** do not")
    missing = [
        f"{MIN_EACH - count} more that {what}"
        for count, what in ((positive, "show it"), (negative, "do not"))
        if count < MIN_EACH
    ]
    if missing:
        st.progress(min(positive, MIN_EACH) / (2 * MIN_EACH) + min(negative, MIN_EACH) / (2 * MIN_EACH))
        st.caption(f"To train: label {' and '.join(missing)}. Twenty of each is better.")
    clicked = st.button(
        "Train again" if saved else "Train",
        icon=":material/model_training:",
        type="primary",
        disabled=bool(missing),
        width="stretch",
        key="train",
        help="T",
    )
    if clicked:
        try:
            with st.spinner("Training on the labelled examples …"):
                audit.train_probe(name, progress=PageProgress())
                audit.rankings.ensure(f"probe:{name}")
            st.rerun()
        except AuditError as error:
            st.error(str(error), icon=":material/error:")
    if saved and not _is_of(saved, labels):
        st.caption("Labels have changed since it was trained: train again to use them.")


def _is_of(saved: SavedProbe, labels: Sequence[LabelledExample]) -> bool:
    """Whether a probe was trained on as many labels of either kind."""
    positive = sum(example.label for example in labels)
    return (saved.details["n_positive"], saved.details["n_negative"]) == (positive, len(labels) - positive)


def links(audit: Audit, name: str) -> None:
    """To the rankings by a trained probe."""
    with st.container(horizontal=True):
        st.page_link(
            "app_pages/ranking.py",
            label="See the ranking",
            icon=":material/format_list_numbered:",
            query_params={"concept": f"probe:{name}", "audit": audit.name},
        )
        st.page_link(
            "app_pages/ranking.py",
            label="Rank by influence",
            icon=":material/bolt:",
            query_params={"concept": f"probe:{name}", "audit": audit.name, "method": "concept_influence"},
            help="The rows by how much training on them would strengthen this concept",
        )


def trained_figures(saved: SavedProbe) -> None:
    """What its training found."""
    details = saved.details
    st.metric(
        "Held-out AUROC",
        f"{details['auroc']:.2f}",
        help="The probability that a held-out example that shows the behaviour scores above one that does not; "
        "0.5 is chance. By nested cross-validation: the layer and the fit are chosen anew within each fold.",
    )
    st.caption(
        f"As trained (version {saved.version}): 95% interval {details['auroc_low']:.2f} to {details['auroc_high']:.2f} · "
        f"layer {saved.layer} · {saved.fit.replace('_', ' ')}"
    )


@st.cache_data(show_spinner=False, max_entries=200)
def _report(_audit: Audit, root: str, name: str, labels: tuple[tuple[str, int], ...]) -> ProbeReport:
    return _audit.probes.report(name)


@st.cache_data(show_spinner=False, max_entries=200)
def _held_out(
    _audit: Audit, root: str, name: str, version: int, labels: tuple[tuple[str, int], ...]
) -> tuple[np.ndarray, np.ndarray]:
    return _audit.probes.held_out(name)


def report(audit: Audit, name: str, labels: Sequence[LabelledExample], saved: SavedProbe | None) -> None:
    """Held-out evidence with the labels so far: told anew after every label."""
    identity = tuple(sorted((example.content_hash, example.label) for example in labels))
    try:
        with st.spinner("Scoring held-out examples …"):
            found = _report(audit, str(audit.root), name, identity)
            held_out = _held_out(audit, str(audit.root), name, saved.version, identity) if saved else None
    except AuditError:
        return
    # One figure: the trained probe's own, as long as it is of these labels.
    area = found.auroc
    if saved and _is_of(saved, labels):
        area = saved.details["auroc"]
    else:
        low, high = found.auroc_interval
        st.markdown(
            f"With these labels, held out: **AUROC {found.auroc:.2f}** ({low:.2f} to {high:.2f}) at layer {found.layer}"
        )
    chance = found.random_auroc[1]
    st.caption(
        f"Of probes from the same examples with labels shuffled, each at its best layer, 95 in 100 stay below {chance:.2f}: "
        + ("this one has learned something." if area > chance else "this one cannot be told from chance yet.")
    )
    st.caption(
        "By layer, differences of means: "
        + " · ".join(f"{layer}:\u00a0{each:.2f}" for layer, each in sorted(found.by_layer.items()))
    )
    _threshold(audit, name, saved, *(held_out or (found.scores, found.labels)))


def _threshold(audit: Audit, name: str, saved: SavedProbe | None, scores: np.ndarray, labels: np.ndarray) -> None:
    """Precision and recall at a threshold; of the trained probe, where there is one, and of the data's rows."""
    thresholds, precision, recall = precision_recall(scores, labels)
    low, high = float(thresholds.min()), float(thresholds.max())
    if not high > low:
        return
    place = st.empty()
    chosen = st.slider(
        "Threshold",
        low,
        high,
        min(max(0.0, low), high),
        (high - low) / STEPS,
        format="%.3f",
        key=f"threshold-{name}-{saved.version if saved else 0}",
        help="Held-out scores, 0 at the boundary between the classes. Drag it: the point moves along the curve.",
    )
    taken = scores >= chosen
    hits = int((labels[taken] == 1).sum())
    here = (hits / max(int(labels.sum()), 1), hits / taken.sum() if taken.any() else 1.0)
    place.plotly_chart(
        precision_recall_chart(precision, recall, here, float(np.mean(labels))),
        key="pr-chart",
        config=QUIET,
        alt=f"Precision–recall curve of held-out examples; at the threshold, precision {here[1]:.0%} and recall {here[0]:.0%}",
    )
    st.caption(
        f"At the threshold: precision **{here[1]:.0%}**, recall **{here[0]:.0%}** of {len(labels)} held-out examples"
    )
    if saved is None:
        return
    level = saved.details.get("boundary", 0.0) + chosen
    passing = audit.rows.count(RowFilter(scores=(level, float("inf"))), f"probe:{name}")
    st.caption(f"Of the data, **{counted(passing, 'row')}** of {audit.overview().n_rows:,} score at least that.")
    if read_only():
        return
    kept = saved.details.get("threshold")
    if st.button(
        "Keep this threshold",
        icon=":material/straighten:",
        key="keep-threshold",
        help="The Audit page then shows it, and can flag every row above it",
    ):
        audit.probes.set_threshold(name, level)
        st.rerun()
    if kept is not None:
        st.caption(f"Kept: scores of at least {kept:.4g}")


def nearest(audit: Audit, saved: SavedProbe) -> None:
    """SAE features whose directions are nearest to the probe's."""
    if not audit.overview().n_features:
        return
    layer = audit.manifest.configuration["sae_layer"]
    with st.expander("Nearest SAE features"):
        if layer != saved.layer:
            st.caption(f"The SAE reads layer {layer} and the probe layer {saved.layer}: directions carry over in part.")
        for feature in records(audit.concepts.similar(saved.direction, NEAREST)):
            st.page_link(
                "app_pages/concepts.py",
                query_params={"feature": str(feature["feature_id"]), "audit": audit.name},
                label=f"{feature['feature_id']} · cosine {feature['cosine']:.2f}",
                help=plain(feature["label"]),
            )


def housekeeping(audit: Audit, name: str, saved: SavedProbe | None) -> None:
    """Rename, delete, earlier versions, and the probe as a file."""
    if saved:
        st.download_button(
            "Export",
            lambda: audit.probes.export(name),
            file_name=f"{name}.probe.json",
            mime="application/json",
            icon=":material/download:",
            on_click="ignore",
            help="The probe with its labelled examples, as JSON",
        )
    if read_only():
        return

    def rename() -> None:
        new = st.session_state["new-name"].strip()
        try:
            audit.probes.rename(name, new)
            put("probe", new)
            st.session_state["probe"] = new
        except AuditError as error:
            st.session_state["lab_error"] = str(error)

    def delete() -> None:
        audit.probes.delete(name)
        st.session_state["probe"] = None

    with st.popover("Rename", icon=":material/edit:"):
        st.text_input("New name", key="new-name", value=name)
        st.button("Rename", type="primary", key="rename", on_click=rename)
    versions = audit.probes.versions(name) if saved else []
    if versions:
        with st.popover("Versions", icon=":material/history:"):
            for old in versions:
                with st.container(horizontal=True, vertical_alignment="center"):
                    st.text(f"{old.version}: AUROC {old.details['auroc']:.2f}, layer {old.layer}", width="stretch")
                    st.button(
                        "Go back to it",
                        key=f"restore-{old.version}",
                        on_click=audit.probes.restore,
                        args=(name, old.version),
                    )
    with st.popover("Delete", icon=":material/delete:"):
        st.write("Delete the probe with its labels and versions?")
        st.button("Delete for good", type="primary", on_click=delete)


def import_box(audit: Audit) -> None:
    """A box for a probe that was exported elsewhere."""
    if read_only():
        return
    with st.popover("Import", icon=":material/upload:"):
        file = st.file_uploader("A probe as JSON", type=["json"], key="probe-file")
        name = st.text_input("Name here", key="probe-file-name", placeholder="as in the file")
        if file is not None and st.button("Import it", type="primary", key="import-probe"):
            try:
                imported = audit.probes.import_(file.getvalue().decode("utf-8", "replace"), name or None)
                st.success(f"Imported as {imported}")
            except AuditError as error:
                st.error(str(error), icon=":material/error:")


def labelled(audit: Audit, name: str, labels: Sequence[LabelledExample]) -> None:
    """The labelled examples, newest first."""
    with st.expander(f"Labelled examples ({len(labels)})", expanded=False):
        for example in list(reversed(labels))[:200]:
            with st.container(horizontal=True, vertical_alignment="top"):
                st.badge("shows it" if example.label else "does not", color="orange" if example.label else "blue")
                st.text(example.messages[-1].content[:160], width="stretch")
                if not read_only():
                    st.button(
                        "",
                        icon=":material/close:",
                        key=f"unlabel-{example.content_hash}",
                        type="tertiary",
                        help="Forget this label",
                        on_click=audit.labels.remove,
                        args=(name, [example.content_hash]),
                    )
