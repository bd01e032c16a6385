"""Probes find planted directions, and do not flatter themselves."""

from __future__ import annotations

import numpy as np
import pytest

from concept_audit.concepts.probe import FITS, MIN_EACH, logistic_regression, train_probe
from concept_audit.errors import ConceptError

EVEN = dict.fromkeys(range(20), np.ones(40, np.float32))
LABELS = np.r_[np.ones(16, int), np.zeros(16, int)]


def planted(strength: float, seed: int = 0, width: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a direction added for the positives; and the direction."""
    rng = np.random.default_rng(seed)
    direction = np.eye(width)[3]
    inputs = rng.normal(size=(len(LABELS), width)) + strength * LABELS[:, None] * direction
    return inputs.astype(np.float32), direction


@pytest.mark.parametrize("fit", FITS)
def test_a_planted_direction_is_found_and_points_to_the_positives(fit):
    inputs, direction = planted(8.0)
    probe = train_probe({5: inputs}, LABELS, EVEN, [fit])
    assert probe.direction.dtype == np.float32
    assert np.linalg.norm(probe.direction) == pytest.approx(1, abs=1e-5)
    assert probe.direction @ direction > 0.9
    scores = inputs @ probe.direction
    assert scores[LABELS == 1].min() > scores[LABELS == 0].max()
    assert probe.auroc > 0.95


def test_the_layer_with_the_signal_is_chosen():
    layers = {8: planted(0.0, 1)[0], 12: planted(6.0, 2)[0], 16: planted(0.0, 3)[0]}
    probe = train_probe(layers, LABELS, EVEN)
    assert probe.layer == 12
    assert set(probe.tried) == {(layer, fit) for layer in layers for fit in FITS}


def test_noise_is_not_reported_as_signal_although_the_best_of_many_is_taken():
    found = [
        train_probe({layer: planted(0.0, 10 * seed + layer)[0] for layer in (1, 2, 3)}, LABELS, EVEN).auroc
        for seed in range(6)
    ]
    assert 0.38 < np.mean(found) < 0.62


def test_the_same_examples_give_the_same_probe():
    inputs, _ = planted(2.0)
    first, second = train_probe({3: inputs}, LABELS, EVEN), train_probe({3: inputs}, LABELS, EVEN)
    assert (first.direction == second.direction).all()
    assert first.auroc == second.auroc


def test_logistic_regression_in_the_span_equals_the_fit_in_full():
    from sklearn.linear_model import LogisticRegression

    inputs, _ = planted(1.0)
    scaled = (inputs - inputs.mean(0)) / np.sqrt(inputs.var(0).mean())
    full = LogisticRegression(C=1.0, class_weight="balanced", max_iter=5000, tol=1e-8).fit(scaled, LABELS)
    expected = full.coef_[0] / np.linalg.norm(full.coef_[0])
    assert logistic_regression(inputs, LABELS, EVEN[1]) @ expected > 0.9999


@pytest.mark.parametrize("fit", FITS)
def test_the_unit_of_the_activations_does_not_matter(fit):
    inputs, _ = planted(2.0)
    plain = train_probe({1: inputs}, LABELS, EVEN, [fit]).direction
    larger = train_probe({1: 100 * inputs}, LABELS, {1: 100 * EVEN[1]}, [fit]).direction
    assert plain @ larger > 0.9999


def test_a_dimension_in_which_the_data_vary_anyway_does_not_decide():
    inputs, direction = planted(3.0)
    inputs[:, 0] += 200 * np.random.default_rng(1).normal(size=len(LABELS))
    spread = np.ones(40, np.float32)
    spread[0] = 200
    found = logistic_regression(inputs, LABELS, spread)
    assert abs(found[0]) < 0.02
    assert found @ direction > 0.6


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1] * 8, "none is negative"),
        ([0] * 8, "none is positive"),
        ([1, 0], f"label at least {MIN_EACH} of each"),
        ([1] * 10 + [0] * 3, "10 positive and 3 negative"),
    ],
)
def test_too_few_examples_are_refused_with_the_numbers(labels, message):
    with pytest.raises(ConceptError, match=message):
        train_probe({1: np.random.default_rng(0).normal(size=(len(labels), 40))}, np.array(labels), EVEN)


def test_examples_that_do_not_differ_are_refused():
    with pytest.raises(ConceptError, match="same activations"):
        train_probe({1: np.ones((32, 40), np.float32)}, LABELS, EVEN)
