"""Facets of a ranked view: what values its rows have, and a click that keeps or leaves out those with one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import streamlit as st

from concept_audit import Audit, InfluenceOptions, RowFilter
from concept_audit_app.components.facet_filter import put_span, put_values
from concept_audit_app.components.paging import first_page
from concept_audit_app.components.tables import records

KEY = "facets"
VALUES = 10
"""Of a field, that are shown; the others are found by a search."""
BINS = 24
LONGEST = 200
"""Letters of a search."""
HERE = Path(__file__).parent
_component = st.components.v2.component(
    "concept_audit_facets",
    html=(HERE / "facets.html").read_text("utf-8"),
    css=(HERE / "facets.css").read_text("utf-8"),
    js=(HERE / "facets.js").read_text("utf-8"),
)


def facets(audit: Audit, concept: str, method: str, options: InfluenceOptions, where: RowFilter) -> None:
    """Every metadata field that differs between rows, and the source, as facets; a click changes the URL.

    Each counts the rows that pass the filter, what it asks of the field itself apart.
    """
    view: dict[str, Any] = {"where": where, "concept": concept, "method": method, "options": options}
    asked = _asked()
    shown: list[dict[str, Any]] = []
    fields = records(audit.rows.metadata_fields())
    sources = audit.rows.sources()["source"].tolist()
    if len(sources) > 1:
        chosen: dict[str, Any] = {"kept": list(where.sources), "left": list(where.without_sources), "span": None}
        shown.append({"id": "0", "name": "source", "chosen": chosen, **_values(audit, None, chosen, asked, "0", view)})
    for place, field in enumerate(fields, 1):
        name = field["field"]
        if field["n_values"] < 2:
            continue
        chosen = {
            "kept": list(where.metadata.get(name, ())),
            "left": list(where.without.get(name, ())),
            "span": _finite(where.ranges.get(name)),
        }
        about = {"id": str(place), "name": name, "chosen": chosen}
        numbers = _numbers(audit, field, view)
        shown.append(about | (numbers or _values(audit, name, chosen, asked, str(place), view)))
    _component(
        key=KEY,
        data={"fields": shown, "client": asked.get("client", ""), "n": asked.get("n", 0)},
        on_asked_change=lambda: _take([None, *(field["field"] for field in fields)]),
    )


def _asked() -> dict[str, Any]:
    return (st.session_state.get(KEY) or {}).get("asked") or {}


def _values(
    audit: Audit,
    name: str | None,
    chosen: Mapping[str, Any],
    asked: Mapping[str, Any],
    place: str,
    view: dict[str, Any],
) -> dict[str, Any]:
    search = str(asked.get("searches", {}).get(place, ""))[:LONGEST]
    always = [*chosen["kept"], *chosen["left"]]
    found = records(audit.rows.facet(name, search=search, limit=VALUES + len(always), always=always, **view))
    values = [{"value": row["value"], "rows": int(row["n_rows"]), "flagged": int(row["n_flagged"])} for row in found]
    values.sort(key=lambda each: -each["rows"])
    there = {each["value"] for each in values}
    # What is chosen can be taken back although no row has it now.
    values += [{"value": value, "rows": 0, "flagged": 0} for value in always if value not in there]
    return {"values": values, "values_in_all": max(int(found[0]["n_values"]) if found else 0, len(values))}


def _numbers(audit: Audit, field: Mapping[str, Any], view: dict[str, Any]) -> dict[str, Any] | None:
    """The histogram of a field whose values are numbers, and many; None for any other."""
    if field["n_values"] <= VALUES or not all(map(_is_number, field["top_values"])):
        return None
    found = {int(row["bin"]): row for row in records(audit.rows.facet_histogram(field["field"], bins=BINS, **view))}
    empty = {"low": 0.0, "high": 0.0, "n_rows": 0, "n_flagged": 0}
    rows = [found.get(place, empty) for place in range(max(found, default=0) + 1)]
    bins = [
        {"low": row["low"], "high": row["high"], "rows": int(row["n_rows"]), "flagged": int(row["n_flagged"])}
        for row in rows
    ]
    return {"bins": bins}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _finite(bounds: tuple[float, float] | None) -> list[float | None] | None:
    """As JSON can say it: None for a bound that bounds nothing."""
    return None if bounds is None else [bound if math.isfinite(bound) else None for bound in bounds]


def _take(fields: list[str | None]) -> None:
    """Put what has been chosen into the URL."""
    for place, chosen in _asked().get("chosen", {}).items():
        if not place.isdecimal() or int(place) >= len(fields):
            continue
        name = fields[int(place)]
        put_values(name, map(str, chosen["kept"]), map(str, chosen["left"]))
        if name is not None:
            low, high = chosen["span"] or (None, None)
            bounds = (-math.inf if low is None else float(low), math.inf if high is None else float(high))
            put_span(name, None if low is None and high is None else bounds)
    first_page()
