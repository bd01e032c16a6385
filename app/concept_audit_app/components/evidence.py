"""Rankings held against what is known of the rows."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from concept_audit import Audit, Concept, Evidence
from concept_audit_app.components.charts import QUIET, curves_chart, interval_chart, matrix_chart, recalls_chart, short
from concept_audit_app.components.methods import NAMES
from concept_audit_app.components.plain import counted
from concept_audit_app.components.ranking_names import ranking_names
from concept_audit_app.components.tables import NOTHING, records
from concept_audit_app.components.url import select_by_id
from concept_audit_app.components.validating import validation_desk

MOST_VALUES = 30
QUANTITIES = {
    "own": "the model's own answers",
    "text": "their text alone",
    "shown": "given answers",
    "preference": "preference for given answers",
    "judge": "the judge",
    "loss": "loss on natural rows",
}

TITLES = {
    "removal": "Without the top rows, less what a removal at random does",
    "swap": "With the sides of the top pairs exchanged, less what as many at random do",
    "rewrite": "With other responses in the top rows, less what as many at random do",
    "retention": "On the top rows alone, less what as many at random do",
    "steer": "On all rows, with the concept added in training alone, less what a random direction does",
}
"""Runs that are held against a control at random, and what that tells."""
MOST_BESIDE = 3
MARGIN, CELL = 190, 120
"""Pixels of the chart of agreement: beside its columns, and of one of them."""


def choose_target(audit: Audit, known: Evidence | None) -> tuple[str, str, str]:
    """The rows that a good ranking would put first: kind, name and value of a group.

    Args:
        known: a validation of the concept, which may have been told where the behaviour comes from.
    """
    fields = audit.rows.metadata_fields()
    few = fields[(fields.n_values > 1) & (fields.n_values <= MOST_VALUES)]
    targets = {"flagged": ("flagged", "", "")}
    targets |= {f"label {p.name}": ("labelled", p.name, "") for p in audit.probes.list()}
    # A column that tells the origin has few values, and is the best witness there is.
    for field in records(few.sort_values("n_values", kind="stable")):
        targets |= {
            f"{field['field']} = {value}": ("metadata", field["field"], value) for value in sorted(field["top_values"])
        }
    default = next((name for name, (kind, *_) in targets.items() if kind == "metadata"), "flagged")
    if known is not None and known.about["positive"]:
        stated = f"{known.about['origin']} = {known.about['positive'][0]}"
        default = stated if stated in targets else default
    words = {"flagged": "Flagged rows"} | {
        n: f"Positive labels of {t[1]}" for n, t in targets.items() if t[0] == "labelled"
    }
    chosen = select_by_id(
        "Rows that should come first", list(targets), lambda n: words.get(n, n), "target", default, width=420
    )
    return targets[chosen]


def against_labels(audit: Audit, concept: Concept, target: tuple[str, str, str]) -> None:
    """AUROC, average precision and precision at k of every ranking that has been computed."""
    table = audit.comparisons.against_group(concept.concept_id, *target)
    fitted = audit.comparisons.labelled_rows(concept.concept_id)
    verbs = ("was", "is") if fitted == 1 else ("were", "are")
    left_out = ""
    if fitted:
        left_out = f"{counted(fitted, 'row')} {verbs[0]} labelled to train this probe, and {verbs[1]} left out. "
    if table.empty:
        st.info(
            f"{left_out}No row is in this group, or every row is. Flag rows on the Audit page, or choose another group.",
            icon=":material/flag:",
        )
        st.page_link("app_pages/ranking.py", label="Audit", icon=":material/format_list_numbered:")
        return
    table["name"] = ranking_names(list(zip(table["method"], table["parameters"], strict=True)))
    st.subheader("Against these rows")
    st.caption(
        f"{int(table.n_positive.iloc[0]):,} of {counted(int(table.n_rows.iloc[0]), 'row')}. {left_out}AUROC: how often one of them ranks above "
        "one of the others; 0.5 is chance. A label is not what influence estimates: the model may learn a "
        "behaviour from rows that nobody labelled."
    )
    left, right = st.columns(2, gap="large")
    left.plotly_chart(
        interval_chart(table.rename(columns={"n_positive": "inside"}), "AUROC (95% interval)", "auroc"),
        config=QUIET,
        key="auroc-chart",
        alt="AUROC of each ranking with its interval; the table below has the numbers",
    )
    right.plotly_chart(
        recalls_chart(table, table.n_positive.iloc[0] / table.n_rows.iloc[0]),
        config=QUIET,
        key="recalls-chart",
        alt="Precision against recall of each ranking; the table below has the average precision",
    )
    st.dataframe(
        table[["name", "auroc", "low", "high", "average_precision", "precision_at_k", "k"]],
        hide_index=True,
        placeholder=NOTHING,
        alt="AUROC, average precision and precision at k of each ranking",
        column_config={
            "name": "Ranking",
            "auroc": st.column_config.NumberColumn("AUROC", format="%.3f"),
            "low": st.column_config.NumberColumn("from", format="%.3f"),
            "high": st.column_config.NumberColumn("to", format="%.3f"),
            "average_precision": st.column_config.NumberColumn("Average precision", format="%.3f"),
            "precision_at_k": st.column_config.NumberColumn("Precision at k", format="%.2f"),
            "k": "k",
        },
    )


def agreement(audit: Audit, concept: Concept) -> None:
    """Rank correlations among the rankings that have been computed."""
    names, matrix = audit.comparisons.correlations(concept.concept_id)
    if len(names) < 2:
        st.caption("Compute a second method on the Audit page to see how far the methods agree.")
        return
    st.subheader("Agreement of the methods")
    st.caption("Spearman's rank correlation over all rows")
    labels = ranking_names(names)
    pairs = "; ".join(f"{labels[i]} and {labels[j]} {matrix[i, j]:.2f}" for i in range(len(names)) for j in range(i))
    st.plotly_chart(
        matrix_chart(labels, matrix),
        config=QUIET,
        key="agreement-chart",
        width=MARGIN + CELL * len(names),
        alt=f"Rank correlations of the methods: {pairs}",
    )


def choose_validation(audit: Audit, concept: Concept) -> Evidence | None:
    """The validation of this concept to show, if there is one; below it, or instead, what can be done about one."""
    kept = audit.evidence.list()
    mine = kept[kept["concept_id"] == concept.concept_id]
    st.subheader("Does removing what is flagged change the model?")
    validation_desk(audit, concept, again=not mine.empty)
    if mine.empty:
        return None
    names = {row["evidence_id"]: _name(row) for row in records(mine)}
    with st.container(horizontal=True, vertical_alignment="bottom"):
        chosen = select_by_id("Validation", list(names), names.__getitem__, "evidence", width=480)
        evidence = audit.evidence.get(chosen)
        _download(audit, evidence)
    return evidence


def _name(row: Mapping[str, Any]) -> str:
    """A validation by what it trained on."""
    trained = f"{counted(row['rows'], 'row')}, {counted(row['seeds'], 'seed')}"
    earlier = "" if row["current"] else " (earlier)"
    return f"Validation {row['number']}: {trained}, version {row['version']} of the concept{earlier}"


def validation(evidence: Evidence) -> None:
    """What training did without the flagged rows, on them alone, with others in their place, and with the concept added."""
    quantities = [q for q in QUANTITIES if (evidence.results["quantity"] == q).any()]
    quantity = st.segmented_control(
        "Measured by",
        quantities,
        format_func=QUANTITIES.__getitem__,
        default=quantities[0],
        required=True,
        key="quantity",
        bind="query-params",
    )
    results = evidence.results[evidence.results["quantity"] == quantity]
    _against_random(results[results["measure"].isin(list(TITLES)) & (results["other"] == "random")])
    lds = results[results["measure"] == "lds"]
    if len(lds):
        st.caption(
            "Linear datamodelling score: rank correlation of summed scores with what training on random subsets did"
        )
        shown = lds.assign(name=lds["method"].map(_told), inside=lds["n"]).sort_values("estimate", ascending=False)
        st.plotly_chart(
            interval_chart(shown, "LDS (95% interval)", "estimate"),
            key="lds-chart",
            config=QUIET,
            alt="LDS of each method",
        )


def _against_random(paired: pd.DataFrame) -> None:
    """What each kind of runs did, less what its control did: charts side by side, and a table."""
    sides = [measure for measure in TITLES if (paired["measure"] == measure).any()]
    rows = [sides[start : start + MOST_BESIDE] for start in range(0, len(sides), MOST_BESIDE)]
    for beside in rows:
        for place, measure in zip(
            st.columns(len(beside), gap="large", vertical_alignment="bottom"), beside, strict=True
        ):
            with place:
                _kind_chart(measure, paired[paired["measure"] == measure])
    if paired.empty:
        return
    st.caption(
        "Paired by seed: below 0 is what a removal, an exchange, another response or steering should do, and above 0 what "
        "the top rows alone should. An interval that includes 0 shows neither; p is not corrected for the number of "
        "comparisons."
        + (f" {NOTHING} stands where a single seed gives no interval." if (paired["n"] < 2).any() else "")
    )
    extent = [
        f"{line['share']:g} σ" if line["measure"] == "steer" else f"{line['share']:.0%}" for line in records(paired)
    ]
    st.dataframe(
        paired.assign(method=paired["method"].map(_told), share=extent)[
            ["measure", "method", "share", "estimate", "low", "high", "p", "n"]
        ],
        hide_index=True,
        placeholder=NOTHING,
        alt="Removal, exchange, rewriting, retention and steering against random",
        column_config={
            "measure": "Runs",
            "method": "Method",
            "share": st.column_config.TextColumn(
                "Share", help="Of the rows; of steering its strength, in standard deviations of the concept"
            ),
            **{
                name: st.column_config.NumberColumn(label, format="%.3f")
                for name, label in (("estimate", "Difference"), ("low", "from"), ("high", "to"), ("p", "p"))
            },
            "n": "Seeds",
        },
    )


def _kind_chart(measure: str, found: pd.DataFrame) -> None:
    title, steers = TITLES[measure], measure == "steer"
    if found["share"].nunique() > 1:
        words = ("strength (standard deviations)", "g") if steers else ("share of the rows", ".0%")
        figure = curves_chart(found, _told, *words)
    else:
        bars = found.assign(name=found["method"].map(_told), inside=found["n"])
        share = found["share"].iloc[0]
        extent = f"strength {share:g} σ" if steers else f"{share:.0%} of the rows"
        told = "95% interval" if found["low"].notna().any() else "one seed"
        figure = interval_chart(bars, f"difference ({told}), {extent}", "estimate")
        figure.update_xaxes(rangemode="tozero")  # 0, no difference, has to be in sight
    st.caption(title)
    st.plotly_chart(figure, key=f"{measure}-chart", config=QUIET, alt=f"{title}; the table below has the numbers")


def _download(audit: Audit, evidence: Evidence) -> None:
    def zipped() -> bytes:
        text, figures = audit.evidence_report(evidence.evidence_id)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("report.md", text.replace("{figures}", "figures"))
            for name, svg in figures.items():
                file.writestr(f"figures/{name}", svg)
        return out.getvalue()

    st.download_button(
        "Report",
        zipped,
        file_name=f"{audit.name}-evidence.zip",
        mime="application/zip",
        icon=":material/description:",
        on_click="ignore",
        help="Markdown with figures, to attach to a decision",
    )


def _told(name: str) -> str:
    """A candidate of a validation for people: a method, with options of its own after colons."""
    method, *options = name.split(":")
    return short(
        {"random": "Random", "concept": "The concept"}.get(method, NAMES.get(method, method))
        + (f" ({', '.join(options)})" if options else "")
    )
