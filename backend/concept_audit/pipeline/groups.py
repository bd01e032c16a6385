"""Influence by group of rows, with bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd

from concept_audit.concepts.auroc import auroc, auroc_interval
from concept_audit.store import compare
from concept_audit.store import groups as store_groups

RESAMPLES = 1000
LARGE = 2_000
"""From this many rows on, the bootstrap distribution of a mean is normal to all digits that are shown."""
NORMAL_95 = 1.959964
CURVE_POINTS = 200
"""Of a precision-recall curve; more would not be seen."""


def group_table(cursor, ranking: int, by: str, beside: int | None = None) -> pd.DataFrame:
    """Mean scores of groups; see `Audit.groups`."""
    table = _means(store_groups.summaries(cursor, ranking, by, LARGE))
    mean, deviation = store_groups.moments(cursor, ranking)
    table["difference"] = (table["mean"] - mean) / deviation if deviation else 0.0
    if beside is not None:
        other = _means(store_groups.summaries(cursor, beside, by, LARGE))[["group", "mean", "low", "high"]]
        table = table.merge(other.rename(columns=lambda c: c if c == "group" else f"beside_{c}"), "left", "group")
    return table.sort_values(["mean", "group"], ascending=[False, True], ignore_index=True)


def _means(groups: pd.DataFrame) -> pd.DataFrame:
    """The summaries with intervals instead of scores."""
    intervals = []
    for group in groups.itertuples():
        if group.n_rows < LARGE:
            intervals.append(mean_interval(np.asarray(group.scores, np.float64)))
        else:
            half = NORMAL_95 * group.deviation / group.n_rows**0.5
            intervals.append((group.mean - half, group.mean + half))
    table = groups.drop(columns=["deviation", "scores"])
    table["low"] = [low for low, _ in intervals]
    table["high"] = [high for _, high in intervals]
    return table


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap interval of a mean (Efron 1979); NaN for fewer than two values.

    Args:
        values: [n].
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)


def against_group(cursor, concept_id: str, group: str, parameters: list, k: int) -> pd.DataFrame:
    """How well the stored rankings of a concept put a group of rows first.

    Returns:
        method, parameters, n_rows, n_positive, auroc, low, high (its 95% interval), average_precision,
        precision_at_k, k, recall and precision (float64 [points] each, after some of the group's rows, the first
        and the last among them), by AUROC, highest first; empty if the group has no row or every row.
    """
    scored = compare.in_group(cursor, concept_id, group, parameters)
    found = []
    for (_, method, told), ranked in scored.groupby(["ranking_id", "method", "parameters"], sort=False):
        labels = ranked["inside"].to_numpy().astype(int)
        positive = int(labels.sum())
        if not 0 < positive < len(labels):
            continue
        area = auroc(ranked["score"].to_numpy(), labels)
        low, high = auroc_interval(area, positive, len(labels) - positive)
        precision = np.cumsum(labels) / np.arange(1, len(labels) + 1)
        depth = min(k, len(labels))
        # Precision is worth telling after each row of the group: between them it only falls.
        hits = np.flatnonzero(labels)
        shown = np.unique(np.linspace(0, positive - 1, min(positive, CURVE_POINTS)).round().astype(int))
        found.append(
            {
                "method": method,
                "parameters": told,
                "n_rows": len(labels),
                "n_positive": positive,
                "auroc": area,
                "low": low,
                "high": high,
                "average_precision": float(precision[labels == 1].mean()),
                "precision_at_k": float(precision[depth - 1]),
                "k": depth,
                "recall": (shown + 1) / positive,
                "precision": precision[hits[shown]],
            }
        )
    table = pd.DataFrame(found)
    return table if table.empty else table.sort_values("auroc", ascending=False, ignore_index=True)
