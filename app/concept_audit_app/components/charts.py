"""Plotly charts. Each colour keeps its contrast on a light and on a dark page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from concept_audit_app.components.scale import Scale
from concept_audit_app.components.tables import records

ALL, PASSING, HERE = "#7d9ba0", "#2b8a94", "#d66014"
QUIET = {"displayModeBar": False}
"""Configuration of charts without buttons."""
NAME_LENGTH = 44
STRIP = 84
"""Pixels that the histogram over the rows is high."""
STEPS, MOST_TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100), 14
"""Standard deviations between two marks of its axis, and how many marks there may be."""


def _figure(height: int, **layout: Any) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(height=height, margin=dict(l=8, r=8, t=8, b=8), showlegend=False, **layout)
    return figure


def score_histogram(
    edges: np.ndarray,
    everything: np.ndarray,
    passing: np.ndarray,
    filtered: bool,
    shown: tuple[float, float] | None,
    brushed: tuple[float, float] | None = None,
    threshold: float | None = None,
    scale: Scale | None = None,
) -> go.Figure:
    """Histogram of scores as a strip: all rows, those that pass the filter, and the span of the rows on the page.

    Args:
        scale: says the scores in standard deviations along the axis.
    """
    middles, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
    hover = "%{customdata[0]:.3g} to %{customdata[1]:.3g}: %{y:,} rows<extra></extra>"
    spans = np.stack([edges[:-1], edges[1:]], axis=1)
    figure = _figure(STRIP, barmode="overlay", dragmode="select", selectdirection="h")
    figure.update_layout(margin=dict(l=4, r=4, t=2, b=26))
    figure.add_bar(
        x=middles,
        y=everything,
        width=width * 0.94,
        name="All rows",
        customdata=spans,
        hovertemplate=hover,
        marker_color=ALL if filtered else PASSING,
        opacity=0.5 if filtered else 1.0,
    )
    if filtered:
        figure.add_bar(
            x=middles,
            y=passing,
            width=width * 0.94,
            name="Rows that pass the filter",
            customdata=spans,
            hovertemplate=hover,
            marker_color=PASSING,
        )
    # Shapes at once: Plotly's add_vrect takes milliseconds each.
    whole = dict(type="rect", xref="x", yref="paper", y0=0, y1=1)
    shapes, notes = [], []
    if shown is not None:
        shapes.append(
            whole | dict(x0=shown[0], x1=shown[1], fillcolor=HERE, opacity=0.18, line=dict(width=1, color=HERE))
        )
        notes.append(_note("this page", shown[0]))
    if brushed is not None:
        shapes.append(whole | dict(x0=brushed[0], x1=brushed[1], fillcolor=PASSING, opacity=0.12, line=dict(width=1)))
    if threshold is not None:
        shapes.append(whole | dict(type="line", x0=threshold, x1=threshold, line=dict(color=HERE, dash="dash")))
        # Below the other, which may stand at the same place.
        notes.append(_note("threshold", threshold) | dict(y=0.84 if notes else 1))
    figure.update_layout(shapes=shapes, annotations=notes)
    # Selected or not, bars look the same: the filter colours them.
    figure.update_traces(selected=dict(marker=dict(opacity=1)), unselected=dict(marker=dict(opacity=1)))
    if scale is not None and scale.unit:
        ends = sorted(scale.of(edge) for edge in (edges[0], edges[-1]))
        step = next((step for step in STEPS if (ends[1] - ends[0]) / step <= MOST_TICKS), STEPS[-1])
        values = np.arange(math.ceil(ends[0] / step), math.floor(ends[1] / step) + 1) * step
        # The unit beside the tick in the middle: there is no room for one at the edge.
        named = int(np.argmin(np.abs(values))) if len(values) else 0
        words = [f"{value:{'+' if value else ''}g}{' SD' * (place == named)}" for place, value in enumerate(values)]
        figure.update_xaxes(tickvals=[scale.raw(value) for value in values], ticktext=words)
    figure.update_yaxes(visible=False, rangemode="tozero")
    return figure


def _note(text: str, x: float) -> dict:
    return dict(
        text=text, x=x, xref="x", xanchor="left", y=1, yref="paper", yanchor="top", showarrow=False, font=dict(size=11)
    )


def counts_chart(edges: np.ndarray, counts: np.ndarray, across: str, up: str, height: int = 170) -> go.Figure:
    """A plain histogram, on a logarithmic axis where counts differ much."""
    figure = _figure(height)
    middles = (edges[:-1] + edges[1:]) / 2
    figure.add_bar(
        x=middles,
        y=counts,
        width=(edges[1] - edges[0]) * 0.94,
        marker_color=PASSING,
        customdata=np.stack([edges[:-1], edges[1:]], axis=1),
        hovertemplate="%{customdata[0]:.3g} to %{customdata[1]:.3g}: %{y:,}<extra></extra>",
    )
    figure.update_xaxes(title=across)
    positive = counts[counts > 0]
    steep = len(positive) > 1 and positive.max() > 200 * np.median(positive)
    figure.update_yaxes(title=up, type="log" if steep else "linear")
    return figure


def interval_chart(
    groups: pd.DataFrame, across: str = "mean score<br>towards the concept →", value: str = "mean"
) -> go.Figure:
    """Estimates of groups with their intervals, the first on top.

    Args:
        groups: name, `value`, low, high, and n_rows where it is known.
        across: of the axis; "<br>" breaks it into lines, for narrow windows.
    """
    rows = groups["n_rows"] if "n_rows" in groups else groups["inside"]
    figure = _figure(90 + 24 * len(groups) + 18 * across.count("<br>"))
    figure.add_scatter(
        x=groups[value],
        y=[short(name) for name in groups["name"]],
        mode="markers",
        marker=dict(color=PASSING, size=9),
        customdata=np.stack([rows, groups["low"], groups["high"]], axis=1),
        error_x=dict(
            symmetric=False,
            array=groups["high"] - groups[value],
            arrayminus=groups[value] - groups["low"],
            color=ALL,
            thickness=1.5,
        ),
        hovertemplate="%{y}<br>%{x:.4g} (%{customdata[1]:.4g} to %{customdata[2]:.4g})<br>"
        "%{customdata[0]:,} rows<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed", automargin=True, type="category")
    figure.update_xaxes(title=across, zeroline=True)
    return figure


def beside_chart(groups: pd.DataFrame, across: str, up: str) -> go.Figure:
    """Each group's mean by one method against its mean by another; larger groups have larger marks."""
    figure = _figure(340)
    figure.add_scatter(
        x=groups["mean"],
        y=groups["beside_mean"],
        mode="markers",
        text=[short(name) for name in groups["name"]],
        marker=dict(
            size=5 + 12 * np.sqrt(groups["n_rows"] / groups["n_rows"].max()),
            color=PASSING,
            opacity=0.55,
            line=dict(width=0),
        ),
        customdata=groups[["n_rows"]],
        hovertemplate="%{text}<br>%{x:.4g} · %{y:.4g}<br>%{customdata[0]:,} rows<extra></extra>",
    )
    figure.update_xaxes(title=across, zeroline=True)
    figure.update_yaxes(title=up, zeroline=True)
    return figure


def points_chart(points: pd.DataFrame, across: str, up: str, chosen: Sequence[int]) -> go.Figure:
    """Rows by their scores in two rankings; those chosen stand out."""
    figure = _figure(430, dragmode="select")
    here = points["example_id"].isin(set(chosen)).to_numpy()
    figure.add_scattergl(
        x=points["a_score"],
        y=points["b_score"],
        mode="markers",
        customdata=points[["example_id", "a_rank", "b_rank"]],
        marker=dict(color=np.where(here, HERE, PASSING), size=np.where(here, 10, 6), opacity=0.7, line=dict(width=0)),
        hovertemplate="row %{customdata[0]:,}<br>#%{customdata[1]:,} and #%{customdata[2]:,}<extra></extra>",
    )
    figure.update_xaxes(title=across, zeroline=True)
    figure.update_yaxes(title=up, zeroline=True)
    return figure


def overlap_chart(depths: np.ndarray, overlap: np.ndarray, n_rows: int) -> go.Figure:
    """Share of the first k rows that two rankings have in common, beside what chance gives."""
    figure = _figure(300)
    figure.update_layout(showlegend=True, legend=dict(orientation="h", y=1.15, x=0))
    figure.add_scatter(
        x=depths,
        y=overlap,
        mode="lines+markers",
        name="these two",
        line_color=PASSING,
        hovertemplate="first %{x:,}: %{y:.0%} in common<extra></extra>",
    )
    figure.add_scatter(
        x=depths,
        y=depths / max(n_rows, 1),
        mode="lines",
        name="by chance",
        line=dict(color=ALL, dash="dot"),
        hovertemplate="first %{x:,}: %{y:.0%} by chance<extra></extra>",
    )
    # Of its own Plotly writes 1, 2, 5, 10, 2, 5, 100: each mark says its whole number here.
    marks = [digit * 10**power for power in range(9) for digit in (1, 2, 5) if digit * 10**power <= n_rows]
    figure.update_xaxes(title="first k rows", type="log", tickvals=marks, ticktext=[f"{mark:,}" for mark in marks])
    figure.update_yaxes(title="in common", tickformat=".0%", range=[0, 1.04])
    return figure


def _precision_recall_axes(figure: go.Figure, base: float) -> go.Figure:
    figure.add_hline(y=base, line_dash="dot", line_color=ALL)
    figure.update_xaxes(title="recall", tickformat=".0%", range=[0, 1.03])
    figure.update_yaxes(title="precision", tickformat=".0%", range=[0, 1.04])
    return figure


def precision_recall_chart(
    precision: np.ndarray, recall: np.ndarray, here: tuple[float, float], base: float
) -> go.Figure:
    """Precision against recall of held-out examples, with the point of the present threshold.

    Args:
        here: recall and precision at the threshold.
        base: share of positive examples, the precision of a guess.
    """
    figure = _figure(230)
    figure.add_scatter(
        x=recall,
        y=precision,
        mode="lines",
        line=dict(color=PASSING, shape="hv"),
        hovertemplate="recall %{x:.0%}, precision %{y:.0%}<extra></extra>",
    )
    figure.add_scatter(x=[here[0]], y=[here[1]], mode="markers", marker=dict(color=HERE, size=13), hoverinfo="skip")
    return _precision_recall_axes(figure, base)


LINES = ["#2b8a94", "#d66014", "#7a6bb5", "#a8861f", "#4f7fbf", "#b0567f", "#6b8f3c", "#7d9ba0"]


def curves_chart(
    results: pd.DataFrame, name_of: Callable[[str], str], across: str = "share of the rows", form: str = ".0%"
) -> go.Figure:
    """Change of a quantity by method, against what `share` holds, with 95% intervals.

    Args:
        across: what that is.
        form: how it is written, as D3 has it.
    """
    figure = _figure(320)
    figure.update_layout(showlegend=True, legend=dict(orientation="h", y=-0.35, x=0))
    for place, (method, rows) in enumerate(results.groupby("method", sort=True)):
        rows = rows.sort_values("share")
        colour = LINES[place % len(LINES)]
        figure.add_scatter(
            x=rows["share"] * (1 + 0.012 * place),
            y=rows["estimate"],
            mode="lines+markers",
            name=name_of(str(method)),
            marker=dict(color=colour, size=8),
            line=dict(width=1.5, color=colour),
            error_y=dict(
                symmetric=False,
                array=rows["high"] - rows["estimate"],
                thickness=1.2,
                arrayminus=rows["estimate"] - rows["low"],
            ),
            hovertemplate=f"%{{x:{form}}}: %{{y:.3f}}<extra></extra>",
        )
    # The methods stand side by side at each share, so ticks belong to shares alone.
    figure.update_xaxes(title=across, tickformat=form, tickvals=sorted(results["share"].unique()))
    figure.update_yaxes(title="change", zeroline=True)
    return figure


def recalls_chart(table: pd.DataFrame, base: float) -> go.Figure:
    """Precision against recall of several rankings.

    Args:
        table: name, recall and precision, one row a ranking.
        base: share of the rows that are looked for, the precision of a guess.
    """
    figure = _figure(320)
    figure.update_layout(showlegend=True, legend=dict(orientation="h", y=-0.35, x=0))
    for place, row in enumerate(records(table)):
        figure.add_scatter(
            x=row["recall"],
            y=row["precision"],
            mode="lines+markers" if len(row["recall"]) < 3 else "lines",
            name=row["name"],
            line=dict(color=LINES[place % len(LINES)], width=2, dash="solid" if place < len(LINES) else "dash"),
            hovertemplate="recall %{x:.0%}, precision %{y:.0%}",
        )
    return _precision_recall_axes(figure, base)


def matrix_chart(names: Sequence[str], values: np.ndarray) -> go.Figure:
    """Correlations of all pairs, blue below 0 and orange above, each with its number."""
    figure = _figure(90 + 34 * len(names))
    figure.add_heatmap(
        z=values,
        x=list(names),
        y=list(names),
        zmin=-1,
        zmax=1,
        xgap=2,
        ygap=2,
        showscale=False,
        colorscale=[[0, "#8b90d8"], [0.5, "#f4f2ee"], [1, "#e2905f"]],
        texttemplate="%{z:.2f}",
        textfont=dict(color="#1b1f22"),
        hovertemplate="%{y} and %{x}: %{z:.2f}<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(showgrid=False, tickangle=-25)
    return figure


def short(name: str) -> str:
    """A name for an axis; Plotly reads a few tags in text, so their brackets are replaced."""
    text = name.replace("<", "‹").replace(">", "›").replace("\n", "⏎").replace("\0", "␀")
    return text if len(text) <= NAME_LENGTH else text[: NAME_LENGTH - 1] + "…"
