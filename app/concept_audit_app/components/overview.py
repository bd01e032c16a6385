"""What the overview is made of."""

from __future__ import annotations

import streamlit as st

from concept_audit import Audit
from concept_audit_app.components.charts import QUIET, counts_chart, interval_chart
from concept_audit_app.components.forecasting import jobs
from concept_audit_app.components.index import index_state
from concept_audit_app.components.plain import counted, plain
from concept_audit_app.components.tables import records
from concept_audit_app.components.url import select_by_id
from concept_audit_app.components.validating import validations

SEPARATING = 10
MOST_VALUES = 30
MOST_SKIPPED = 1_000
COSTS = {
    "activations": "a forward pass over the rows, to the deepest layer",
    "sae": "training on the rows' activations: a minute or two for 50,000 tokens on a laptop",
    "features": "as long as the forward pass, or seconds where activations are kept",
    "store": "seconds",
    "index": "about three forward and backward passes over the rows; see `concept-audit index`",
    "answers": "one generated answer a row, when projection difference is first asked for",
}
NAMES = {
    "rows": "Rows read",
    "tokens": "Rows as the model reads them",
    "activations": "Activations",
    "sae": "Sparse autoencoder",
    "features": "SAE features",
    "store": "Store",
    "index": "Gradient index",
    "answers": "The model's own answers",
}


def counts(audit: Audit) -> None:
    """Rows, tokens, duplicates, concepts and flags in figures."""
    found = audit.overview()
    longest = audit.manifest.configuration["max_tokens"]
    with st.container(horizontal=True):
        st.metric("Rows", f"{found.n_rows:,}", border=True)
        st.metric("Response tokens", f"{found.n_response_tokens:,}", border=True, help=f"of {found.n_tokens:,} in all")
        st.metric(
            "Duplicates", f"{found.n_duplicates:,}", border=True, help="rows whose text came before; kept and scored"
        )
        st.metric(
            "Cut",
            f"{found.n_truncated:,}",
            border=True,
            help=f"rows longer than {longest:,} tokens; {found.n_unscored:,} have no response left to score",
        )
        if skipped := audit.manifest.report("rows").get("skipped"):
            st.metric("Left out", f"{skipped:,}", border=True, help="rows that cannot be used; listed below")
        st.metric("SAE features", f"{found.n_features:,}", border=True, help="features that fire on this data")
        st.metric("Probes", f"{found.n_probes:,}", border=True)
        st.metric("Flagged", f"{found.n_flagged:,}", border=True)


def left_out(audit: Audit) -> None:
    """The rows that the build left out, and why."""
    skipped = audit.manifest.report("rows").get("skipped")
    if not skipped:
        return
    with st.expander(f"{counted(skipped, 'row')} of the data left out", icon=":material/block:"):
        st.dataframe(audit.rows.skipped(MOST_SKIPPED)[["source", "source_row", "reason"]], hide_index=True)
        if skipped > MOST_SKIPPED:
            st.caption(f"The first {MOST_SKIPPED:,}; `concept-audit info --skipped` lists all.")


def running(audit: Audit) -> None:
    """What is being computed for this audit: the gradient index, forecasts, validations."""
    under_way = any(root == str(audit.root) for kind in (jobs(), validations()) for root, _ in kind.under_way()) or (
        audit.index.describe() is None and audit.index.progress() is not None
    )
    st.subheader("Work in the background" if under_way else "Gradient index")
    index_state(audit)
    for title, kind in (("Forecast", jobs()), ("Validation", validations())):
        for (root, _), job in kind.under_way().items():
            if root == str(audit.root):
                st.progress(job.share, f"{title}: {plain(job.doing) or 'the model is being loaded'}")


def data(audit: Audit) -> None:
    """Lengths, sources and metadata of the rows."""
    st.subheader("Data")
    edges, heights = audit.rows.lengths()
    st.plotly_chart(
        counts_chart(edges, heights, "tokens a row", "rows"),
        key="lengths-chart",
        config=QUIET,
        alt=f"Histogram of the rows' lengths, up to {edges[-1]:,.0f} tokens",
    )
    sources = audit.rows.sources()
    st.caption(
        "Sources: "
        + ", ".join(f"{plain(row['source'])} ({counted(row['n_rows'], 'row')})" for row in records(sources.head(6)))
        + (f" and {len(sources) - 6:,} more" if len(sources) > 6 else "")
    )
    fields = audit.rows.metadata_fields()
    if fields.empty:
        st.caption("The rows have no columns besides the conversation.")
        return
    shown = fields.assign(top_values=[", ".join(values[:8]) for values in fields.top_values])
    st.dataframe(
        shown,
        hide_index=True,
        alt="Metadata fields with their most frequent values",
        column_config={"field": "Field", "n_rows": "Rows", "n_values": "Values", "top_values": "Most frequent"},
    )


def sae_quality(audit: Audit) -> None:
    """The quality of the SAE, and how many of its features fire."""
    live, every = audit.overview().n_features, len(audit.concepts.features(order="feature_id", live_only=False))
    if not every:
        return
    quality = audit.manifest.report("sae")
    words = f"SAE at layer {audit.manifest.configuration['sae_layer']}"
    if quality:
        words += (
            f", trained on this data: held-out explained variance {quality['explained_variance']:.2f}, "
            f"{quality['l0']:.0f} features a token (L0)"
        )
    dead = every - live
    st.caption(f"{words}; {dead:,} of {every:,} features never fire on these data ({_share(dead / every)})")


def _share(part: float) -> str:
    """A share in per cent, in words where rounding would make it none."""
    return "under 1%" if 0 < part < 0.005 else f"{part:.0%}"


def separating(audit: Audit) -> None:
    """SAE features that tell flagged or labelled rows from the others."""
    found = audit.overview()
    if not found.n_features:
        return
    groups: dict[str, tuple[str, str, str]] = {}
    if found.n_flagged:
        groups["Flagged rows"] = ("flagged", "", "")
    fields = audit.rows.metadata_fields()
    few = fields[(fields.n_values > 1) & (fields.n_values <= MOST_VALUES)].sort_values("n_values", kind="stable")
    for field in records(few):
        groups |= {
            f"{field['field']} = {value}": ("metadata", field["field"], value) for value in sorted(field["top_values"])
        }
    groups |= {f"Positive labels of {p.name}": ("labelled", p.name, "") for p in audit.probes.list()}
    if not groups:
        return
    st.subheader("What tells rows apart")
    chosen = select_by_id("Rows", list(groups), str, "group")
    table = audit.concepts.separating(*groups[chosen], limit=SEPARATING)
    if table.empty:
        st.caption("No row of the data is in this group, or every row is.")
        return
    shown = table.assign(name=[f"{row['feature_id']} · {row['label']}" for row in records(table)])
    st.plotly_chart(
        interval_chart(shown, "log-odds that a row in which it fires<br>is one of them", "log_odds"),
        key="separating-chart",
        config=QUIET,
        alt=f"SAE features by log-odds of firing in: {chosen}",
    )
    st.caption(
        "SAE features that fire in these rows (right) or in the others (left), with 95% intervals; the surest first."
    )


def stages(audit: Audit) -> None:
    """How far the audit is, and what each missing part would cost."""
    st.subheader("Stages")
    manifest = audit.manifest
    lines = []
    for stage in ("rows", "tokens", "activations", "sae", "features", "store"):
        if stage in manifest.stages:
            done = manifest.stages[stage]["done"]
            lines.append((NAMES[stage], "done" if done else "not finished", "" if done else COSTS.get(stage, "")))
        elif stage in ("sae", "features"):
            lines.append((NAMES[stage], "left out (--sae none)", COSTS[stage]))
    index, building = audit.index.describe(), audit.index.progress()
    state = (
        "done" if index else f"{building['share']:.0%} of “{building['stage'].lower()}”" if building else "not built"
    )
    lines.append((NAMES["index"], state, "" if index else COSTS["index"]))
    answers = audit.rows.answered()
    rows = audit.overview().n_rows
    lines.append(
        (
            NAMES["answers"],
            "done" if answers >= rows else f"{answers:,} of {rows:,} rows",
            "" if answers >= rows else COSTS["answers"],
        )
    )
    done = [name for name, told, _ in lines if told == "done"]
    if done:
        st.caption(f"Done: {', '.join(name[0].lower() + name[1:] if name[1].islower() else name for name in done)}.")
    for name, told, cost in lines:
        if told != "done":
            st.markdown(f"**{name}**: {plain(told)}" + (f". It takes {cost}." if cost else "."))
