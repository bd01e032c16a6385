"""Metrics by counting, against SciPy and scikit-learn, and intervals that keep their promise."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from concept_audit import metrics
from concept_audit.metrics import (
    auroc,
    auroc_interval,
    correlation,
    mean_interval,
    paired,
    precision_at_k,
    precision_recall,
    spearman_interval,
)


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


def test_a_curve_counts_tied_rows_together():
    scores, labels = np.array([3.0, 2.0, 2.0, 1.0]), np.array([1, 0, 1, 1])
    thresholds, precision, recall = precision_recall(scores, labels)
    assert thresholds.tolist() == [3, 2, 1]
    assert precision.tolist() == pytest.approx([1, 2 / 3, 3 / 4])
    assert recall.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert [precision_at_k(scores, labels, k) for k in (1, 2, 3)] == pytest.approx([1, 1 / 2, 2 / 3])


@pytest.mark.parametrize("kind, oracle", [("spearman", stats.spearmanr), ("pearson", stats.pearsonr)])
def test_correlations_are_scipys_with_an_interval_around_them(kind, oracle):
    random = np.random.default_rng(1)
    x = random.normal(size=40)
    y = x + random.normal(size=40)
    y[3] = np.nan
    found = correlation(x, y, kind)
    known = np.isfinite(y)
    assert found.value == pytest.approx(oracle(x[known], y[known]).statistic)
    assert found.low < found.value < found.high and found.n == 39
    assert found == correlation(x, y, kind)


def test_a_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        x = random.normal(size=50)
        y = 0.6 * x + 0.8 * random.normal(size=50)
        found = correlation(x, y, "pearson")
        hits += found.low <= 0.6 <= found.high
    assert 0.88 <= hits / 200 <= 0.98


def test_paired_differences_are_scipys_test():
    d = np.array([0.3, 0.5, 0.2, 0.6])
    found = paired(d)
    oracle = stats.ttest_1samp(d, 0)
    interval = oracle.confidence_interval()
    assert found.p == pytest.approx(oracle.pvalue) and found.value == pytest.approx(0.4)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert np.isnan(paired(np.array([1.0])).p)
    assert paired(np.zeros(3)).p == 1 and paired(np.ones(3)).p == 0


def test_a_mean_interval_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(1)
    covered = [low <= 2.0 <= high for low, high in (mean_interval(random.normal(2, 1, 40)) for _ in range(300))]
    assert 0.90 <= np.mean(covered) <= 0.98
    assert np.isnan(mean_interval(np.ones(1))).all()


def test_the_interval_of_a_rank_correlation_covers_it_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    rho, n, hits = 0.5, 60, 0
    truth = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's for a bivariate normal
    for _ in range(300):
        x = rng.normal(size=n)
        y = rho * x + np.sqrt(1 - rho**2) * rng.normal(size=n)
        low, high = spearman_interval(float(stats.spearmanr(x, y).statistic), n)
        hits += low <= truth <= high
    assert 0.92 < hits / 300 < 0.98


def test_metrics_stand_at_the_bottom_of_the_house():
    tree = ast.parse(Path(metrics.__file__).read_text("utf-8"))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {name.split(".")[0] for name in names} <= {"__future__", "dataclasses", "math", "numpy", "scipy", "sklearn"}


def test_balanced_accuracy_is_the_mean_of_the_two_rates():
    truth = np.array([True] * 8 + [False] * 20)
    said = np.array([True] * 6 + [False] * 2 + [True] * 5 + [False] * 15)
    found = metrics.balanced_accuracy(said, truth)
    assert found.value == pytest.approx((6 / 8 + 15 / 20) / 2) and found.n == 28
    assert 0 < found.low < found.value < found.high < 1
    assert np.isnan(metrics.balanced_accuracy(said[:8], truth[:8]).value)
    perfect = metrics.balanced_accuracy(truth, truth)
    assert perfect.value == perfect.high == 1 and perfect.low < 0.9


def test_wilsons_interval_is_scipys():
    for hits, n in ((0, 5), (3, 7), (40, 40), (13, 200)):
        expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
        assert metrics.wilson_interval(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_interval_of_balanced_accuracy_covers():
    rng = np.random.default_rng(0)
    truth = np.arange(80) < 40
    covered = []
    for _ in range(400):
        said = rng.random(80) < np.where(truth, 0.8, 0.3)
        found = metrics.balanced_accuracy(said, truth)
        covered.append(found.low <= 0.75 <= found.high)
    assert np.mean(covered) > 0.91
