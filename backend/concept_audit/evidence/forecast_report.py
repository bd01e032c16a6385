"""A forecast held against training runs, in words and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from concept_audit.evidence.figures import number
from concept_audit.store.evidence import Evidence

KINDS = {"lora": "LoRA", "all": "all weights"}
PREDICTIONS = {
    "forecast": "forecast",
    "mean_activation": "mean activation of the data",
    "data_minus_own_answers": "data less own answers",
    "gradient_step": "one real gradient step as long",
    "another_seed": "training with other seeds",
}
VIEWS = {
    "live": "every feature that fires on the data",
    "firing": "features that fire on the prompts",
    "relative": "every feature, in units of its usual activation",
}
MEASURES = {"spearman": "Spearman", "top_up": "top 20 up", "top_down": "top 20 down", "sign": "same sign"}


def forecast_verdict(evidence: Evidence) -> list[str]:
    """What came out, one sentence a kind of run; empty where there is no feature to tell of."""
    about, sentences = evidence.about, list[str]()
    for kind in about["recipes"]:
        found = {line["measure"]: line for line in _of(evidence, "live", kind, "forecast")}
        if not found:
            continue
        up, down, sign = (found[name] for name in ("top_up", "top_down", "sign"))
        others = {
            line["method"]: line["estimate"] for line in _of(evidence, "live", kind) if line["measure"] == "spearman"
        }
        beside = "; ".join(
            f"{PREDICTIONS[name]} {number(others[name])}"
            for name in PREDICTIONS
            if name != "forecast" and name in others
        )
        seeds = f"{about['seeds']} run" + ("s" if about["seeds"] != 1 else "")
        sentences.append(
            f"{KINDS[kind][0].upper()}{KINDS[kind][1:]} ({seeds} on {about['n_rows']:,} rows): Spearman over {found['spearman']['n']:,} features "
            f"{_interval(found['spearman'])} (beside it: {beside}); of the {up['n']} that were forecast to rise most "
            f"{_count(up)} rose most, of the {down['n']} to fall {_count(down)} fell most; "
            f"{_percent(sign['estimate'])} have the sign that was forecast."
        )
    return sentences


def forecast_table(evidence: Evidence) -> pd.DataFrame:
    """Every prediction of the SAE features beside the forecast: one line a kind of run, view and prediction."""
    lines: list[dict[str, Any]] = []
    for kind in evidence.about["recipes"]:
        for view, view_name in VIEWS.items():
            for method, name in PREDICTIONS.items():
                found = {line["measure"]: line for line in _of(evidence, view, kind, method)}
                if found:
                    shown: dict[str, Any] = {"trained": KINDS[kind], "features": view_name, "prediction": name}
                    shown["n"] = max(line["n"] for line in found.values())
                    shown |= {title: _interval(found[measure]) for measure, title in MEASURES.items()}
                    if method == "another_seed":
                        # Counted over seeds, as the others are over features.
                        shown["n"] = lines[-1]["n"]
                    lines.append(shown)
    return pd.DataFrame(lines)


def probe_table(evidence: Evidence) -> pd.DataFrame:
    """What the probes' projections did: one line a probe and kind of run."""
    changes = evidence.results[evidence.results["measure"] == "change"]
    lines = []
    for (probe, kind), group in changes.groupby(["quantity", "other"], sort=False):
        by = {line["method"]: line for line in _lines(group)}
        lines.append(
            {
                "concept": probe,
                "trained": KINDS[str(kind)],
                "forecast (a row's mean effect)": number(by["forecast"]["estimate"]),
                "changed by training": _interval(by["measured"]),
                "by one real step": _interval(by["gradient_step"]),
            }
        )
    return pd.DataFrame(lines)


def forecast_text(evidence: Evidence) -> str:
    """For a terminal: the sentences, and both tables."""
    tables = [table.to_string(index=False) for table in (forecast_table(evidence), probe_table(evidence)) if len(table)]
    return "\n\n".join([*forecast_verdict(evidence), *tables, *_notes(evidence)])


def forecast_markdown(evidence: Evidence) -> str:
    """The same as a report in Markdown."""
    about = evidence.about
    parts = [
        f"# The forecast of `{about['audit']}` against training",
        f"Model `{about['model_name']}` (`{about['model']}`), evidence `{evidence.evidence_id}`.",
        *forecast_verdict(evidence),
        "## What was done",
        *[f"{KINDS[kind]}: {_recipe(recipe)}." for kind, recipe in about["recipes"].items()],
        f"Every live SAE feature and the stream were read on {about['n_prompts']} prompts before and after each run, as the "
        "forecast reads them; changes are means over the seeds. The gradient step is one step of plain gradient descent on "
        "all rows at once, as long as the run's own way. Training with other seeds: each seed's change against the mean of "
        "the others', which says how much of a run is chance.",
    ]
    for title, table in (("Features", forecast_table(evidence)), ("Probes", probe_table(evidence))):
        if len(table):
            parts += [f"## {title}", _markdown(table)]
    return "\n\n".join([*parts, *_notes(evidence)]) + "\n"


def _notes(evidence: Evidence) -> list[str]:
    notes = [f"Not told: {PREDICTIONS[name]}, since {why}." for name, why in evidence.about["lacking"].items()]
    notes.append(
        "Intervals (95%) are over features, which are no independent draws, on these rows and prompts and with this recipe; "
        "p values are not told."
    )
    return notes


def _recipe(recipe: Mapping[str, Any]) -> str:
    rank = f"rank {recipe['rank']}, " if recipe["weights"] == "lora" else ""
    steps = f", at most {recipe['max_steps']} steps" if recipe["max_steps"] else ""
    return (
        f"{rank}learning rate {recipe['learning_rate']:g}, epochs {recipe['epochs']}{steps}, {recipe['batch']} rows a "
        f"step, each cut at {recipe['max_tokens']} tokens"
    )


def _of(evidence: Evidence, view: str, kind: str, method: str | None = None) -> list[dict[str, Any]]:
    results = evidence.results
    chosen = (results["quantity"] == view) & (results["other"] == kind)
    if method is not None:
        chosen &= results["method"] == method
    return _lines(results[chosen])


def _lines(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in line.items()} for line in table.to_dict("records")]


def _interval(line: Mapping[str, Any]) -> str:
    if not math.isfinite(line["low"]):
        return number(line["estimate"])
    return f"{number(line['estimate'])} [{number(line['low'])}, {number(line['high'])}]"


def _count(line: Mapping[str, Any]) -> str:
    return str(round(line["estimate"] * line["n"])) if math.isfinite(line["estimate"]) else "–"


def _percent(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else "–"


def _markdown(table: pd.DataFrame) -> str:
    cells = [list(map(str, row)) for row in table.itertuples(index=False)]
    rows = [list(map(str, table.columns)), ["---"] * table.shape[1], *cells]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
