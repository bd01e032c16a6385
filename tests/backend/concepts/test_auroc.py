"""AUROC by counting pairs, and an interval that keeps its promise."""

from __future__ import annotations

import numpy as np
import pytest

from concept_audit.concepts.auroc import auroc, auroc_interval


@pytest.mark.parametrize("seed", range(5))
def test_auroc_counts_pairs_with_ties_as_half(seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 6, 30).astype(float), np.r_[np.ones(11, int), np.zeros(19, int)]
    pairs = [(p > n) + (p == n) / 2 for p in scores[labels == 1] for n in scores[labels == 0]]
    assert auroc(scores, labels) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("estimate", [0.0, 0.03, 0.5, 0.9, 0.999, 1.0])
def test_the_interval_holds_the_estimate_and_is_never_a_point(estimate):
    low, high = auroc_interval(estimate, 12, 15)
    assert 0 <= low <= estimate <= high <= 1
    assert high - low > 0.05


@pytest.mark.parametrize("estimate", [0.6, 0.9, 0.99])
def test_the_bounds_solve_newcombes_equation(estimate):
    m, n, z = 14, 20, 1.959963984540054
    for bound in auroc_interval(estimate, m, n):
        mean = (m + n) / 2 - 1
        variance = bound * (1 - bound) / (m * n) * (1 + mean * (1 - bound) / (2 - bound) + mean * bound / (1 + bound))
        assert abs(bound - estimate) == pytest.approx(z * variance**0.5, abs=1e-6)


def test_more_examples_narrow_the_interval():
    widths = [np.diff(auroc_interval(0.9, n, n))[0] for n in (5, 20, 100)]
    assert widths == sorted(widths, reverse=True)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    labels = np.r_[np.ones(12, int), np.zeros(12, int)]
    truth = 0.9213504  # of two unit normals two deviations apart
    covered = 0
    for _ in range(400):
        scores = rng.normal(size=24) + 2 * labels
        low, high = auroc_interval(auroc(scores, labels), 12, 12)
        covered += low <= truth <= high
    assert 0.92 <= covered / 400 <= 1.0
