"""Two rankings beside each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd
import streamlit as st

from concept_audit import Agreement, Audit, AuditError, Concept, InfluenceOptions, RowFilter
from concept_audit_app.components.charts import QUIET, overlap_chart, points_chart
from concept_audit_app.components.methods import NAMES, influence_options, select_method
from concept_audit_app.components.plain import counted
from concept_audit_app.components.ranked import chosen_concept, ready
from concept_audit_app.components.rows import RowCard
from concept_audit_app.components.tables import records
from concept_audit_app.components.url import in_url, put

POINTS = 2000
SHOWN = 10
HIGHER = {"either": "Either way", "a": "First puts higher", "b": "Second puts higher"}


@dataclass(frozen=True)
class Side:
    """One of the two rankings."""

    concept: Concept
    method: str
    options: InfluenceOptions

    @property
    def ranking(self) -> tuple[str, str, InfluenceOptions]:
        return self.concept.concept_id, self.method, self.options

    def name(self, beside: Side) -> str:
        """What tells it from the other side."""
        if self.concept.concept_id == beside.concept.concept_id:
            return NAMES[self.method]
        method = "" if self.method == beside.method else f", {NAMES[self.method].lower()}"
        return f"{self.concept.name}{method}"


def choose_sides(audit: Audit) -> tuple[Side, Side]:
    """The two rankings, computed if need be."""
    sides = []
    for place, column in zip(("", "2"), st.columns(2, gap="large"), strict=True):
        with column, st.container(horizontal=True, vertical_alignment="bottom"):
            concept = chosen_concept(audit, f"concept{place}", "Second concept" if place else "First concept")
            method = select_method(
                f"method{place}",
                "Second method" if place else "First method",
                audit,
                concept,
                "activation_similarity" if place else None,
            )
            # The options of the first are in the URL; those of the second are the defaults.
            options = InfluenceOptions() if place else influence_options(audit, concept, method)
        sides.append(Side(concept, method, options))
    for side in sides:
        ready(audit, side.concept, side.method, side.options)
    return sides[0], sides[1]


def _agreement(audit: Audit, one: Side, other: Side, where: RowFilter) -> Agreement:
    return audit.comparisons.agreement(one.ranking, other.ranking, where)


def figures(audit: Audit, one: Side, other: Side, where: RowFilter) -> None:
    """Rank correlation, and overlap of the first rows."""
    found = _agreement(audit, one, other, where)
    if found.n_rows < 2:
        st.info("Fewer than two rows pass the filters. Widen them above.", icon=":material/filter_alt_off:")
        st.stop()
    low, high = found.interval
    with st.container(horizontal=True):
        st.metric(
            "Rank correlation",
            f"{found.spearman:.2f} ({low:.2f} to {high:.2f})",
            border=True,
            help="Spearman's with a 95% interval, over the rows that pass the filter",
        )
        for depth in (10, 50, 100):
            if depth <= found.n_rows:
                shared = found.overlap[found.depths.tolist().index(depth)]
                st.metric(f"First {depth} in common", f"{shared:.0%}", border=True)
        st.metric("Rows", f"{found.n_rows:,}", border=True)


def scatter(audit: Audit, one: Side, other: Side, where: RowFilter) -> None:
    """Each row's two scores; a box drawn in it keeps the rows within."""
    points = audit.comparisons.points(one.ranking, other.ranking, where, POINTS)

    def boxed() -> None:
        boxes = st.session_state["compare-points"].selection.box
        spans = [sorted(boxes[0][axis]) for axis in ("x", "y")] if boxes else None
        put("box", ",".join(f"{v:.6g}" for span in spans for v in span) if spans else None)

    box = _box()
    chosen = _inside(points, box)["example_id"].tolist() if box else []
    st.plotly_chart(
        points_chart(points, f"{one.name(other)} (score)", f"{other.name(one)} (score)", chosen),
        key="compare-points",
        config=QUIET,
        on_select=boxed,
        selection_mode="box",
        alt=f"{len(points):,} rows by their scores in {one.name(other)} and {other.name(one)}",
    )
    more = "" if len(points) < POINTS else f" {POINTS:,} rows drawn at random."
    if box:
        st.button(
            f"{counted(len(chosen), 'row')} in the box",
            icon=":material/close:",
            key="forget-box",
            on_click=put,
            args=("box", None),
        )
    else:
        st.caption(f"Draw a box around points to see those rows below.{more}")


def overlap(audit: Audit, one: Side, other: Side, where: RowFilter) -> None:
    """How many of the first k rows the two have in common."""
    found = _agreement(audit, one, other, where)
    st.plotly_chart(
        overlap_chart(found.depths, found.overlap, found.n_rows),
        key="overlap",
        config=QUIET,
        alt="Share of the first k rows that the two rankings have in common, against k",
    )


def disagreements(audit: Audit, one: Side, other: Side, where: RowFilter) -> None:
    """The rows on which the two disagree most, or those in the box, as cards."""
    box = _box()
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader("Rows in the box" if box else "Rows on which they disagree most", width="content")
        higher = st.segmented_control(
            "Which way",
            list(HIGHER),
            format_func=HIGHER.__getitem__,
            default="either",
            required=True,
            key="higher",
            bind="query-params",
            label_visibility="collapsed",
        )
    if box:
        inside = _inside(audit.comparisons.points(one.ranking, other.ranking, where, POINTS), box)
        where = replace(where, example_ids=tuple(int(i) for i in inside["example_id"]))
    rows = audit.comparisons.disagreements(one.ranking, other.ranking, where, higher, SHOWN)
    if rows.empty:
        st.info("No row is in the box. Draw it around some points.", icon=":material/crop_free:")
        return
    lexical = _lexical(audit, one, rows["example_id"].tolist())
    for row in records(rows):
        number = int(row["example_id"])
        words = f"{one.name(other)} #{row['a_rank']:,} · {other.name(one)} #{row['b_rank']:,}"
        words += f" · words in common with the queries #{lexical[number]:,}" if number in lexical else ""
        opens = {"audit": audit.name, "concept": one.concept.concept_id, "method": one.method}
        RowCard(row, elsewhere=words, opens=opens)


def _lexical(audit: Audit, side: Side, ids: list[int]) -> dict[int, int]:
    """Ranks by BM25 against the concept's queries."""
    try:
        rows = audit.rank(side.concept.concept_id, "bm25", where=RowFilter(example_ids=tuple(int(i) for i in ids)))
    except AuditError:
        return {}
    return {int(row["example_id"]): int(row["rank"]) for row in records(rows)}


def _box() -> tuple[float, float, float, float] | None:
    try:
        left, right, low, high = map(float, (in_url("box") or "").split(","))
    except ValueError:
        return None
    return left, right, low, high


def _inside(points: pd.DataFrame, box: tuple[float, float, float, float]) -> pd.DataFrame:
    left, right, low, high = box
    return points[points["a_score"].between(left, right) & points["b_score"].between(low, high)]
