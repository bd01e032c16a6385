"""Groups: which SAE features, sources, metadata values or flags carry the influence."""

from __future__ import annotations

import streamlit as st

from concept_audit import AuditError, InfluenceOptions
from concept_audit_app.components.charts import beside_chart, interval_chart
from concept_audit_app.components.concepts import concept_picker
from concept_audit_app.components.index import index_state
from concept_audit_app.components.methods import NAMES, SLOW, WITH_GRADIENTS, influence_options, method_picker, offer
from concept_audit_app.components.plain import counted
from concept_audit_app.components.progress import PageProgress
from concept_audit_app.components.session import current_audit
from concept_audit_app.components.tables import NOTHING
from concept_audit_app.components.url import select_by_id

SHOWN = 24
BESIDE = {"none": "Nothing", "influence_function": "Influence function", "vector_filter": "Vector filter"}

audit = current_audit()
st.title("Groups")
features = not audit.concepts.features().empty
fields = audit.rows.metadata_fields()
few = fields[(fields.n_values > 1) & (fields.n_values <= 200)]["field"].tolist()
ways = [*(["sae_feature"] if features else []), *few, "source", "flag"]
titles = {"sae_feature": "SAE features that fire", "source": "Source", "flag": "Flag"}
with st.container(horizontal=True, vertical_alignment="bottom"):
    concept_id = concept_picker(audit)
    if concept_id is None:
        st.info("There is no concept yet. Draw a probe first.", icon=":material/science:")
        st.page_link("app_pages/probe_lab.py", label="Probe lab", icon=":material/science:")
        st.stop()
    try:
        concept = audit.concept(concept_id)
    except AuditError as error:
        st.error(str(error), icon=":material/error:")
        st.stop()
    method = method_picker(audit, concept)
    options = influence_options(audit, concept, method)
    by = select_by_id("Group by", ways, lambda way: titles.get(way, way), "by", width=220)
    others = [name for name in BESIDE if name != method]
    beside = select_by_id(
        "Beside it",
        others,
        BESIDE.__getitem__,
        "beside",
        width=190,
        help="A second method, so that one sees which groups only one of them finds",
    )

# An exact influence function takes a pass over the rows through all blocks; beside another method the index's will do.
instant = (
    InfluenceOptions.of(engine="index")
    if beside == "influence_function" and audit.index.describe()
    else InfluenceOptions()
)
try:
    wanted = [(method, options), *([] if beside == "none" else [(beside, instant)])]
    for each, how in wanted:
        served = each in SLOW and audit.rankings.served_by_index(concept_id, each, how)
        if each in SLOW and not served and not audit.rankings.has(concept_id, each, how):
            offer(audit, concept, each, how)
            st.stop()
    with st.spinner("Ranking the rows …"):
        for each, how in wanted:
            audit.rankings.ensure(concept_id, each, how, PageProgress())
    table = audit.groups(concept_id, method, by, options, None if beside == "none" else beside, instant)
except AuditError as error:
    st.error(str(error), icon=":material/error:")
    st.stop()
if table.empty:
    st.info("No row with a score is in a group. Choose another grouping.", icon=":material/workspaces:")
    st.stop()

ends = table
if len(table) > SHOWN:
    # By the near end of the interval: a mean of three rows may lie anywhere.
    surest = [*table.nlargest(SHOWN // 2, "low").index, *table.nsmallest(SHOWN // 2, "high").index]
    ends = table.loc[sorted(set(surest))]
which = f" Drawn are the {SHOWN // 2} that are most surely high, and the {SHOWN // 2} most surely low."
st.caption(
    f"{NAMES[method]} of “{concept.name}”: the mean score of each group's rows with a 95% bootstrap interval. "
    f"{counted(len(table), 'group')}; a row may be in several.{which if len(ends) < len(table) else ''}"
)
names = [f"{g} · {text}" if by == "sae_feature" else str(g) for g, text in zip(table.group, table.label, strict=True)]
shown = table.assign(name=names)
if beside != "none":
    st.plotly_chart(
        beside_chart(shown, NAMES[method], NAMES[beside]),
        key="beside-chart",
        config={"displayModeBar": False},
        alt=f"Each group's mean {NAMES[method]} against its mean {NAMES[beside]}",
    )
st.plotly_chart(
    interval_chart(shown.loc[ends.index]),
    key="groups-chart",
    config={"displayModeBar": False},
    alt="Mean score of each group with its interval",
)
st.dataframe(
    shown.drop(columns=["name"]),
    hide_index=True,
    placeholder=NOTHING,
    key="groups-table",
    alt="All groups",
    column_config={
        "group": "Group",
        "label": "Label",
        "n_rows": "Rows",
        "mean": st.column_config.NumberColumn("Mean", format="%.4g"),
        "low": st.column_config.NumberColumn("from", format="%.4g"),
        "high": st.column_config.NumberColumn("to", format="%.4g"),
        "difference": st.column_config.NumberColumn(
            "From all rows",
            format="%+.2f",
            help="Difference from the mean of all rows, in standard deviations of the scores",
        ),
    },
)
if method in WITH_GRADIENTS or beside in WITH_GRADIENTS:
    index_state(audit)
