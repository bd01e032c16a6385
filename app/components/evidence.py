"""Rankings held against what is known of the rows."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app.components.charts import QUIET, interval_chart
from app.components.methods import NAMES
from app.components.url import select_by_id
from backend import Audit, Concept

MOST_VALUES = 30


def choose_target(audit: Audit) -> tuple[str, str, str]:
    """The rows that a good ranking would put first: kind, name and value of a group."""
    fields = audit.metadata_fields()
    few = fields[(fields.n_values > 1) & (fields.n_values <= MOST_VALUES)]
    targets = {"flagged": ("flagged", "", "")}
    targets |= {f"label {p.name}": ("labelled", p.name, "") for p in audit.probes()}
    # A column that tells the origin has few values, and is the best witness there is.
    for field in few.sort_values("n_values", kind="stable").itertuples():
        targets |= {
            f"{field.field} = {value}": ("metadata", field.field, value) for value in sorted(field.top_values)
        }
    default = next((name for name, (kind, *_) in targets.items() if kind == "metadata"), "flagged")
    words = {"flagged": "Flagged rows"} | {
        n: f"Positive labels of {t[1]}" for n, t in targets.items() if t[0] == "labelled"
    }
    chosen = select_by_id(
        "Rows that should come first", list(targets), lambda n: words.get(n, n), "target", default
    )
    return targets[chosen]


def against_labels(audit: Audit, concept: Concept, target: tuple[str, str, str]) -> None:
    """AUROC, average precision and precision at k of every ranking that has been computed."""
    table = audit.against_group(concept.concept_id, *target)
    if table.empty:
        st.info(
            "No row is in this group, or every row is. Flag rows on the Audit page, or choose another group.",
            icon=":material/flag:",
        )
        st.page_link("app_pages/ranking.py", label="Audit", icon=":material/format_list_numbered:")
        return
    table["name"] = [_name(row) for row in table.itertuples()]
    st.subheader("Against these rows")
    st.caption(
        f"{int(table.n_positive.iloc[0]):,} of {int(table.n_rows.iloc[0]):,} rows. AUROC: how often one of them ranks above "
        "one of the others; 0.5 is chance. A label is not what influence estimates: the model may learn a "
        "behaviour from rows that nobody labelled."
    )
    st.plotly_chart(
        interval_chart(table.rename(columns={"n_positive": "inside"}), "AUROC (95% interval)", "auroc"), config=QUIET,
        key="auroc-chart", alt="AUROC of each ranking with its interval",
    )  # fmt: skip
    st.dataframe(
        table[["name", "auroc", "low", "high", "average_precision", "precision_at_k", "k"]], hide_index=True,
        alt="AUROC, average precision and precision at k of each ranking",
        column_config={
            "name": "Ranking", "auroc": st.column_config.NumberColumn("AUROC", format="%.3f"),
            "low": st.column_config.NumberColumn("from", format="%.3f"), "high": st.column_config.NumberColumn("to", format="%.3f"),
            "average_precision": st.column_config.NumberColumn("Average precision", format="%.3f"),
            "precision_at_k": st.column_config.NumberColumn("Precision at k", format="%.2f"), "k": "k",
        },
    )  # fmt: skip


def agreement(audit: Audit, concept: Concept) -> None:
    """Rank correlations among the rankings that have been computed."""
    names, matrix = audit.agreement_matrix(concept.concept_id)
    if len(names) < 2:
        st.caption("Compute a second method on the Audit page to see how far the methods agree.")
        return
    st.subheader("Agreement of the methods")
    st.caption("Spearman's rank correlation over all rows")
    labels = [_method_name(name) for name in names]
    st.dataframe(
        pd.DataFrame(matrix, index=labels, columns=labels).style.format("{:.2f}"),
        alt="Rank correlations of the methods",
    )


def _name(row) -> str:
    return _method_name((row.method, row.parameters))


def _method_name(named: tuple[str, str]) -> str:
    method, parameters = named
    more = [word for word in ("index", "identity", "kfac") if f'"{word}"' in parameters]
    return NAMES[method] + (f" ({', '.join(more)})" if more else "")
