"""Choosing rows and their form, and handing them out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import streamlit as st

from concept_audit import FORMATS, Audit, AuditError, Format, InfluenceOptions, RowFilter
from concept_audit_app.components.concepts import concept_picker
from concept_audit_app.components.filter_chips import chips_beside_widgets
from concept_audit_app.components.filters import brush_chip, brushed, row_filter
from concept_audit_app.components.methods import influence_options, method_picker
from concept_audit_app.components.plain import counted
from concept_audit_app.components.ranked import ready
from concept_audit_app.components.session import person

MIME = {"csv": "text/csv", "jsonl": "application/jsonl", "parquet": "application/vnd.apache.parquet"}
WHAT = {"view": "A ranked view", "any": "Flagged rows", "none": "Cleaned data", "all": "All rows"}
SUFFIX = {"view": "view", "any": "flagged", "none": "cleaned", "all": "all"}
SCHEMAS = {"audit": "Audit's columns", "own": "The input's own columns"}
CSV = {"safe": "Safe in spreadsheets", "exact": "Reads back exactly"}
PREVIEW = 25


@dataclass(frozen=True)
class Chosen:
    """What is to be taken away."""

    what: str
    format: Format
    schema: str
    exact: bool
    where: RowFilter
    concept: str | None
    method: str | None
    options: InfluenceOptions
    swap: bool = False
    whole_documents: bool = False


def choose(audit: Audit) -> Chosen:
    """Widgets for the rows and their form."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        what = st.segmented_control(
            "Rows",
            list(WHAT),
            format_func=WHAT.__getitem__,
            default="any",
            required=True,
            key="rows",
            bind="query-params",
            help="Cleaned data: all rows but those flagged remove. Rows flagged review, keep, or with a flag of "
            "your own, stay.",
        )
        format = st.segmented_control(
            "Format", FORMATS, format_func=str.upper, default="csv", required=True, key="format", bind="query-params"
        )
        schema = st.segmented_control(
            "Columns",
            list(SCHEMAS),
            format_func=SCHEMAS.__getitem__,
            default="audit",
            required=True,
            key="columns",
            bind="query-params",
            help="The input's own columns are those of the file that the audit was built from, value by value: data "
            "cleaned this way go straight back into training.",
        )
        swap = False
        if schema == "own" and audit.manifest.pair:
            swap = st.toggle(
                "Exchange sides",
                value=True,
                key="swap",
                bind="query-params",
                help="Of pairs flagged swap, chosen becomes rejected and rejected chosen; all others stay as they were.",
            )
        csv = "exact"
        if format == "csv" and schema == "audit":
            csv = st.segmented_control(
                "CSV",
                list(CSV),
                format_func=CSV.__getitem__,
                default="safe",
                required=True,
                key="csv",
                bind="query-params",
                help="Safe: a cell that a spreadsheet would take for a formula begins with an apostrophe. Exact: "
                "every cell is as it was; do not open hostile text in a spreadsheet.",
            )
        whole = False
        if audit.manifest.document is not None:
            whole = st.toggle(
                "Whole documents only",
                key="whole",
                bind="query-params",
                help="Leaves out what is left of a document of which a window is left out.",
            )
    concept, method, options = None, None, InfluenceOptions()
    if what == "view":
        with st.container(horizontal=True, vertical_alignment="bottom"):
            concept = concept_picker(audit)
            if concept is not None:
                method = method_picker(audit, audit.concept(concept))
                options = influence_options(audit, audit.concept(concept), method)
                ready(audit, audit.concept(concept), method, options)
    where = row_filter(audit, flag=what == "view")
    chips_beside_widgets(audit, where)
    if what == "view":
        where = brushed(where)
        brush_chip(where, hint=False)
    else:
        dropped = ("remove",) if what == "none" else ()
        where = replace(where, flag="any" if what == "any" else "", without_flags=dropped)
    return Chosen(what, format, schema, csv == "exact", where, concept, method, options, swap, whole)


def count(audit: Audit, chosen: Chosen) -> int:
    """How many rows there are."""
    if chosen.whole_documents:
        return len(_of_whole_documents(audit, chosen))
    return audit.rows.count(chosen.where, chosen.concept, chosen.method, chosen.options)


def _of_whole_documents(audit: Audit, chosen: Chosen) -> list[int]:
    return audit.exports.rows_of(chosen.where, chosen.concept, chosen.method, chosen.options, whole_documents=True)


def nothing(chosen: Chosen) -> None:
    """Why there is nothing to take away, and what to do."""
    st.info(
        "There is no document of which every window passes. Take parts of documents, too, or widen the filters."
        if chosen.whole_documents
        else "No row is flagged yet: flag rows on the Audit page, and they appear here."
        if chosen.what == "any" and replace(chosen.where, flag="") == RowFilter()
        else "No row passes the filters. Widen them above.",
        icon=":material/flag:",
    )
    st.page_link("app_pages/ranking.py", label="Audit", icon=":material/format_list_numbered:")


def downloads(audit: Audit, chosen: Chosen, rows: int) -> None:
    """The file, and its manifest: that of the file which was downloaded last with this choice, if one was."""
    name = f"{audit.name}-{SUFFIX[chosen.what]}.{chosen.format}"

    def made() -> tuple[bytes, bytes]:
        return audit.exports.to_bytes(
            chosen.format,
            name,
            where=chosen.where,
            schema=chosen.schema,
            concept=chosen.concept,
            method=chosen.method,
            options=chosen.options,
            exact=chosen.exact,
            by=by,
            swap=chosen.swap,
            whole_documents=chosen.whole_documents,
        )

    def file() -> bytes:
        kept.clear()  # one at most: it may be large
        kept[choice] = made()
        return kept[choice][0]

    def manifest() -> bytes:
        return (kept.get(choice) or made())[1]

    by = person()
    kept, choice = st.session_state.setdefault("_exported", {}), repr((audit.root, chosen))
    if chosen.schema == "own" and (problem := _input_problem(audit)):
        st.error(problem, icon=":material/error:")
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        st.download_button(
            f"Download {_what_is_in_it(audit, chosen, rows)}",
            file,
            file_name=name,
            mime=MIME[chosen.format],
            type="primary",
            icon=":material/download:",
            on_click="ignore",
        )
        st.download_button(
            "Manifest",
            manifest,
            file_name=f"{name}.manifest.json",
            mime="application/json",
            icon=":material/description:",
            on_click="ignore",
            help="How these rows came about: audit, concept and version, method, filters, flags, time, and the "
            "file's checksum. Keep it beside them.",
        )
    st.caption("Copies of a row share its flag. In a terminal: `concept-audit export` writes the same files.")


def _what_is_in_it(audit: Audit, chosen: Chosen, rows: int) -> str:
    """What a line of the file is, and how many there are: of documents in the input's columns, a document."""
    if audit.manifest.document is None:
        return counted(rows, "row")
    ranking = (chosen.concept, chosen.method, chosen.options, chosen.whole_documents)
    documents = counted(audit.documents.number_of(audit.exports.rows_of(chosen.where, *ranking)), "document")
    return documents if chosen.schema == "own" else f"{counted(rows, 'row')} of {documents}"


def _input_problem(audit: Audit) -> str | None:
    try:
        audit.exports.check_input()
    except AuditError as error:
        return str(error)
    return None


def preview(audit: Audit, chosen: Chosen, rows: int) -> None:
    """The first rows."""
    where = chosen.where
    if chosen.whole_documents:
        where = replace(where, example_ids=tuple(_of_whole_documents(audit, chosen)[:PREVIEW]))
    if chosen.concept:
        shown = audit.rank(chosen.concept, chosen.method, PREVIEW, where, options=chosen.options)
    else:
        shown = audit.rows.list(where, PREVIEW)
    columns = [name for name in ("rank", "score") if name in shown]
    columns += ["example_id", "flag", "note", "prompt", "response", "source", "source_row", "metadata"]
    for name in ("prompt", "response", "metadata"):
        shown[name] = shown[name].str.slice(0, 300)
    shown[["flag", "note"]] = shown[["flag", "note"]].fillna("")  # not the word None
    st.dataframe(
        shown[columns], hide_index=True, height=520 if rows > 12 else "content", alt="The first rows of the export"
    )
    if rows > PREVIEW:
        st.caption(f"{PREVIEW} of {rows:,} rows, cut to 300 characters")
