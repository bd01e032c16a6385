"""How good a probe would be with the labels so far: quick enough to be told after every label.

Directions are differences of means, which take no optimiser. Each example is scored by
probes that have not seen it, against the midpoint of the two classes' means; so scores of
different folds have one zero, the boundary.

A fold's direction is Xᵀc, with c = 1/n₊ at the positive examples that it trains on, −1/n₋ at
the negative ones, and 0 elsewhere. Scores then need the examples' inner products alone:
X(Xᵀc)/‖Xᵀc‖ = Kc/√(cᵀKc), K = XXᵀ, whatever the width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from concept_audit.concepts.probe import Activations, check_counts, splits
from concept_audit.errors import ConceptError
from concept_audit.metrics import auroc, auroc_interval

RANDOM_PROBES = 200
SAME = 1e-14
"""Means that differ by less, in units of the examples' summed squares, differ by rounding."""


@dataclass(frozen=True)
class ProbeReport:
    """Held-out evidence for a probe.

    Attributes:
        layer: where held-out AUROC is highest.
        auroc, auroc_interval: there, with a 95% interval.
        by_layer: layer → held-out AUROC.
        scores: float64 [examples], held out, 0 at the boundary between the classes; in the order given.
        labels: int [examples].
        random_auroc: the same number with labels shuffled, the layer chosen anew for each shuffle: mean and 95th
            percentile. A probe below the latter has learned nothing that can be told from chance.
    """

    layer: int
    auroc: float
    auroc_interval: tuple[float, float]
    by_layer: Mapping[int, float]
    scores: np.ndarray
    labels: np.ndarray
    random_auroc: tuple[float, float]


def probe_report(activations: Activations, labels: np.ndarray, seed: int = 0) -> ProbeReport:
    """Cross-validate a difference-of-means probe at every layer.

    Args:
        activations: layer → mean response activations, float32 [examples, d_model].
        labels: int [examples], 1 shows the behaviour and 0 does not.

    Raises:
        ConceptError: fewer than `MIN_EACH` examples of a label.
    """
    labels = np.asarray(labels)
    n_positive, n_negative = int((labels == 1).sum()), int((labels == 0).sum())
    check_counts(n_positive, n_negative)
    folds = _contrasts(labels, splits(labels, seed))
    products = {layer: _inner_products(inputs) for layer, inputs in activations.items()}
    best, areas, scores = _best_layer(products, labels, folds)
    if not scores.any():
        raise ConceptError(
            "the positive and the negative examples have the same activations; their responses must differ"
        )
    rng = np.random.default_rng(seed)
    null = []
    for _ in range(RANDOM_PROBES):
        # To shuffle the labels is to shuffle which examples carry them; the folds then stay stratified.
        order = rng.permutation(len(labels))
        layer, found, _ = _best_layer({at: k[np.ix_(order, order)] for at, k in products.items()}, labels, folds)
        null.append(found[layer])
    return ProbeReport(
        layer=best,
        auroc=areas[best],
        auroc_interval=auroc_interval(areas[best], n_positive, n_negative),
        by_layer=areas,
        scores=scores,
        labels=labels,
        random_auroc=(float(np.mean(null)), float(np.quantile(null, 0.95))),
    )


@dataclass(frozen=True)
class _Contrasts:
    """What makes the folds' directions: both are float64 [folds, examples].

    Attributes:
        weights: c of each fold.
        tested: 1 where the fold tests on the example, over how many folds do.
    """

    weights: np.ndarray
    tested: np.ndarray


def _contrasts(labels: np.ndarray, folds: Sequence[tuple[np.ndarray, np.ndarray]]) -> _Contrasts:
    weights, tested = np.zeros((len(folds), len(labels))), np.zeros((len(folds), len(labels)))
    for fold, (train, test) in enumerate(folds):
        for label, sign in ((1, 1.0), (0, -1.0)):
            members = train[labels[train] == label]
            weights[fold, members] = sign / len(members)
        tested[fold, test] = 1
    return _Contrasts(weights, tested / np.maximum(tested.sum(0), 1))


def _best_layer(
    products: Activations, labels: np.ndarray, folds: _Contrasts
) -> tuple[int, dict[int, float], np.ndarray]:
    """The layer of the highest held-out AUROC, the AUROC of every layer, and the held-out scores at that one."""
    scores = {layer: _held_out(each, folds) for layer, each in products.items()}
    areas = {layer: auroc(values, labels) for layer, values in scores.items()}
    best = max(areas, key=lambda layer: (areas[layer], -layer))
    return best, areas, scores[best]


def _inner_products(inputs: np.ndarray) -> np.ndarray:
    """K: float64 [examples, examples]. The mean is taken off, since differences of means do not see it."""
    wide = inputs.astype(np.float64)
    wide -= wide.mean(0)
    return wide @ wide.T


def _held_out(products: np.ndarray, folds: _Contrasts) -> np.ndarray:
    """Each example's score by probes that have not seen it, on average over repeats: float64 [examples].

    Scores are 0 where the two classes' means are the same.
    """
    raw = folds.weights @ products
    squares = (raw * folds.weights).sum(1, keepdims=True)
    scores = raw / np.sqrt(np.where(squares > SAME * np.trace(products), squares, np.inf))
    # |c| weighs each class's training examples to 1.
    scores -= (scores * np.abs(folds.weights)).sum(1, keepdims=True) / 2
    return (scores * folds.tested).sum(0)
