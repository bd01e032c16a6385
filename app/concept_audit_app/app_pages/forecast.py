"""Forecast: which concepts training on this data would strengthen or weaken."""

from __future__ import annotations

import streamlit as st

from concept_audit import AuditError, RowFilter
from concept_audit_app.components.charts import short
from concept_audit_app.components.forecast_evidence import measured
from concept_audit_app.components.forecast_view import by_ranking, show_forecast
from concept_audit_app.components.forecasting import needed
from concept_audit_app.components.session import current_audit, read_only
from concept_audit_app.components.tables import NOTHING, records
from concept_audit_app.components.url import select_by_id

EVERY, FLAGGED = RowFilter(), RowFilter(flag="any")
MOST_VALUES = 40
VIEWS = {
    "all": "All rows",
    "part": "A part of the rows",
    "compare": "A part against the rest",
    "without": "Without the flagged rows",
}
EVERYTHING = "mean effect of a row<br>strengthened →"

audit = current_audit()
st.title("Forecast")
st.caption(
    "What training on these rows would do to each concept, to first order, on 64 neutral prompts with plain answers: the mean "
    "of the rows' exact concept influence there. It says in which direction and how much more than another concept, not "
    "how far a real training run goes."
)
parts: dict[str, RowFilter] = {"flagged": FLAGGED}
names = {"flagged": "Flagged rows"}
sources = audit.rows.sources()["source"].tolist()
for source in sources if len(sources) > 1 else ():
    parts[f"source:{source}"] = RowFilter(sources=(source,))
    names[f"source:{source}"] = f"Source: {source}"
for field in records(audit.rows.metadata_fields()):
    if 1 < field["n_values"] <= MOST_VALUES:
        for value in field["top_values"]:
            parts[f"{field['field']}={value}"] = RowFilter(metadata={field["field"]: (str(value),)})
            names[f"{field['field']}={value}"] = f"{field['field']}: {value}"
with st.container(horizontal=True, vertical_alignment="bottom"):
    view = select_by_id("Forecast of", list(VIEWS), VIEWS.__getitem__, "forecast", width=230)
    chosen = "flagged"
    if view in ("part", "compare"):
        chosen = select_by_id("Part", list(parts), names.__getitem__, "part", width=260)
where = parts[chosen]
try:
    if view != "all" and not audit.forecasts.count(where):
        what = "No row is flagged yet. Flag some on the Audit page, and see here what goes with them."
        st.info(what if chosen == "flagged" else "No row is in this part.", icon=":material/flag:")
        st.stop()
    if view == "without":
        effects = audit.forecasts.removal_effects(where)
        if len(effects):
            st.subheader("At once, for concepts with influence scores")
            st.caption(
                "Mean concept influence of all rows, and of those that stay, on the query examples of each ranking."
            )
            st.dataframe(
                by_ranking(effects),
                hide_index=True,
                placeholder=NOTHING,
                key="removal",
                alt="Mean influence with and without the flagged rows",
                column_config={
                    "concept_id": "Concept",
                    "ranking": "Ranking",
                    "before": st.column_config.NumberColumn("All rows", format="%.3g"),
                    "after": st.column_config.NumberColumn("Without the flagged", format="%.3g"),
                    "n_left_out": st.column_config.NumberColumn("Rows left out", format="localized"),
                },
            )
            st.subheader("For every concept")
    wanted = {"all": [EVERY], "part": [where], "compare": [EVERY, where], "without": [EVERY, where]}[view]
    if not needed(audit, wanted, "This forecast", read_only()):
        measured(audit)
        st.stop()
    with st.spinner("Intervals …"):
        if view == "compare":
            table, across = (
                audit.forecasts.difference(where),
                f"{short(names[chosen])} less the rest,<br>mean effect of a row",
            )
        elif view == "without":
            table, across = audit.forecasts.without(where), EVERYTHING
        else:
            table, across = audit.forecasts.forecast(wanted[0]), EVERYTHING
except AuditError as error:
    st.error(str(error), icon=":material/error:")
    st.stop()
if table["low"].isna().all() and len(table):
    st.warning("Too few rows for intervals: they fall into fewer than four groups.", icon=":material/warning:")
show_forecast(table, audit.name, across)
measured(audit)
