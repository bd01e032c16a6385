"""Area under the ROC curve, with an interval that is honest for few examples."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm, rankdata

EDGE = 1e-9


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The probability that a positive scores above a negative; ties count half (Mann and Whitney 1947).

    Args:
        scores: [n].
        labels: [n], 1 positive and 0 negative, both present.
    """
    positive = labels == 1
    n_positive = int(positive.sum())
    ranks = rankdata(scores)
    wins = ranks[positive].sum() - n_positive * (n_positive + 1) / 2
    return float(wins / (n_positive * (len(labels) - n_positive)))


def auroc_interval(estimate: float, n_positive: int, n_negative: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval for an AUROC: Newcombe 2006 (Statistics in Medicine 25:559), method 5.

    It stays within [0, 1] and does not shrink to a point at an estimate of 1, where
    the usual standard error is zero.

    Returns:
        lower and upper bound.
    """
    z = float(norm.ppf((1 + confidence) / 2))
    mean_less_one = (n_positive + n_negative) / 2 - 1

    def spread(area: float) -> float:
        pairs = n_positive * n_negative
        shape = 1 + mean_less_one * ((1 - area) / (2 - area) + area / (1 + area))
        return z * np.sqrt(max(area * (1 - area) * shape / pairs, 0.0))

    # At an estimate of 0 or 1 the estimate itself is a root too, not the one that is meant.
    lower = brentq(lambda a: a + spread(a) - estimate, 0.0, estimate - EDGE) if estimate > EDGE else 0.0
    upper = brentq(lambda a: a - spread(a) - estimate, estimate + EDGE, 1.0) if estimate < 1 - EDGE else 1.0
    return float(lower), float(upper)
