"""Rankings and groups of rows: the influence of each group, and how well rankings put one first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from concept_audit.metrics import (
    NORMAL_95,
    area_under,
    auroc,
    auroc_interval,
    mean_interval,
    precision_at_k,
    precision_recall,
)
from concept_audit.store import compare
from concept_audit.store import groups as store_groups
from concept_audit.store.cursor import Cursor

LARGE = 2_000
"""From this many rows on, the bootstrap distribution of a mean is normal to all digits that are shown."""
CURVE_POINTS = 200
"""Of a precision-recall curve; more would not be seen."""


def group_table(cursor: Cursor, ranking: int, by: str, beside: int | None = None) -> pd.DataFrame:
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
    for group in groups.to_dict("records"):
        if group["n_rows"] < LARGE:
            intervals.append(mean_interval(np.asarray(group["scores"], np.float64)))
        else:
            half = NORMAL_95 * group["deviation"] / group["n_rows"] ** 0.5
            intervals.append((group["mean"] - half, group["mean"] + half))
    table = groups.drop(columns=["deviation", "scores"])
    table["low"] = [low for low, _ in intervals]
    table["high"] = [high for _, high in intervals]
    return table


def against_group(cursor: Cursor, concept_id: str, group: str, parameters: list[Any], k: int) -> pd.DataFrame:
    """How well the stored rankings of a concept put a group of rows first.

    Rows that were labelled to train the concept's probe are left out, since its direction was fitted to them.

    Returns:
        method, parameters, n_rows, n_positive, n_left_out (labelled rows), auroc, low, high (its 95% interval), average_precision,
        precision_at_k, k, recall and precision (float64 [points] each, where the group's rows score, the first and
        the last among them), by AUROC, highest first; empty if the group has no row or every row.
    """
    fitted = compare.labelled_rows(cursor, concept_id)
    found = []
    for method, options, scores, inside in compare.in_group(cursor, concept_id, group, parameters):
        labels = inside.astype(int)
        positive = int(labels.sum())
        if not 0 < positive < len(labels):
            continue
        area = auroc(scores, labels)
        low, high = auroc_interval(area, positive, len(labels) - positive)
        _, precision, recall = precision_recall(scores, labels)
        # Where no row of the group is met recall stays and precision only falls: not worth a point.
        rises = np.flatnonzero(np.diff(recall, prepend=0.0))
        shown = rises[np.unique(np.linspace(0, len(rises) - 1, min(len(rises), CURVE_POINTS)).round().astype(int))]
        depth = min(k, len(labels))
        found.append(
            {
                "method": method,
                "parameters": options,
                "n_rows": len(labels),
                "n_positive": positive,
                "n_left_out": fitted,
                "auroc": area,
                "low": low,
                "high": high,
                "average_precision": area_under(precision, recall),
                "precision_at_k": precision_at_k(scores, labels, depth),
                "k": depth,
                "recall": recall[shown],
                "precision": precision[shown],
            }
        )
    table = pd.DataFrame(found)
    return table if table.empty else table.sort_values("auroc", ascending=False, ignore_index=True)
