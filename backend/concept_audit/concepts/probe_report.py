"""How good a probe would be with the labels so far: quick enough to be told after every label.

Directions are differences of means, which take no optimiser. Each example is scored by
probes that have not seen it, against the midpoint of the two classes' means; so scores of
different folds have one zero, the boundary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from concept_audit.concepts.probe import Activations, boundary, check_counts, difference_of_means, splits
from concept_audit.metrics import auroc, auroc_interval, precision_recall

RANDOM_PROBES = 200


@dataclass(frozen=True)
class ProbeReport:
    """Held-out evidence for a probe.

    Attributes:
        layer: where held-out AUROC is highest.
        auroc, auroc_interval: there, with a 95% interval.
        by_layer: layer → held-out AUROC.
        scores: float64 [examples], held out, 0 at the boundary between the classes; in the order given.
        labels: int [examples].
        random_auroc: held-out AUROC of probes from the same examples with labels shuffled: mean and 95th
            percentile. A probe below the latter has learned nothing that can be told from chance.
    """

    layer: int
    auroc: float
    auroc_interval: tuple[float, float]
    by_layer: Mapping[int, float]
    scores: np.ndarray
    labels: np.ndarray
    random_auroc: tuple[float, float]

    def precision_recall(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Thresholds, from high to low, with the precision and recall of what scores at least that much."""
        return precision_recall(self.scores, self.labels)


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
    folds = splits(labels, seed)
    scores = {layer: _held_out(inputs, labels, folds) for layer, inputs in activations.items()}
    areas = {layer: auroc(values, labels) for layer, values in scores.items()}
    best = max(areas, key=lambda layer: (areas[layer], -layer))
    rng = np.random.default_rng(seed)
    null = []
    for _ in range(RANDOM_PROBES):
        shuffled = rng.permutation(labels)
        null.append(auroc(_held_out(activations[best], shuffled, splits(shuffled, seed, repeats=1)), shuffled))
    return ProbeReport(
        layer=best,
        auroc=areas[best],
        auroc_interval=auroc_interval(areas[best], n_positive, n_negative),
        by_layer=areas,
        scores=scores[best],
        labels=labels,
        random_auroc=(float(np.mean(null)), float(np.quantile(null, 0.95))),
    )


def _held_out(inputs: np.ndarray, labels: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Each example's score by probes that have not seen it, on average over repeats: float64 [examples]."""
    total, times = np.zeros(len(labels)), np.zeros(len(labels))
    for train, test in folds:
        direction = difference_of_means(inputs[train], labels[train])
        total[test] += inputs[test] @ direction - boundary(inputs[train], labels[train], direction)
        times[test] += 1
    return total / np.maximum(times, 1)
