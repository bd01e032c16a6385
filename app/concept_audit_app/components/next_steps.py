"""What was found and nobody has looked at yet, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import streamlit as st

from concept_audit import Audit
from concept_audit_app.components.concepts import probe_quality
from concept_audit_app.components.heatmap import text_html
from concept_audit_app.components.plain import counted, plain
from concept_audit_app.components.tables import records

TOP = 20
"""The strongest rows of a concept, which somebody should have looked at."""
LOOKED_AT, SHOWN = 32, 6
"""SAE features that stand out most: so many are looked at, and so many shown."""


@dataclass(frozen=True)
class Found:
    """A concept and how many of its strongest rows nobody has judged yet.

    Attributes:
        unseen: of the strongest `top` rows, those without a verdict.
        about: what is known of it, in words.
        piece: the text around an SAE feature's strongest token: before it, itself, after it.
    """

    concept_id: str
    name: str
    unseen: int
    top: int
    about: str
    piece: tuple[str, str, str] | None = None


def probes_found(audit: Audit) -> Sequence[Found]:
    """The trained probes, those with most unseen rows first."""
    found = []
    for probe in audit.probes.list():
        concept = f"probe:{probe.name}"
        about = f"held-out AUROC {probe_quality(dict(probe.details))}, layer {probe.layer}"
        # What has not been ranked is not ranked for an overview.
        flags = audit.rank(concept, top=TOP)["flag"] if audit.rankings.has(concept, None) else None
        unseen, top = (TOP, TOP) if flags is None else (int(flags.isna().sum()), len(flags))
        found.append(Found(concept, probe.name, unseen, top, about))
    return sorted(found, key=lambda each: -each.unseen)


def features_found(audit: Audit) -> Sequence[Found]:
    """SAE features that stand out, those with most unseen rows first; before all, those that fire on whole words."""
    table = audit.concepts.features(order="telling").head(LOOKED_AT)
    clearest = audit.feature_labels.clearest([int(number) for number in table["feature_id"]])
    found, words = [], set()
    for row in records(table):
        number = int(row["feature_id"])
        piece = clearest.get(number)
        if piece is None or not piece.on_a_word:
            continue
        token = piece.text[piece.start : piece.end].strip()
        if token.lower() in words:
            continue  # one of a kind is enough here
        words.add(token.lower())
        flags = audit.concepts.strongest_rows(number, TOP)["flag"]
        before, _, after = piece.text[piece.start : piece.end].partition(token)
        text = piece.text[: piece.start] + before, token, after + piece.text[piece.end :]
        about = f"fires in {counted(int(row['n_examples']), 'row')}"
        found.append(Found(f"sae:{number}", str(row["label"]), int(flags.isna().sum()), len(flags), about, text))
    return sorted(found, key=lambda each: -each.unseen)[:SHOWN]


def next_step(audit: Audit, probes: Sequence[Found], features: Sequence[Found]) -> None:
    """One thing to do, by what is there, and the others beside it."""
    overview = audit.overview()
    first = next((each for each in (*probes, *features) if each.unseen), None)
    with st.container(border=True, key="next", horizontal=True, vertical_alignment="center"):
        if first is not None:
            kind = "probe" if first.piece is None else "feature"
            seen = first.top - first.unseen
            how, have = f"{seen or 'None'} of the", "has" if seen == 1 else "have"
            st.markdown(
                f"**{how} {first.top} rows that are strongest in the {kind} “{plain(first.name)}” {have} been seen.**"
            )
            _go("app_pages/ranking.py", "Look at them", audit, concept=first.concept_id)
        elif not probes and not overview.n_features:
            st.markdown("**There is no concept yet to rank the rows by.** Label a few examples of what you fear.")
            _go("app_pages/probe_lab.py", "Draw a probe", audit)
        elif overview.n_flagged:
            st.markdown(
                f"**The strongest rows of every concept here have been seen; {counted(overview.n_flagged, 'row')} flagged.** "
                "Take the data away without those to remove."
            )
            _go("app_pages/export.py", "Export", audit, rows="Cleaned data")
        else:
            st.markdown("**The strongest rows of every concept here have been seen.** Is there another to fear?")
            _go("app_pages/probe_lab.py", "Draw a probe", audit)
    with st.container(horizontal=True, key="others"):
        for page, icon, label, there in (
            ("forecast", "trending_up", "What would training teach?", overview.n_features + overview.n_probes > 0),
            ("concepts", "category", "Find a concept by your own text", overview.n_features > 0),
            ("probe_lab", "science", "Draw a concept by examples", True),
            ("export", "download", f"Export ({overview.n_flagged:,} flagged)", overview.n_flagged > 0),
        ):
            if there:
                st.page_link(
                    f"app_pages/{page}.py", label=label, icon=f":material/{icon}:", query_params={"audit": audit.name}
                )


def _go(page: str, label: str, audit: Audit, **parameters: str) -> None:
    with st.container(key="next-go", width="content"):
        st.page_link(
            page, label=label, icon=":material/arrow_forward:", query_params={"audit": audit.name, **parameters}
        )


def list_found(audit: Audit, found: Sequence[Found]) -> None:
    """Concepts, each with a link to its rows, what is known of it, and how many of its strongest rows are unseen."""
    for each in found:
        with st.container(key=f"found-{each.concept_id}", gap=None):
            with st.container(horizontal=True, vertical_alignment="center", gap="small"):
                st.page_link(
                    "app_pages/ranking.py",
                    label=f"**{plain(each.name)}**",
                    icon=":material/format_list_numbered:" if each.piece is None else ":material/category:",
                    query_params={"audit": audit.name, "concept": each.concept_id},
                )
                state = f"{each.unseen} of {each.top} unseen" if each.unseen else "seen"
                st.badge(state, color="orange" if each.unseen else "gray")
                st.caption(each.about, width="content")
            if each.piece is not None:
                before, token, after = map(text_html, each.piece)
                st.html(f'<div class="piece">… {before}<mark>{token}</mark>{after} …</div>')
