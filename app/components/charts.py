"""Plotly charts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

ALL, PASSING, HERE = "#7d9ba0", "#2b8a94", "#d66014"
"""Colours that keep their contrast on a light and on a dark page."""


def score_histogram(
    edges: np.ndarray,
    everything: np.ndarray,
    passing: np.ndarray,
    filtered: bool,
    shown: tuple[float, float] | None,
) -> go.Figure:
    """Histogram of scores: all rows, those that pass the filter, and the span of the rows on the page."""
    middles, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
    hover = "%{customdata[0]:.3f} to %{customdata[1]:.3f}: %{y:,} rows<extra></extra>"
    spans = np.stack([edges[:-1], edges[1:]], axis=1)
    figure = go.Figure()
    figure.add_bar(
        x=middles, y=everything, width=width * 0.94, name="All rows", customdata=spans, hovertemplate=hover,
        marker_color=ALL if filtered else PASSING, opacity=0.5 if filtered else 1.0,
    )  # fmt: skip
    if filtered:
        figure.add_bar(
            x=middles, y=passing, width=width * 0.94, name="Rows that pass the filter", customdata=spans,
            hovertemplate=hover, marker_color=PASSING,
        )  # fmt: skip
    if shown is not None:
        figure.add_vrect(
            x0=shown[0], x1=shown[1], fillcolor=HERE, opacity=0.18, line_width=1, line_color=HERE,
            annotation_text="on this page", annotation_position="top left", annotation_font_size=11,
        )  # fmt: skip
    figure.update_layout(
        barmode="overlay", height=230, margin=dict(l=8, r=8, t=8, b=8), showlegend=filtered,
        legend=dict(orientation="h", y=1.12, x=0), dragmode="select", selectdirection="h",
    )  # fmt: skip
    figure.update_xaxes(title="score (further right pushes more towards the concept)")
    figure.update_yaxes(title="rows", rangemode="tozero")
    return figure


NAME_LENGTH = 44


def interval_chart(groups: pd.DataFrame) -> go.Figure:
    """Means of groups with their intervals, the highest on top.

    Args:
        groups: name, n_rows, mean, low, high, in the order of the mean.
    """
    figure = go.Figure()
    figure.add_scatter(
        x=groups["mean"], y=[_short(name) for name in groups["name"]], mode="markers",
        marker=dict(color=PASSING, size=9), customdata=groups[["n_rows", "low", "high"]],
        error_x=dict(
            symmetric=False, array=groups["high"] - groups["mean"], arrayminus=groups["mean"] - groups["low"],
            color=ALL, thickness=1.5,
        ),
        hovertemplate="%{y}<br>mean %{x:.4g} (%{customdata[1]:.4g} to %{customdata[2]:.4g})<br>"
        "%{customdata[0]:,} rows<extra></extra>",
    )  # fmt: skip
    figure.update_layout(height=90 + 24 * len(groups), margin=dict(l=8, r=8, t=8, b=8), showlegend=False)
    figure.update_yaxes(autorange="reversed", automargin=True, type="category")
    figure.update_xaxes(title="mean score (further right pushes more towards the concept)", zeroline=True)
    return figure


def beside_chart(groups: pd.DataFrame, across: str, up: str) -> go.Figure:
    """Each group's mean by one method against its mean by another; larger groups have larger marks."""
    figure = go.Figure()
    figure.add_scatter(
        x=groups["mean"], y=groups["beside_mean"], mode="markers", text=[_short(name) for name in groups["name"]],
        marker=dict(
            size=5 + 12 * np.sqrt(groups["n_rows"] / groups["n_rows"].max()), color=PASSING, opacity=0.55,
            line=dict(width=0),
        ),
        customdata=groups[["n_rows"]],
        hovertemplate="%{text}<br>%{x:.4g} · %{y:.4g}<br>%{customdata[0]:,} rows<extra></extra>",
    )  # fmt: skip
    figure.update_layout(height=340, margin=dict(l=8, r=8, t=8, b=8), showlegend=False)
    figure.update_xaxes(title=across, zeroline=True)
    figure.update_yaxes(title=up, zeroline=True)
    return figure


def _short(name: str) -> str:
    """A name for an axis; Plotly reads a few tags in text, so their brackets are replaced."""
    text = name.replace("<", "‹").replace(">", "›").replace("\n", "⏎")
    return text if len(text) <= NAME_LENGTH else text[: NAME_LENGTH - 1] + "…"
