"""One SAE feature: what is known of it, and the rows in which it fires."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from concept_audit import Audit, AuditError
from concept_audit_app.components.charts import QUIET, counts_chart
from concept_audit_app.components.heatmap import Look, legend_html, ramp, text_html
from concept_audit_app.components.plain import counted, plain
from concept_audit_app.components.rows import RowCard
from concept_audit_app.components.session import person, read_only
from concept_audit_app.components.tables import records
from concept_audit_app.components.url import choose

ROWS_EACH = 3
SIMILAR = 8
ORIGINS = {
    "person": "written by a person",
    "endpoint": "by a language model",
    "import": "from a file",
    "words": "words of the texts, by log-odds",
    "tokens": "its tokens",
}
QUANTILES = {1: "Strongest quarter", 2: "Second quarter", 3: "Third quarter", 4: "Weakest quarter"}


def walk(features: pd.DataFrame, feature: str) -> None:
    """Buttons to the previous, the next and a random feature of a list."""
    listed = [str(number) for number in features["feature_id"]]
    place = listed.index(feature) if feature in listed else -1
    before = listed[place - 1] if place > 0 else None
    after = listed[place + 1] if place + 1 < len(listed) else None
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.button(
            "Previous",
            icon=":material/chevron_left:",
            shortcut="K",
            key="before",
            disabled=before is None,
            on_click=choose,
            args=("feature", before),
        )
        st.button(
            "Next",
            icon=":material/chevron_right:",
            shortcut="J",
            key="after",
            disabled=after is None,
            on_click=choose,
            args=("feature", after),
        )
        st.button(
            "Random",
            icon=":material/shuffle:",
            key="random",
            disabled=len(listed) < 2,
            on_click=lambda: choose("feature", random.choice(listed)),
        )


def figures(about: pd.Series) -> None:
    """How often and how strongly a feature fires."""
    with st.container(horizontal=True):
        st.metric("Fires on", f"{about.density:.2%}", border=True, help="share of response tokens")
        st.metric("Rows", f"{about.n_examples:,}", border=True)
        st.metric("Max activation", f"{about.max_activation:.1f}", border=True)


def name_box(audit: Audit, about: pd.Series) -> None:
    """A form to give the feature a label of one's own."""
    if read_only():
        return
    number = int(about.feature_id)

    def keep() -> None:
        try:
            audit.concepts.label(number, st.session_state[f"label-{number}"] or None, person())
        except AuditError as error:
            st.session_state["row_problem"] = str(error)

    with st.popover("Label", icon=":material/edit:"):
        st.text_input(
            "Label of this feature",
            value=about.label,
            key=f"label-{number}",
            max_chars=120,
            on_change=keep,
            help="Press Enter to keep it, for everybody; empty brings the automatic one back",
        )


def label_origin(audit: Audit, about: pd.Series) -> None:
    """Where a feature's label is from, how well it tells where the feature fires, and the clearest piece of text."""
    every = audit.feature_labels.of(int(about.feature_id))
    shown = every[every["place"] == 1]
    if shown.empty:
        return
    first = shown.iloc[0]
    maker = f" ({plain(str(first.maker))})" if first.maker else ""
    st.caption(
        f"Label: {ORIGINS[str(first.origin)]}{maker}{_detection(first)}",
        help="Balanced accuracy, with a 95% interval, of telling pieces of text in which the feature fires from pieces "
        "in which it does not, by the label alone; the pieces are others than those that the label was made of. "
        "A guess has 0.50.",
    )
    others = [
        f"{plain(str(one.label))}: {ORIGINS[str(one.origin)]}{_detection(one)}"
        for one in every[every["place"] > 1].itertuples()
    ]
    if others:
        with st.expander("Other labels"):
            for line in others:
                st.markdown(line)
    snippet = next((text for text in every["snippet"] if text), "")
    if snippet:
        before, _, rest = snippet.partition("«")
        token, _, after = rest.partition("»")
        st.html(
            f'<div style="font-size:.9rem;opacity:.9;margin-bottom:.6rem">Clearest piece: {text_html(before)}'
            f"<mark>{text_html(token)}</mark>{text_html(after)}</div>"
        )


def _detection(label: Any) -> str:
    if pd.isna(label.score):
        return ""
    return f", detection {label.score:.2f} ({label.low:.2f}–{label.high:.2f})"


def meaning(audit: Audit, about: pd.Series) -> None:
    """The histogram of a feature's activations, and the tokens that it promotes and suppresses, where they tell."""
    effects = _tokens_html("Makes more likely", about.promoted) + _tokens_html("Makes less likely", about.suppressed)
    tells = audit.concepts.promotion_tells(int(about.feature_id))
    left, right = st.columns([3, 2], gap="medium") if tells else (st.container(), st.container())
    with left:
        counts = np.asarray(about.histogram)
        edges = np.linspace(0, float(about.max_activation), len(counts) + 1)
        st.plotly_chart(
            counts_chart(edges, counts, "activation", "tokens"),
            key="density-chart",
            config=QUIET,
            alt=f"Histogram of this feature's activations: {int(counts.sum()):,} tokens, the highest "
            f"{about.max_activation:.1f}",
        )
    with right:
        if tells:
            st.html(effects)
        else:
            with st.expander(
                "Tokens that it makes more and less likely: hardly any comes in the texts in which it fires"
            ):
                st.html(effects)


def similar(audit: Audit, concept: str, feature: int) -> None:
    """Buttons to the features with the nearest directions."""
    near = audit.concepts.similar(audit.concept(concept).direction, SIMILAR, feature)
    with st.expander("Similar features"):
        for other in records(near):
            st.button(
                f"{other['feature_id']}: {plain(other['label'])} · cosine {other['cosine']:.2f}",
                key=f"near-{other['feature_id']}",
                type="tertiary",
                on_click=choose,
                args=("feature", str(other["feature_id"])),
            )


def rows_by_quantile(audit: Audit, concept: str, feature: int) -> None:
    """Rows of each quarter of the feature's strength, with its activations in colour."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown("**Rows in which it fires**", width="content")
        short = st.toggle(
            "Short context", key="short", bind="query-params", help="Only what stands around the strongest token"
        )
        newlines = st.toggle("Show line ends", value=True, key="lines", bind="query-params")
        legend = st.container(width="content")
    rows = audit.concepts.rows_by_quantile(feature, ROWS_EACH)
    if rows.empty:
        return
    cards = []
    for _, group in rows.groupby("quantile"):
        first = group.iloc[0]
        st.caption(
            f"{QUANTILES[int(first['quantile'])]}: {counted(int(first.group_rows), 'row')}, {first.low:.1f} to {first.high:.1f}"
        )
        cards += [(int(row["example_id"]), RowCard(row)) for row in records(group)]
    heatmaps = audit.rows.heatmaps(concept, rows["example_id"].tolist())
    colours = ramp(heatmaps.values(), 0.0)
    legend.html(legend_html(colours))
    for number, card in cards:
        card.fill(heatmaps.get(number), colours, look=Look(newlines, short))


def _tokens_html(title: str, tokens: Iterable[str]) -> str:
    shown = " ".join(
        f'<code style="padding:.05rem .3rem;border-radius:.3rem;background:rgba(128,128,128,.15)">{_visible(t)}</code>'
        for t in tokens
    )
    return f'<div style="margin-bottom:.6rem"><div style="font-size:.8rem;opacity:.8">{title}</div>{shown or "unknown"}</div>'


def _visible(token: str) -> str:
    return text_html(
        token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣", 1) if token.strip() != token else token
    )
