"""One report of a validation: Markdown with figures beside it, the same bytes for the same evidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from concept_audit.evidence.figures import Bar, Series, intervals, lines, matrix, number
from concept_audit.files import atomic_write
from concept_audit.metrics import precision_recall
from concept_audit.store.evidence import Evidence

RANDOM = "random"
QUANTITY = {
    "own": "concept in the model's own answers",
    "text": "concept in these answers, as the untrained model reads them",
    "shown": "concept on given answers that show the behaviour",
    "preference": "preference for given answers that show the behaviour over those that do not (nats)",
    "loss": "loss on natural rows (nats)",
    "judge": "judge's score of the own answers (0 to 1)",
}
SIGNIFICANT = 0.05
VERBS = {
    "removal": "removed",
    "swap": "swapped",
    "rewrite": "rewritten",
    "retention": "kept",
    "steer": "strength of steering (standard deviations)",
}
"""Runs that are held against ones at random, and what names them on an axis."""
UNTOUCHED = ("whole", "base")
"""What a run's change is told from: training on all rows, or no training."""


def report(evidence: Evidence) -> tuple[str, dict[str, str]]:
    """The report's Markdown, and its figures by file name."""
    figures: dict[str, str] = {}
    about = evidence.about
    parts = [
        f"# Evidence on “{about['concept']}”",
        f"Audit `{about['audit']}`, model `{about['model_name']}` (`{about['model']}`), evidence "
        f"`{evidence.evidence_id}`.",
        _verdict(evidence),
        "## What was done",
        _method(evidence),
        _heading(evidence),
        "“Against random” is the difference from what the same share of rows drawn at random does, seed by "
        "seed, with Student's interval and paired test; p is not corrected for the number of comparisons. A removal "
        "works if it is negative, and the loss does not rise.",
        _steering(evidence),
        _markdown(_changes(evidence)),
    ]
    for kind in VERBS:
        for quantity in _quantities(evidence, kind):
            drawn = _curves(evidence, kind, quantity)
            if drawn:
                name = f"{kind}-{quantity}.svg"
                figures[name] = drawn
                parts.append(f"![{kind}: {QUANTITY[quantity]}]({{figures}}/{name})")
    lds = evidence.results[evidence.results["measure"] == "lds"]
    if len(lds):
        parts += [
            "## Linear datamodelling score",
            f"Spearman's correlation over {int(lds['n'].max())} random subsets of {about['subset_share']:.0%} of "
            "the rows, between the summed scores of a subset and the concept of the model trained on it "
            "(Park et al. 2023, arXiv 2303.14186), with bootstrap intervals.",
            _markdown(_pivot(lds)),
        ]
        for quantity in _quantities(evidence, "lds"):
            figures[f"lds-{quantity}.svg"] = _bars(lds[lds["quantity"] == quantity], "LDS (Spearman)")
            parts.append(f"![LDS: {QUANTITY[quantity]}]({{figures}}/lds-{quantity}.svg)")
    first = evidence.results[evidence.results["measure"] == "first_order"]
    for line in first.to_dict("records"):
        parts.append(
            f"First-order check: after one small step of gradient descent on each of {line['n']} random subsets, the "
            f"concept's change on the queries has a Pearson correlation of {_interval(line)} with the summed "
            f"{line['method']} (Taylor's theorem asks for 1)."
        )
    labels = evidence.results[evidence.results["quantity"] == "labels"]
    if len(labels):
        parts += [
            "## Against labels",
            f"Rows whose `{about['origin']}` is {', '.join(about['positive'])} count as positive. What a label "
            "says is not what influence estimates: read this beside the runs, not instead of them."
            + _left_out(about.get("n_fitted", 0)),
            _markdown(_pivot(labels, "measure")),
        ]
        figures["precision-recall.svg"] = _precision_recall(evidence.scores)
        parts.append("![Precision and recall]({figures}/precision-recall.svg)")
    agreement = evidence.results[evidence.results["measure"] == "agreement"]
    if len(agreement):
        names = list(dict.fromkeys(agreement["method"]))
        square = agreement.pivot(index="method", columns="other", values="estimate").loc[names, names]
        figures["agreement.svg"] = matrix(names, square.to_numpy(float))
        parts += [
            "## Agreement of the methods",
            "Spearman's correlation over all rows.",
            "![Agreement]({figures}/agreement.svg)",
        ]
    stability = evidence.results[evidence.results["measure"] == "stability"]
    if len(stability):
        parts += [
            "## Stability",
            "Rank correlation of a ranking by redrawn queries (with replacement) with the ranking by all of them, "
            "and of rankings that differ in the seed of the Fisher matrix's samples alone.",
            _markdown(_pivot(stability)),
            _unstable(evidence.scores),
        ]
    return "\n\n".join(part for part in parts if part) + "\n", figures


def _left_out(count: int) -> str:
    return f" Left out: {count:,} labelled rows that the probe was fitted to." if count else ""


def write_report(evidence: Evidence, path: Path) -> None:
    """Write the report to a file, and its figures to a directory beside it.

    Raises:
        StoreError: they cannot be written.
    """
    text, figures = report(evidence)
    directory = path.with_name(f"{path.stem}_figures")
    for name, drawn in figures.items():
        with atomic_write(directory / name) as partial:
            partial.write_text(drawn, "utf-8")
    with atomic_write(path) as partial:
        partial.write_text(text.replace("{figures}", directory.name), "utf-8")


def table(evidence: Evidence) -> str:
    """The main findings as plain text for a terminal."""
    changes = _changes(evidence)
    lds = _pivot(evidence.results[evidence.results["measure"] == "lds"])
    labels = _pivot(evidence.results[evidence.results["quantity"] == "labels"], "measure")
    shown = [frame.to_string(index=False) for frame in (changes, lds, labels) if len(frame)]
    return "\n\n".join([_verdict(evidence).replace("**", ""), *shown])


def _verdict(evidence: Evidence) -> str:
    """The verdict in words, one sentence a method that was removed, each figure with its interval."""
    sentences = []
    versus = evidence.results.query("measure == 'removal' and other == @RANDOM")
    for (method, share), lines_ in versus.groupby(["method", "share"], sort=False):
        by = {line["quantity"]: line for line in lines_.to_dict("records")}
        own, loss = by["own"], by.get("loss")
        way = "lowers" if own["estimate"] < 0 else "raises"
        what = f"the {QUANTITY['own']}"
        if not math.isfinite(own["p"]):
            claim = f"{way} {what} compared with removing as many at random, in too few seeds to test"
        elif own["p"] < SIGNIFICANT:
            claim = f"{way} {what} significantly, compared with removing as many at random"
        else:
            claim = f"does not change {what} significantly, compared with removing as many at random"
        text = f"**Removing the top {share:.0%} by {method} {claim}**: by {_figure(own)}"
        if (preference := by.get("preference")) is not None:
            text += f"; the {QUANTITY['preference']} changes by {_figure(preference)}"
        if loss is not None:
            text += f"; the {QUANTITY['loss']} {_course(loss)}, by {_figure(loss)}"
        sentences.append(text + ".")
    for line in _against_removal(evidence, "swap"):
        sentences.append(
            f"Exchanging the sides of the top {line['share']:.0%} by {line['method']} instead of removing them "
            f"changes the {QUANTITY['own']} by a further {_figure(line)}."
        )
    for line in _against_removal(evidence, "rewrite"):
        sentences.append(
            f"Rewriting the responses of the top {line['share']:.0%} by {line['method']} instead of removing the rows "
            f"changes the {QUANTITY['own']} by a further {_figure(line)}."
        )
    for line in evidence.results.query("measure == 'steer' and other == @RANDOM and quantity == 'own'").to_dict(
        "records"
    ):
        sentences.append(
            f"Training on all rows while {number(line['share'])} standard deviations of the concept are added to the "
            f"residual stream changes the {QUANTITY['own']}, measured without them, by {_figure(line)} compared with a "
            "random direction."
        )
    if sentences:
        sentences.append("No p value here is corrected for the number of comparisons.")
    return "\n\n".join(sentences)


def _against_removal(evidence: Evidence, measure: str) -> list[dict]:
    """What something else than removing the top rows did to the own answers, less what removing them does."""
    found = evidence.results.query("measure == @measure and other == 'removal' and quantity == 'own'")
    return [line for line in found.to_dict("records") if line["method"] != RANDOM]


def _heading(evidence: Evidence) -> str:
    """Names what is done to the top rows."""
    there = set(evidence.results["measure"])
    done = ["Removing", *(["exchanging"] if "swap" in there else []), *(["rewriting"] if "rewrite" in there else [])]
    return f"## {', '.join(done)} and keeping the top rows" + (", and steering" if "steer" in there else "")


def _steering(evidence: Evidence) -> str:
    """What rewriting and steering are, where there are runs of them."""
    about, parts = evidence.about, []
    if "rewritten_by" in about:
        parts.append(
            f"“rewrite”: training on all rows, of which the top ones have responses of {about['rewritten_by']} in place "
            "of theirs."
        )
    if "spread" in about:
        parts.append(
            f"“steer”: training on all rows while α σ v is added to the residual stream at layer {about['layer']} at every "
            f"token, v the unit direction that rows are ranked by, σ = {number(about['spread'])} the standard deviation "
            "of the rows along it, and α the strength; nothing is added when the model is measured. At random, it is a "
            "vector as long at right angles to v (after Chen et al. 2025, arXiv 2507.21509)."
        )
    return " ".join(parts)


def _course(line: dict) -> str:
    """Whether a quantity rises or falls, as far as the test can say."""
    if not math.isfinite(line["p"]):
        return "was not tested"
    if line["p"] >= SIGNIFICANT:
        return "does not change significantly"
    return "rises significantly" if line["estimate"] > 0 else "falls significantly"


def _figure(line: dict) -> str:
    """An estimate with its interval, p value and number of seeds."""
    seeds = f"{line['n']} seed" + ("s" if line["n"] != 1 else "")
    if not math.isfinite(line["low"]):
        return f"{number(line['estimate'])} ({seeds})"
    interval = f"95% interval {number(line['low'])} to {number(line['high'])}"
    p = _p(line["p"])
    return f"{number(line['estimate'])} ({interval}, p {p if p.startswith('<') else f'= {p}'}, {seeds})"


def _method(evidence: Evidence) -> str:
    about, recipe = evidence.about, evidence.about["recipe"]
    count = about.get("draws", 1)
    draws = f"{count} answers drawn with the same chance" if count > 1 else "the likeliest answer"
    left_out, untrained = about.get("n_held_out_left_out", 0), about.get("n_rows_untrained", 0)
    apart = (
        f" {left_out} held-out examples are left out, since their prompts rank or are those of many rows, and no run "
        f"trains on the {untrained} rows with a held-out prompt."
        if left_out or untrained
        else ""
    )
    steps = f", at most {recipe['max_steps']} steps" if recipe["max_steps"] else ""
    trained = f"LoRA weights of rank {recipe['rank']}" if recipe["weights"] == "lora" else "all linear weights"
    by = f" by DPO (β = {about['beta']:g})" if "beta" in about else ""
    return (
        f"{len(evidence.runs)} runs fine-tune {trained}{by} with AdamW (learning rate {recipe['learning_rate']:g}, "
        f"{recipe['epochs']} epochs of {recipe['batch']} rows a step{steps}, rows cut at {recipe['max_tokens']} "
        f"tokens) on {about['n_pool']} of {about['n_rows']} rows, with {about['seeds']} seeds; runs of one seed "
        "see the rows that they share in the same order. Each model is measured at layer "
        f"{about['layer']} on {about['n_prompts']} held-out prompts ({draws} to each) by a probe of held-out examples, on "
        f"{about['n_shown']} given answers, by which answers it would rather give, and by its loss on "
        f"{about['n_natural']} natural rows that no run "
        f"trains on ({about['natural']}, and held-out answers without the behaviour). Rows are ranked by {about['ranked_by']}.{apart}"
    )


def _quantities(evidence: Evidence, measure: str) -> list[str]:
    there = evidence.results[evidence.results["measure"] == measure]["quantity"]
    return [quantity for quantity in QUANTITY if (there == quantity).any()]


def _changes(evidence: Evidence) -> pd.DataFrame:
    """What the runs changed in words, one line for each quantity, method and share or strength."""
    runs = evidence.results[evidence.results["measure"].isin(["whole", *VERBS])]
    same = ["measure", "quantity", "method", "share"]
    against = runs[runs["other"] == RANDOM]
    lines_ = runs[runs["other"].isin(UNTOUCHED)].merge(against, "left", same, suffixes=("", "_against"))
    found = [
        {
            "runs": line["measure"],
            "share": f"{line['share']:g} σ" if line["measure"] == "steer" else f"{line['share']:.0%}",
            "rows by": line["method"] or "–",
            "quantity": line["quantity"],
            "change": _interval(line),
            "against random": _interval(line, "_against"),
            "p": _p(line["p_against"]),
        }
        for line in lines_.to_dict("records")
    ]
    return pd.DataFrame(found)


def _pivot(results: pd.DataFrame, columns: str = "quantity") -> pd.DataFrame:
    """Methods down, quantities or measures across, intervals in the cells."""
    found = []
    for method in dict.fromkeys(results["method"]):
        mine = results[results["method"] == method].to_dict("records")
        found.append({"method": method, **{line[columns]: _interval(line) for line in mine}})
    return pd.DataFrame(found).fillna("–")


def _curves(evidence: Evidence, kind: str, quantity: str) -> str:
    """Bars for one share, curves for several; empty where there is nothing."""
    results = evidence.results
    mine = results[(results["measure"] == kind) & (results["quantity"] == quantity)]
    mine = mine[mine["other"].isin(UNTOUCHED)]
    if not len(mine):
        return ""
    reference = "the untrained model" if kind == "retention" else "the whole set"
    axis = f"{QUANTITY[quantity]}: change from {reference}"
    if mine["share"].nunique() == 1:
        return _bars(mine, axis)
    series, scale = [], 1 if kind == "steer" else 100
    for method in dict.fromkeys(mine["method"]):
        own = mine[mine["method"] == method].sort_values("share")
        series.append(
            Series(
                method,
                (scale * own["share"]).tolist(),
                own["estimate"].tolist(),
                own["low"].tolist(),
                own["high"].tolist(),
                method == RANDOM,
            )
        )
    return lines(series, VERBS[kind] if kind == "steer" else f"rows {VERBS[kind]} (%)", axis)


def _bars(results: pd.DataFrame, axis: str) -> str:
    bars = [
        Bar(line["method"], line["estimate"], line["low"], line["high"], line["method"] == RANDOM)
        for line in results.to_dict("records")
    ]
    return intervals(bars, axis)


def _precision_recall(scores: pd.DataFrame) -> str:
    series = []
    for method in dict.fromkeys(scores["method"]):
        mine = scores[(scores["method"] == method) & scores["label"].notna() & scores["score"].notna()]
        _, precision, recall = precision_recall(mine["score"].to_numpy(float), mine["label"].to_numpy(dtype=int))
        series.append(Series(method, recall.tolist(), precision.tolist(), grey=method == RANDOM))
    return lines(series, "recall", "precision")


def _unstable(scores: pd.DataFrame) -> str:
    sentences = []
    for method in dict.fromkeys(scores["method"]):
        mine = scores[(scores["method"] == method) & scores["percentile_low"].notna()]
        if len(mine):
            width = (mine["percentile_high"] - mine["percentile_low"]).to_numpy(float)
            sentences.append(
                f"{method}: the percentile of half of the rows is known to within {number(float(np.median(width)))} "
                f"points; of the least certain tenth, to {number(float(np.percentile(width, 90)))} or more."
            )
    return "\n\n".join(sentences)


def _interval(line: dict, suffix: str = "") -> str:
    value, low, high = (line[f"{name}{suffix}"] for name in ("estimate", "low", "high"))
    return f"{number(value)} [{number(low)}, {number(high)}]" if math.isfinite(low) else number(value)


def _p(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _markdown(frame: pd.DataFrame) -> str:
    if not len(frame):
        return ""
    columns = list(frame.columns)

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    rows = [line(values) for values in frame.to_numpy().tolist()]
    return "\n".join([line(columns), line(["---"] * len(columns)), *rows])
