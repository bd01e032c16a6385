"""What is special to evidence: rankings against labels and against one another, and what redrawing queries does.

Bootstrap intervals have a seed: the same numbers give the same interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from concept_audit.metrics import (
    NAN,
    Estimate,
    auroc,
    auroc_interval,
    average_precision,
    percentile_interval,
    precision_at_k,
    spearman,
)

LABEL_RESAMPLES = 200


def against_labels(
    scores: np.ndarray, labels: np.ndarray, k: int, groups: Sequence[str] | None = None, seed: int = 0
) -> dict[str, Estimate]:
    """AUROC (Newcombe's interval), average precision and precision at k (stratified bootstrap).

    Args:
        scores: [rows]; rows with NaN are left out.
        labels: [rows], 1 positive and 0 negative.
        k: of precision at k.
        groups: a topic for each row; None for no comparison within topics.

    Returns:
        ``auroc``, ``average_precision``, ``precision_at_k``; with groups also ``auroc_within`` and
        ``average_precision_within``: means over the groups that have both labels, weighted by their
        positives. Empty if only one label is there.
    """
    scores, labels = np.asarray(scores, float), np.asarray(labels, int)
    known = np.isfinite(scores)
    scores, labels = scores[known], labels[known]
    n_positive = int(labels.sum())
    n_negative = len(labels) - n_positive
    if not n_positive or not n_negative:
        return {}
    area = auroc(scores, labels)
    k = max(1, min(k, len(labels)))
    everything = [np.arange(len(labels))]
    found = {
        "auroc": Estimate(area, *auroc_interval(area, n_positive, n_negative), n=len(labels)),
        "average_precision": _stratified(average_precision, scores, labels, everything, seed),
        "precision_at_k": _stratified(lambda s, y: precision_at_k(s, y, k), scores, labels, everything, seed),
    }
    if groups is not None:
        names = np.asarray(groups, object)[known]
        parts = [np.flatnonzero(names == name) for name in sorted(set(names), key=str)]
        parts = [part for part in parts if 0 < labels[part].sum() < len(part)]
        if parts:
            found["auroc_within"] = _stratified(auroc, scores, labels, parts, seed)
            found["average_precision_within"] = _stratified(average_precision, scores, labels, parts, seed)
    return found


def _stratified(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    scores: np.ndarray,
    labels: np.ndarray,
    parts: Sequence[np.ndarray],
    seed: int,
) -> Estimate:
    """A statistic's mean over parts, weighted by their positives; in each, rows of each label are redrawn.

    Args:
        parts: places of the rows of each part, both labels among them.
    """
    random = np.random.default_rng(seed)
    strata = [[part[labels[part] == label] for label in (0, 1)] for part in parts]
    weights = [len(positive) for _, positive in strata]

    def value(drawn: Sequence[np.ndarray]) -> float:
        return float(np.average([statistic(scores[rows], labels[rows]) for rows in drawn], weights=weights))

    def redraw() -> list[np.ndarray]:
        return [np.concatenate([random.choice(rows, len(rows)) for rows in pair]) for pair in strata]

    interval = percentile_interval(np.array([value(redraw()) for _ in range(LABEL_RESAMPLES)]))
    return Estimate(value(parts), *interval, sum(map(len, parts)))


def rank_correlations(scores: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Spearman's correlation of all pairs of methods (Kowal et al. 2026, figure 3): [methods, methods].

    Each pair goes by the rows that both score; NaN for fewer than 3 of them or a constant.

    Args:
        scores: method → [rows], NaN where a row has none.
    """
    return pd.DataFrame(dict(scores)).corr(method="spearman", min_periods=3)


@dataclass(frozen=True)
class Stability:
    """How far a ranking depends on which queries were drawn.

    Attributes:
        spearman: mean over draws of the rank correlation with the ranking by all queries, with the 2.5th and
            97.5th percentile of the draws.
        low, high: float64 [rows], 95% percentile interval of each row's percentile (0 to 100).
    """

    spearman: Estimate
    low: np.ndarray
    high: np.ndarray


def stability(redrawn: np.ndarray, scores: np.ndarray) -> Stability:
    """From rankings by redrawn queries.

    Args:
        redrawn: float64 [draws, rows].
        scores: float64 [rows], by all queries.
    """
    known = np.isfinite(scores) & np.isfinite(redrawn).all(0)
    redrawn = redrawn[:, known]
    percentiles = 100 * stats.rankdata(redrawn, "max", axis=1) / max(known.sum(), 1)
    each = spearman(redrawn, scores[known])
    low, high = np.full(len(scores), NAN), np.full(len(scores), NAN)
    low[known], high[known] = np.percentile(percentiles, [2.5, 97.5], axis=0)
    return Stability(Estimate(float(np.mean(each)), *percentile_interval(each), n=len(redrawn)), low, high)


def resampled(per_query: np.ndarray, draws: int = 200, seed: int = 0) -> np.ndarray:
    """Scores by queries drawn with replacement: float64 [draws, rows].

    Args:
        per_query: float64 [rows, queries], the score of each row for each query alone.
    """
    n = per_query.shape[1]
    chosen = np.random.default_rng(seed).integers(0, n, (draws, n))
    weights = np.stack([np.bincount(draw, minlength=n) for draw in chosen]) / n
    return weights @ per_query.T
