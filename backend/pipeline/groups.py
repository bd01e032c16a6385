"""Influence by group of rows, with bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd

from backend.store import groups as store_groups

RESAMPLES = 1000
LARGE = 2_000
"""From this many rows on, the bootstrap distribution of a mean is normal to all digits that are shown."""
NORMAL_95 = 1.959964


def group_table(cursor, ranking: int, by: str, beside: int | None = None) -> pd.DataFrame:
    """Mean scores of groups; see `Audit.groups`."""
    table = _means(store_groups.summaries(cursor, ranking, by, LARGE))
    mean, deviation = store_groups.moments(cursor, ranking)
    table["difference"] = (table["mean"] - mean) / deviation if deviation else 0.0
    if beside is not None:
        other = _means(store_groups.summaries(cursor, beside, by, LARGE))[["group", "mean", "low", "high"]]
        table = table.merge(
            other.rename(columns=lambda c: c if c == "group" else f"beside_{c}"), "left", "group"
        )
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
