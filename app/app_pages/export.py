"""Export: rows to take away."""

from __future__ import annotations

import streamlit as st

from app.components.filters import row_filter
from app.components.session import current_audit
from backend import FORMATS, to_bytes

MIME = {"csv": "text/csv", "jsonl": "application/jsonl", "parquet": "application/vnd.apache.parquet"}
WHAT = {"any": "Flagged rows", "none": "The data without them", "all": "All rows"}
PREVIEW = 50

audit = current_audit()
st.title("Export")
with st.container(horizontal=True, vertical_alignment="bottom"):
    what = st.segmented_control(
        "Rows",
        list(WHAT),
        format_func=WHAT.get,
        default="any",
        required=True,
        key="rows",
        bind="query-params",
    )
    format = st.segmented_control(
        "Format",
        FORMATS,
        format_func=str.upper,
        default="csv",
        required=True,
        key="format",
        bind="query-params",
    )
where = row_filter(audit, flag=False)
where = type(where)(text=where.text, metadata=where.metadata, flag="" if what == "all" else what)
count = audit.count(where)
if not count:
    st.info(
        "No row is flagged yet: flag rows on the Audit page, and they appear here."
        if what == "any"
        else "No row passes the filters.",
        icon=":material/flag:",
    )
    st.page_link("app_pages/ranking.py", label="Audit", icon=":material/format_list_numbered:")
    st.stop()
suffix = {"any": "flagged", "none": "kept", "all": "all"}[what]
st.download_button(
    f"Download {count:,} {'row' if count == 1 else 'rows'}", lambda: to_bytes(audit.export_table(where), format),
    file_name=f"{audit.name}-{suffix}.{format}", mime=MIME[format], type="primary", icon=":material/download:",
    on_click="ignore",
)  # fmt: skip
st.caption(
    "CSV cells that a spreadsheet would take for a formula begin with an apostrophe; JSONL and Parquet keep every text as it is. "
    "Copies of a row share its flag."
)
preview = audit.rows(where, PREVIEW)
st.dataframe(
    preview[["example_id", "flag", "prompt", "response", "source", "source_row", "metadata"]],
    hide_index=True, height=520 if count > 12 else "content", alt="The first rows of the export",
)  # fmt: skip
if count > PREVIEW:
    st.caption(f"The first {PREVIEW} of {count:,} rows")
