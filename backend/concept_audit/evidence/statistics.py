"""What the runs say, with intervals: correlations, paired differences, and agreement with labels.

Bootstrap intervals are percentile intervals (Efron and Tibshirani 1993, chapter 13), with a
seed: the same numbers give the same interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from concept_audit.concepts.auroc import auroc, auroc_interval

SAMPLES = 1000
CONFIDENCE = 0.95
NAN = float("nan")


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval.

    Attributes:
        value, low, high: NaN where they cannot be told.
        n: how many observations it rests on.
        p: two-sided, of the hypothesis that the value is 0; NaN where none was tested.
    """

    value: float
    low: float = NAN
    high: float = NAN
    n: int = 0
    p: float = NAN


def correlation(x: np.ndarray, y: np.ndarray, kind: str = "spearman", seed: int = 0) -> Estimate:
    """Spearman's or Pearson's correlation with a bootstrap interval over the pairs.

    Args:
        x, y: [n]; pairs with a NaN are left out.
        kind: ``spearman`` or ``pearson``.

    Returns:
        NaN for fewer than 3 pairs or a constant.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) < 3:
        return Estimate(NAN, n=len(x))

    def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a = a - a.mean(-1, keepdims=True)
        b = b - b.mean(-1, keepdims=True)
        scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
        return np.divide((a * b).sum(-1), scale, out=np.full(scale.shape, NAN), where=scale > 0)

    def found(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if kind == "spearman":
            a, b = stats.rankdata(a, axis=-1), stats.rankdata(b, axis=-1)
        return pearson(a, b)

    value = float(found(x[None], y[None])[0])
    draws = np.random.default_rng(seed).integers(0, len(x), (SAMPLES, len(x)))
    low, high = _percentiles(found(x[draws], y[draws]))
    return Estimate(value, low, high, len(x))


def paired(differences: np.ndarray) -> Estimate:
    """The mean of paired differences, with Student's interval and test over the pairs.

    Args:
        differences: [pairs], one a seed.

    Returns:
        interval and p are NaN for fewer than 2 pairs; p is 0 if all differ by the same, and not by 0.
    """
    d = np.asarray(differences, float)
    d = d[np.isfinite(d)]
    if not len(d):
        return Estimate(NAN)
    mean = float(d.mean())
    if len(d) < 2:
        return Estimate(mean, n=len(d))
    error = float(d.std(ddof=1) / np.sqrt(len(d)))
    if error == 0:
        return Estimate(mean, mean, mean, len(d), 1.0 if mean == 0 else 0.0)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(d) - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, len(d) - 1))
    return Estimate(mean, mean - reach, mean + reach, len(d), p)


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Σ_k (recall_k − recall_{k−1}) precision_k over the distinct scores, highest first.

    Args:
        scores: [n].
        labels: [n], 1 positive and 0 negative; at least one positive.
    """
    recall, precision = precision_recall(scores, labels)
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def precision_recall(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision at each distinct score, highest first: [distinct scores] each."""
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(labels[order])
    last = np.flatnonzero(np.append(np.diff(ranked) != 0, True))
    return hits[last] / hits[-1], hits[last] / (last + 1)


def precision_at(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of positives among the k rows with the highest scores; ties go by their order."""
    return float(labels[np.argsort(-scores, kind="stable")[:k]].mean())


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
    found = {
        "auroc": Estimate(area, *auroc_interval(area, n_positive, n_negative), n=len(labels)),
        "average_precision": _bootstrapped(average_precision, scores, labels, None, seed),
        "precision_at_k": _bootstrapped(lambda s, y: precision_at(s, y, k), scores, labels, None, seed),
    }
    if groups is not None:
        names = np.asarray(groups, object)[known]
        for name, statistic in (("auroc", auroc), ("average_precision", average_precision)):
            inside = _bootstrapped(statistic, scores, labels, names, seed)
            if inside.n:
                found[f"{name}_within"] = inside
    return found


def agreement(scores: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Spearman's correlation of all pairs of methods (Kowal et al. 2026, figure 3): [methods, methods]."""
    names = list(scores)
    matrix = np.full((len(names), len(names)), NAN)
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            known = np.isfinite(scores[one]) & np.isfinite(scores[other])
            if known.sum() > 2:
                a, b = stats.rankdata(scores[one][known]), stats.rankdata(scores[other][known])
                if a.std() and b.std():
                    matrix[i, j] = np.corrcoef(a, b)[0, 1]
    return pd.DataFrame(matrix, names, names)


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
    percentiles = np.full(redrawn.shape, NAN)
    percentiles[:, known] = 100 * stats.rankdata(redrawn[:, known], "max", axis=1) / max(known.sum(), 1)
    own = stats.rankdata(scores[known])
    each = np.array([np.corrcoef(stats.rankdata(draw[known]), own)[0, 1] for draw in redrawn])
    low, high = np.full(len(scores), NAN), np.full(len(scores), NAN)
    low[known], high[known] = np.percentile(percentiles[:, known], [2.5, 97.5], axis=0)
    return Stability(Estimate(float(np.mean(each)), *_percentiles(each), n=len(redrawn)), low, high)


def resampled(per_query: np.ndarray, draws: int = 200, seed: int = 0) -> np.ndarray:
    """Scores by queries drawn with replacement: float64 [draws, rows].

    Args:
        per_query: float64 [rows, queries], the score of each row for each query alone.
    """
    n = per_query.shape[1]
    chosen = np.random.default_rng(seed).integers(0, n, (draws, n))
    weights = np.stack([np.bincount(draw, minlength=n) for draw in chosen]) / n
    return weights @ per_query.T


def _bootstrapped(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    scores: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None,
    seed: int,
) -> Estimate:
    """A statistic with an interval from drawing rows of each label (and group) with replacement."""
    random = np.random.default_rng(seed)
    parts = [np.arange(len(labels))]
    if groups is not None:
        parts = [np.flatnonzero(groups == name) for name in sorted(set(groups), key=str)]
    parts = [part for part in parts if 0 < labels[part].sum() < len(part)]
    if not parts:
        return Estimate(NAN)
    weights = [labels[part].sum() for part in parts]

    def value(drawn: Sequence[np.ndarray]) -> float:
        return float(np.average([statistic(scores[rows], labels[rows]) for rows in drawn], weights=weights))

    def redraw(part: np.ndarray) -> np.ndarray:
        strata = [part[labels[part] == label] for label in (0, 1)]
        return np.concatenate([random.choice(rows, len(rows)) for rows in strata])

    low, high = _percentiles(np.array([value([redraw(part) for part in parts]) for _ in range(SAMPLES // 5)]))
    return Estimate(value(parts), low, high, int(sum(map(len, parts))))


def _percentiles(samples: np.ndarray) -> tuple[float, float]:
    known = samples[np.isfinite(samples)]
    if not len(known):
        return NAN, NAN
    low, high = np.percentile(known, [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2])
    return float(low), float(high)
