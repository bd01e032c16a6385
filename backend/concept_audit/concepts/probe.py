"""Linear probes: a direction that tells positive from negative examples, and how well it does so.

The layer and the way of fitting are chosen by held-out AUROC. What is reported is
measured by nested cross-validation: the choice is made anew within each training
part, so the reported AUROC has not seen the folds that chose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from concept_audit.errors import ConceptError
from concept_audit.metrics import auroc, auroc_interval
from concept_audit.types import ProbeFit

FITS: tuple[ProbeFit, ...] = get_args(ProbeFit)
MIN_EACH = 4
FOLDS, REPEATS = 4, 3
TOO_CLOSE = 0.02
INVERSE_PENALTY = 1.0
"""C of the logistic regression, on inputs whose variance is 1 on average over dimensions."""

Activations = Mapping[int, np.ndarray]
"""Layer → array; for examples float32 [examples, d_model], for spreads float32 [d_model]."""


@dataclass(frozen=True)
class TrainedProbe:
    """A probe and the evidence for it.

    Attributes:
        direction: float32 [d_model], of unit length; points towards the positive examples.
        auroc: held-out, by nested cross-validation.
        auroc_interval: 95% interval of it.
        tried: (layer, fit) → cross-validated AUROC; the highest was taken.
    """

    layer: int
    fit: ProbeFit
    direction: np.ndarray
    auroc: float
    auroc_interval: tuple[float, float]
    n_positive: int
    n_negative: int
    tried: Mapping[tuple[int, ProbeFit], float]


def train_probe(
    activations: Activations, labels: np.ndarray, spread: Activations, fits: Sequence[ProbeFit] = FITS, seed: int = 0
) -> TrainedProbe:
    """ProbeFit a probe at the layer, and in the way, that tells held-out examples apart best.

    Args:
        activations: layer → mean response activations, float32 [examples, d_model].
        labels: int [examples], 1 shows the behaviour and 0 does not.
        spread: layer → standard deviation of each dimension over the rows to be ranked, float32 [d_model].
        fits: ways of fitting to choose from.

    Raises:
        ConceptError: fewer than `MIN_EACH` examples of a label.
    """
    labels = np.asarray(labels)
    n_positive, n_negative = int((labels == 1).sum()), int((labels == 0).sum())
    check_counts(n_positive, n_negative)
    tried = _cross_validate(activations, labels, spread, fits, seed)
    layer, fit = _best(tried)
    area = tried[layer, fit]
    if len(tried) > 1:
        area = _nested_auroc(activations, labels, spread, fits, seed)
    return TrainedProbe(
        layer=layer,
        fit=fit,
        direction=fit_direction(fit, activations[layer], labels, spread[layer]),
        auroc=area,
        auroc_interval=auroc_interval(area, n_positive, n_negative),
        n_positive=n_positive,
        n_negative=n_negative,
        tried=tried,
    )


def check_counts(n_positive: int, n_negative: int) -> None:
    """Raise ConceptError unless there are enough examples of both labels."""
    if n_positive and n_negative and min(n_positive, n_negative) >= MIN_EACH:
        return
    if not n_positive or not n_negative:
        lacking = "positive (label 1)" if not n_positive else "negative (label 0)"
        raise ConceptError(
            f"all {n_positive + n_negative} examples have one label: none is {lacking}; a probe is the "
            f"difference between the two, so add at least {MIN_EACH} of the other"
        )
    raise ConceptError(
        f"{n_positive} positive and {n_negative} negative examples are too few to tell a direction from "
        f"chance; label at least {MIN_EACH} of each (20 or more of each is better)"
    )


def difference_of_means(inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """μ₊ − μ₋, of unit length: float32 [d_model] from float32 [examples, d_model]."""
    wide = inputs.astype(np.float64)
    return _unit(wide[labels == 1].mean(0) - wide[labels == 0].mean(0))


def logistic_regression(inputs: np.ndarray, labels: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """The normal of an L2-regularised logistic regression, of unit length: float32 [d_model].

    Dimensions are measured in units of their spread over the rows to be ranked. A
    dimension in which the data vary for other reasons (topic, length) then has to
    tell more before it is used, and the probe carries over better to rows unlike
    the examples. The fit is done in the span of the examples, which has fewer
    dimensions than the residual stream and does not change the result.
    """
    from sklearn.linear_model import LogisticRegression

    unit = np.where(spread > 0, spread, 1.0).astype(np.float64)
    scaled = inputs.astype(np.float64) / unit
    scaled -= scaled.mean(0)
    scale = np.sqrt(scaled.var(0).mean()) or 1.0
    _, _, basis = np.linalg.svd(scaled, full_matrices=False)
    model = LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=2000)
    model.fit(scaled @ basis.T / scale, labels)
    return _unit(basis.T @ model.coef_[0] / unit)


def fit_direction(fit: ProbeFit, inputs: np.ndarray, labels: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """A probe's unit direction at one layer: float32 [d_model].

    Args:
        fit: ``difference_of_means`` or ``logistic_regression``.
        inputs: mean response activations, float32 [examples, d_model].
        labels: int [examples], 0 or 1.
        spread: float32 [d_model], the deviation of each dimension over the rows to be ranked.
    """
    if fit == "difference_of_means":
        return difference_of_means(inputs, labels)
    return logistic_regression(inputs, labels, spread)


def boundary(inputs: np.ndarray, labels: np.ndarray, direction: np.ndarray) -> float:
    """The score midway between the mean positive and the mean negative example."""
    scores = inputs @ direction
    return float((scores[labels == 1].mean() + scores[labels == 0].mean()) / 2)


def held_out_scores(
    fit: ProbeFit, inputs: np.ndarray, labels: np.ndarray, spread: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Each example's score by probes fitted without it, on average over repeats: float64 [examples].

    Scores are 0 at the boundary of the probe that gave them, so that those of all folds have one zero; they are in
    the units of `boundary`, since every direction has unit length.

    Args:
        fit, inputs, labels, spread: as in `fit_direction`.
    """
    total, times = np.zeros(len(labels)), np.zeros(len(labels))
    for train, test in splits(labels, seed):
        direction = fit_direction(fit, inputs[train], labels[train], spread)
        total[test] += inputs[test] @ direction - boundary(inputs[train], labels[train], direction)
        times[test] += 1
    return total / np.maximum(times, 1)


def _unit(vector: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vector)
    if not length:
        raise ConceptError(
            "the positive and the negative examples have the same activations; their responses must differ"
        )
    return (vector / length).astype(np.float32)


def _best(tried: Mapping[tuple[int, ProbeFit], float]) -> tuple[int, ProbeFit]:
    """The highest AUROC; of those too close to tell, logistic regression at the highest, most central layer.

    Logistic regression is preferred because it carries over better to rows unlike the
    examples (measured in tests/benchmarks), which held-out examples cannot show.
    """
    layers = sorted({layer for layer, _ in tried})
    middle = layers[(len(layers) - 1) // 2]
    highest = max(tried.values())
    close = [key for key, area in tried.items() if area >= highest - TOO_CLOSE]
    return max(close, key=lambda key: (key[1] == "logistic_regression", tried[key], -abs(key[0] - middle)))


def _cross_validate(
    activations: Activations, labels: np.ndarray, spread: Activations, fits: Sequence[ProbeFit], seed: int
) -> dict[tuple[int, ProbeFit], float]:
    """(layer, fit) → the mean AUROC of held-out folds."""
    folds = splits(labels, seed)
    return {
        (layer, fit): float(
            np.mean([_fold_auroc(fit, inputs, labels, spread[layer], train, test) for train, test in folds])
        )
        for layer, inputs in activations.items()
        for fit in fits
    }


def _nested_auroc(
    activations: Activations, labels: np.ndarray, spread: Activations, fits: Sequence[ProbeFit], seed: int
) -> float:
    areas = []
    for train, test in splits(labels, seed + 1):
        inner = {layer: inputs[train] for layer, inputs in activations.items()}
        layer, fit = _best(_cross_validate(inner, labels[train], spread, fits, seed))
        areas.append(_fold_auroc(fit, activations[layer], labels, spread[layer], train, test))
    return float(np.mean(areas))


def _fold_auroc(
    fit: ProbeFit, inputs: np.ndarray, labels: np.ndarray, spread: np.ndarray, train: np.ndarray, test: np.ndarray
) -> float:
    direction = fit_direction(fit, inputs[train], labels[train], spread)
    return auroc(inputs[test] @ direction, labels[test])


def splits(labels: np.ndarray, seed: int, repeats: int = REPEATS) -> list[tuple[np.ndarray, np.ndarray]]:
    """Stratified folds, several times over: places of the examples to train and to test on."""
    from sklearn.model_selection import RepeatedStratifiedKFold

    folds = min(FOLDS, int((labels == 1).sum()), int((labels == 0).sum()))
    splitter = RepeatedStratifiedKFold(n_splits=folds, n_repeats=repeats, random_state=seed)
    return list(splitter.split(np.zeros(len(labels)), labels))
