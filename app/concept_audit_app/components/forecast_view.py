"""A forecast as people see it: the concepts that move most, with intervals and the band of chance."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from concept_audit_app.components.charts import ALL, HERE, PASSING, QUIET, short
from concept_audit_app.components.concepts import concept_title
from concept_audit_app.components.plain import plain
from concept_audit_app.components.ranking_names import ranking_names
from concept_audit_app.components.tables import NOTHING, records

SHOWN = 12
FAR = 2.5
"""Times as far from zero as the next one: what is further stands at the edge."""
UNITS = {"relative": "share of the feature's usual activation", "forecast": "change of activation or projection"}


def in_units(table: pd.DataFrame, units: str) -> pd.DataFrame:
    """The forecast with names, in units of each feature's usual activation (features alone) or as it is."""
    shown = table.assign(
        title=[concept_title(r["kind"], r["concept_id"], r["name"], r["label"]) for r in records(table)]
    )
    ends = ["forecast", "low", "high", "null_low", "null_high"]
    if units == "relative":
        shown = shown[shown["usual"] > 0]
        shown = shown.assign(**{name: shown[name] / shown["usual"] for name in ends})
    return shown.assign(clear=(shown["forecast"] > shown["null_high"]) | (shown["forecast"] < shown["null_low"]))


def movers(shown: pd.DataFrame, count: int = SHOWN) -> pd.DataFrame:
    """The concepts that rise and those that fall most, by the near end of their interval where there is one."""
    near_up, near_down = shown["low"].fillna(shown["forecast"]), shown["high"].fillna(shown["forecast"])
    up = shown[shown["forecast"] > 0].assign(near=near_up).nlargest(count, ["near", "forecast"])
    down = shown[shown["forecast"] < 0].assign(near=near_down).nsmallest(count, ["near", "forecast"])
    return pd.concat([up, down.iloc[::-1]]).drop(columns="near")


def by_ranking(effects: pd.DataFrame) -> pd.DataFrame:
    """Effects of a removal with what tells the rankings of a concept apart, where one has several."""
    rankings = [("concept_influence", parameters) for parameters in effects["parameters"]]
    shown = effects.drop(columns="parameters")
    if effects["concept_id"].is_unique:
        return shown
    shown.insert(1, "ranking", "")
    for _, mine in effects.groupby("concept_id"):
        shown.loc[mine.index, "ranking"] = ranking_names([rankings[place] for place in mine.index])
    return shown


def edge(reach: np.ndarray) -> float:
    """Where the axis ends: a few rows that reach far beyond all others would leave those no room.

    Args:
        reach: how far from zero each row and its interval go.
    """
    ordered = np.sort(reach)
    few = max(1, len(ordered) // 6)
    for near, far in pairwise(ordered[-1 - few :]):
        if far > FAR * near > 0:
            return float(1.1 * near)
    return float("inf")


def forecast_chart(rows: pd.DataFrame, across: str) -> go.Figure:
    """Forecasts with 95% intervals, the band of randomly signed gradients behind each, the largest on top.

    What lies far beyond all else stands at the edge, as a triangle with its number.
    """
    names = [short(title) for title in rows["title"]]
    end = edge(rows[["forecast", "low", "high"]].abs().max(axis=1).to_numpy(float))
    beyond = (rows["forecast"].abs() > end).to_numpy()
    drawn = rows[["forecast", "low", "high"]].clip(-end, end)
    arrows = np.where(rows["forecast"] > 0, "triangle-right", "triangle-left")
    figure = go.Figure()
    figure.update_layout(
        height=110 + 25 * len(rows) + 18 * across.count("<br>"),
        margin=dict(l=8, r=8, t=8, b=8),
        barmode="overlay",
        legend=dict(orientation="h", y=1.02, yanchor="bottom", x=0),
        clickmode="event+select",
    )
    figure.add_bar(
        y=names,
        x=rows["null_high"] - rows["null_low"],
        base=rows["null_low"],
        orientation="h",
        name="rows with random signs (95%)",
        marker=dict(color=ALL, opacity=0.3, line=dict(width=0)),
        width=0.62,
        hoverinfo="skip",
        # A bar that is clicked fades the others otherwise.
        selected=dict(marker=dict(opacity=0.3)),
        unselected=dict(marker=dict(opacity=0.3)),
    )
    figure.add_scatter(
        y=names,
        x=drawn["forecast"],
        mode="markers+text",
        text=[f"{value:.3g}" if far else "" for value, far in zip(rows["forecast"], beyond, strict=True)],
        textposition=list(np.where(rows["forecast"] > 0, "middle left", "middle right")),
        name="forecast, with its 95% interval",
        marker=dict(
            color=np.where(rows["forecast"] > 0, HERE, PASSING), size=10, symbol=np.where(beyond, arrows, "circle")
        ),
        selected=dict(marker=dict(opacity=1)),
        unselected=dict(marker=dict(opacity=1)),
        error_x=dict(
            symmetric=False,
            array=(drawn["high"] - drawn["forecast"]).fillna(0).where(~beyond, 0),
            arrayminus=(drawn["forecast"] - drawn["low"]).fillna(0).where(~beyond, 0),
            color=ALL,
            thickness=1.6,
        ),
        customdata=rows[["forecast", "low", "high"]],
        hovertemplate="%{y}<br>%{customdata[0]:.3g} (%{customdata[1]:.3g} to %{customdata[2]:.3g})<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed", automargin=True, type="category")
    figure.update_xaxes(title=across, zeroline=True)
    if beyond.any():
        low, high = (
            float(drawn[name].fillna(drawn["forecast"]).agg(side)) for name, side in (("low", "min"), ("high", "max"))
        )
        room = 0.04 * (high - low)
        figure.update_xaxes(range=[min(low, 0) - room, max(high, 0) + room])
    return figure


def show_forecast(table: pd.DataFrame, audit_name: str, across: str) -> None:
    """The movers in a chart that leads on to their rows, and every concept in a table."""
    probes = bool((table["kind"] == "probe").any())
    relative = bool((table["usual"] > 0).any())
    units = "relative" if relative else "forecast"
    shown = in_units(table, units)
    if not len(shown):
        st.info(
            "There is no concept to forecast: no SAE feature fires, and no probe is trained.", icon=":material/info:"
        )
        return
    clear = int(shown["clear"].sum())
    st.caption(
        f"Of {len(shown):,} {'SAE features' if relative else 'concepts'}, {clear:,} move further than 95% of what rows with "
        f"random signs give ({max(1, round(0.05 * len(shown))):,} would by chance). Units: {UNITS[units]}."
    )
    rows = movers(shown)
    event = st.plotly_chart(
        forecast_chart(rows, across),
        key="forecast-chart",
        on_select="rerun",
        selection_mode="points",
        config=QUIET,
        alt="The concepts that rise and fall most, with intervals and the band of chance",
    )
    points = event.selection.points if event else []
    chosen = rows.iloc[int(points[0]["point_index"])] if points else rows.iloc[0]
    with st.container(horizontal=True, vertical_alignment="center"):
        st.page_link(
            "app_pages/ranking.py",
            label=f"Rows that push “{plain(short(chosen['title']))}” most",
            icon=":material/format_list_numbered:",
            query_params={"audit": audit_name, "concept": chosen["concept_id"], "method": "concept_influence"},
        )
        st.caption("Click a mark in the chart to choose another concept.")
    if probes:
        st.subheader("Probes")
        _listed(table[table["kind"] == "probe"], "forecast-probes", features=False)
    if relative:
        st.subheader("All SAE features")
        _listed(table[table["kind"] == "sae_feature"], "forecast-features", features=True)


def _listed(table: pd.DataFrame, key: str, features: bool) -> None:
    columns = ["concept_id", "label", "forecast", "low", "high", "null_low", "null_high"]
    number = st.column_config.NumberColumn
    st.dataframe(
        table[[*columns[:2], *(["relative"] if features else []), *columns[2:]]],
        hide_index=True,
        placeholder=NOTHING,
        key=key,
        alt="Every concept with its forecast",
        column_config={
            "concept_id": "Concept",
            "label": "Label",
            "relative": number(
                "Of the usual",
                format="%.2f ×",
                help="The forecast over the feature's mean activation: 1 × is as much as it fires by on average",
            ),
            "forecast": number("Forecast", format="%.3g"),
            "low": number("from", format="%.3g"),
            "high": number("to", format="%.3g"),
            "null_low": number("chance from", format="%.3g"),
            "null_high": number("chance to", format="%.3g"),
        },
    )
