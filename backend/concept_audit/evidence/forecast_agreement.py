"""How far a forecast of many concepts agrees with how they really changed.

All of it is over SAE features, which are no independent draws: features share directions and rise together. The
intervals tell how far the figures hang on which features there are, not how they would vary with other data or prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from concept_audit.metrics import Estimate, correlation, wilson_interval

TOP = 20
MEASURES = ("spearman", "top_up", "top_down", "sign")


def agreement(predicted: np.ndarray, actual: np.ndarray, top: int = TOP) -> dict[str, Estimate]:
    """What a prediction says of actual changes.

    - ``spearman``: their rank correlation, with a bootstrap interval over the features;
    - ``top_up``, ``top_down``: of the k features that are predicted to rise (fall) most, the share that are among the
      k that really rose (fell) most, with Wilson's interval; k/n by chance;
    - ``sign``: of the features for which both are other than 0, the share in which the signs are the same.

    Args:
        predicted, actual: float [features]; those without a finite prediction are left out.
        top: k; at most the number of features.
    """
    known = np.isfinite(predicted) & np.isfinite(actual)
    predicted, actual = predicted[known], actual[known]
    k = min(top, len(predicted))
    moved = (predicted != 0) & (actual != 0)
    return {
        "spearman": correlation(predicted, actual),
        "top_up": _share(_shared(predicted, actual, k), k),
        "top_down": _share(_shared(-predicted, -actual, k), k),
        "sign": _share(int((np.sign(predicted) == np.sign(actual))[moved].sum()), int(moved.sum())),
    }


def between_seeds(changes: Sequence[np.ndarray], top: int = TOP) -> dict[str, Estimate]:
    """`agreement` of each seed's actual change with the mean of the others', averaged: what no forecast can beat by far.

    Args:
        changes: of 2 seeds or more, float [features] each.

    Returns:
        values without intervals; n is the number of seeds.
    """
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for place, change in enumerate(changes):
        others = np.mean([other for i, other in enumerate(changes) if i != place], 0)
        for name, estimate in agreement(change, others, top).items():
            found[name].append(estimate.value)
    return {name: Estimate(float(np.mean(values)), n=len(changes)) for name, values in found.items()}


def views(usual: np.ndarray, firing: np.ndarray) -> Mapping[str, np.ndarray]:
    """The features and the units in which a forecast is held against reality: name → factor of each feature.

    ``live``: the activation of every feature that fires on the data; ``firing``: of those alone that fire on the
    prompts, as no first-order forecast tells of others; ``relative``: of every live feature, in units of its usual
    activation. The factor is NaN where a feature does not count.

    Args:
        usual: mean activation of each feature where it fires in the data.
        firing: bool, whether it fires on the prompts before training.
    """
    with np.errstate(divide="ignore"):
        return {
            "live": np.ones(len(usual)),
            "firing": np.where(firing, 1.0, np.nan),
            "relative": np.where(usual > 0, 1 / usual, np.nan),
        }


def _shared(one: np.ndarray, other: np.ndarray, k: int) -> int:
    first, second = (set(np.argsort(-values, kind="stable")[:k].tolist()) for values in (one, other))
    return len(first & second)


def _share(successes: int, n: int) -> Estimate:
    low, high = wilson_interval(successes, n)
    return Estimate(successes / n if n else float("nan"), low, high, n)
