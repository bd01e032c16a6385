"""How well scores separate two classes, how two rankings correlate, and how sure either number is.

Scores are [n], higher first. Labels are [n], 1 positive and 0 negative. Rows with equal scores are
tied: a curve counts them together, as scikit-learn does, since a threshold cannot part them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import atanh, sqrt, tanh

import numpy as np
from scipy import stats
from scipy.optimize import brentq

NORMAL_95 = 1.959964
"""The standard normal's 97.5th percentile: a 95% interval reaches so many standard errors to either side."""
RESAMPLES = 1000
NAN = float("nan")
_ROOT_MARGIN = 1e-9


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval.

    Attributes:
        value, low, high: NaN where undefined.
        n: how many observations it rests on.
        p: two-sided, of the hypothesis that the value is 0; NaN where none was tested.
    """

    value: float
    low: float = NAN
    high: float = NAN
    n: int = 0
    p: float = NAN


# How well scores separate two classes


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The probability that a positive scores above a negative; ties count half (Mann and Whitney 1947).

    From the ranks' sum; scikit-learn's `roc_auc_score` is the same number, 20 times slower on few rows.

    Args:
        labels: with at least one of each class.
    """
    positive = labels == 1
    n_positive = int(positive.sum())
    wins = stats.rankdata(scores)[positive].sum() - n_positive * (n_positive + 1) / 2
    return float(wins / (n_positive * (len(labels) - n_positive)))


def auroc_interval(area: float, n_positive: int, n_negative: int) -> tuple[float, float]:
    """95% score interval for an AUROC: Newcombe 2006 (Statistics in Medicine 25:559), method 5.

    Its bounds A solve |A − area| = 1.96 √(A(1 − A) [1 + m((1 − A)/(2 − A) + A/(1 + A))] / (n₊n₋)), with
    m = (n₊ + n₋)/2 − 1. It stays within [0, 1] and does not shrink to a point at an area of 1, where the
    usual standard error is zero.
    """
    m = (n_positive + n_negative) / 2 - 1

    def reach(a: float) -> float:
        variance = a * (1 - a) * (1 + m * ((1 - a) / (2 - a) + a / (1 + a))) / (n_positive * n_negative)
        return NORMAL_95 * sqrt(max(variance, 0.0))

    # At an area of 0 or 1 the area itself is a root too, not the one that is meant.
    low = brentq(lambda a: a + reach(a) - area, 0.0, area - _ROOT_MARGIN) if area > _ROOT_MARGIN else 0.0
    high = brentq(lambda a: a - reach(a) - area, area + _ROOT_MARGIN, 1.0) if area < 1 - _ROOT_MARGIN else 1.0
    return float(low), float(high)


def precision_recall(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thresholds, with the precision and recall of the rows that score at least as much.

    Args:
        labels: with at least one positive.

    Returns:
        float64 [distinct scores] each, from the highest threshold down to where every row is taken.
    """
    order = np.argsort(-scores, kind="stable")
    falling, hits = scores[order], np.cumsum(labels[order])
    last: np.ndarray = np.append(np.flatnonzero(np.diff(falling)), len(falling) - 1)
    return falling[last], hits[last] / (last + 1), hits[last] / hits[-1]


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Σ_k (recall_k − recall_{k−1}) precision_k over the points of `precision_recall`.

    Args:
        labels: with at least one positive.
    """
    _, precision, recall = precision_recall(scores, labels)
    return area_under(precision, recall)


def area_under(precision: np.ndarray, recall: np.ndarray) -> float:
    """`average_precision` of a curve that is known: both float64 [points], recall rising."""
    return float(np.diff(recall, prepend=0.0) @ precision)


def precision_at_k(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of positives among the k rows with the highest scores; the earlier of tied rows come first."""
    return float(labels[np.argsort(-scores, kind="stable")[:k]].mean())


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95% score interval of a share (Wilson 1927): (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n).

    Returns:
        NaN for no observation.
    """
    if not n:
        return NAN, NAN
    p, z2 = successes / n, NORMAL_95**2
    middle, reach = p + z2 / (2 * n), NORMAL_95 * sqrt(p * (1 - p) / n + z2 / (4 * n**2))
    return max((middle - reach) / (1 + z2 / n), 0.0), min((middle + reach) / (1 + z2 / n), 1.0)


def balanced_accuracy(said: np.ndarray, truth: np.ndarray) -> Estimate:
    """The mean of the true positive and the true negative rate, (TPR + TNR)/2; a judge who guesses has 1/2.

    Its 95% interval is put together from the Wilson intervals [l, u] of the two rates (Newcombe 1998, method 10;
    Zou and Donner 2008): the lower bound is the value less ½ √((TPR − l₁)² + (TNR − l₂)²), the upper one likewise.

    Args:
        said, truth: bool [n].

    Returns:
        NaN where one of the classes is empty; n counts both.
    """
    said, truth = np.asarray(said, bool), np.asarray(truth, bool)
    counts = [(int((said & truth).sum()), int(truth.sum())), (int((~said & ~truth).sum()), int((~truth).sum()))]
    if not all(n for _, n in counts):
        return Estimate(NAN, n=len(truth))
    rates = [hits / n for hits, n in counts]
    bounds = [wilson_interval(hits, n) for hits, n in counts]
    value = sum(rates) / 2
    below, above = (
        sqrt(sum((rate - bound[side]) ** 2 for rate, bound in zip(rates, bounds, strict=True))) / 2 for side in (0, 1)
    )
    return Estimate(value, max(value - below, 0.0), min(value + above, 1.0), len(truth))


# Correlations and means, with their intervals


def ranks_and_percentiles(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows by score, the largest first; ties keep their order.

    Args:
        scores: float64 [n]; NaN where a row has none.

    Returns:
        the m rows that have one, int64 [m], rank 1 first; and of each, float64 [m], 100 times the share of
        these m scores that are at most its own (the empirical distribution function).
    """
    order = np.argsort(-scores, kind="stable")
    order = order[~np.isnan(scores[order])]
    falling = scores[order]
    below = len(falling) - np.searchsorted(-falling, -falling, side="left")
    return order.astype(np.int64), 100 * (below / max(len(falling), 1))


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
    drawn = _resampled(len(x), seed)
    found = spearman if kind == "spearman" else pearson
    return Estimate(float(found(x, y)), *percentile_interval(found(x[drawn], y[drawn])), len(x))


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation over the last axis: float64 [...] from [..., n] that broadcast; NaN for a constant."""
    x, y = (v - v.mean(-1, keepdims=True) for v in (x, y))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of the ranks (Spearman 1904), as `pearson`; tied values share their mean rank."""
    return pearson(stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1))


def spearman_interval(value: float, n: int) -> tuple[float, float]:
    """95% interval of a rank correlation of n pairs: Fisher's z with the variance of Bonett and Wright (2000).

    Returns:
        NaN for fewer than 4 pairs.
    """
    if n < 4 or not abs(value) <= 1:
        return NAN, NAN
    z = atanh(np.clip(value, -1 + 1e-12, 1 - 1e-12))
    reach = NORMAL_95 * sqrt((1 + value**2 / 2) / (n - 3))
    return tanh(z - reach), tanh(z + reach)


def paired(differences: np.ndarray) -> Estimate:
    """The mean of paired differences, with Student's interval and test over the pairs.

    Args:
        differences: [pairs], one a seed; NaN are left out.

    Returns:
        interval and p are NaN for fewer than 2 pairs; p is 0 if all differ by the same, and not by 0.
    """
    d = np.asarray(differences, float)
    d = d[np.isfinite(d)]
    mean = float(d.mean()) if len(d) else NAN
    if len(d) < 2:
        return Estimate(mean, n=len(d))
    if not d.std():
        return Estimate(mean, mean, mean, len(d), float(mean == 0))
    test = stats.ttest_1samp(d, 0.0)
    interval = test.confidence_interval()
    return Estimate(mean, float(interval.low), float(interval.high), len(d), float(test.pvalue))


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of a mean.

    Args:
        values: [n].

    Returns:
        NaN for fewer than 2 values.
    """
    return percentile_interval(values[_resampled(len(values), seed)].mean(-1)) if len(values) > 1 else (NAN, NAN)


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """The middle 95% of bootstrap samples (Efron and Tibshirani 1993, chapter 13); undefined ones are left out.

    Args:
        samples: [resamples].

    Returns:
        NaN if none is left.
    """
    known = samples[np.isfinite(samples)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (NAN, NAN)
    return float(low), float(high)


def _resampled(n: int, seed: int) -> np.ndarray:
    """Places drawn with replacement, the same for a seed: int64 [RESAMPLES, n]."""
    return np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
