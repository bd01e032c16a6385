"""Plotly charts."""

from __future__ import annotations

import numpy as np
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
