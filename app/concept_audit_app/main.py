"""The dashboard's frame: which audit is open, and the pages."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from concept_audit_app.components.courier import courier, do_what_was_asked
from concept_audit_app.components.flags import flags_drawn, watch_others
from concept_audit_app.components.session import choose_audit, read_only, sign_in, who_box
from concept_audit_app.components.views import named_views

PAGES = [
    st.Page(
        "app_pages/overview.py",
        title="Overview",
        icon=":material/dashboard:",
        url_path="home",  # which nobody sees: the default page is at the dashboard's own address
        default=True,
        help="The data, the model and the concepts of this audit at a glance.",
    ),
    st.Page(
        "app_pages/forecast.py",
        title="Forecast",
        icon=":material/trending_up:",
        help="Which concepts training on this data would strengthen or weaken, with intervals.",
    ),
    st.Page(
        "app_pages/concepts.py",
        title="Concepts",
        icon=":material/category:",
        help="Search the SAE features by token, see where each fires, and pick one to rank the data by.",
    ),
    st.Page(
        "app_pages/probe_lab.py",
        title="Probe lab",
        icon=":material/science:",
        help="Draw a concept of your own: label rows or typed examples and train a linear probe.",
    ),
    st.Page(
        "app_pages/ranking.py",
        title="Audit",
        icon=":material/format_list_numbered:",
        url_path="audit",
        help="The rows by their influence on a concept, with token heatmaps. Flag what should go.",
    ),
    st.Page(
        "app_pages/compare.py",
        title="Compare",
        icon=":material/compare_arrows:",
        help="Two methods or two concepts side by side, and the rows on which they disagree.",
    ),
    st.Page(
        "app_pages/groups.py",
        title="Groups",
        icon=":material/workspaces:",
        help="Which SAE features, sources, metadata values or flags carry the influence on a concept.",
    ),
    st.Page(
        "app_pages/evidence.py",
        title="Evidence",
        icon=":material/fact_check:",
        help="The rankings against labels and against one another.",
    ),
    st.Page(
        "app_pages/export.py",
        title="Export",
        icon=":material/download:",
        help="Take away the flagged rows, or the data without them, as CSV, JSONL or Parquet.",
    ),
]

OVERVIEW = PAGES[0]


def to_overview() -> None:
    """Lead on to the overview, whose own address is that of the dashboard itself."""
    st.switch_page(OVERVIEW, query_params=[(k, v) for k in st.query_params for v in st.query_params.get_all(k)])


# People type the names of pages into the address, this one's too.
NAMED_OVERVIEW = st.Page(to_overview, title="Overview", url_path="overview", visibility="hidden")

st.set_page_config(page_title="Concept audit", page_icon=str(Path(__file__).with_name("icon.png")), layout="wide")
# Where Streamlit's own colours fall short of WCAG's contrast of 4.5 to 1: captions, and primary buttons in the dark.
style = (Path(__file__).parent / "style.css").read_text("utf-8")
style += '[data-testid="stCaptionContainer"]{opacity:.82}[data-testid="stCaptionContainer"],[data-testid="stCaptionContainer"] *{color:inherit}'
if st.context.theme.type == "dark":
    style += 'button[kind^="primary"] *{color:#10171a}[data-testid="stStatusWidget"]{background:#12181b}'
st.html(f"<style>{style}</style>")
page = st.navigation([*PAGES, NAMED_OVERVIEW], position="top")
if page.url_path == NAMED_OVERVIEW.url_path:
    page.run()
sign_in()
# Its place is in the header, beside the pages.
frame = st.container(
    key="frame", horizontal=True, horizontal_alignment="right", vertical_alignment="center", gap="small"
)
choose_audit(frame)
do_what_was_asked()  # before anything is read that hangs on it
flags_drawn()
with frame:
    named_views({each.url_path: each for each in PAGES}, page.url_path)
    if read_only():
        st.badge("read-only", color="gray", help="Look at everything, change nothing.")
    who_box()
    courier(page.url_path)
    watch_others()
page.run()
