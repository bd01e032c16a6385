"""Statistics of evidence against SciPy, scikit-learn, and what is known of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from concept_audit.evidence import statistics
from concept_audit.influence.queries import Rows
from concept_audit.pipeline.validation.findings import score_frame
from concept_audit.pipeline.validation.setting import Setting
from concept_audit.types import Concept


def labelled(count: int = 60, ties: bool = False):
    random = np.random.default_rng(0)
    labels = (random.random(count) < 0.3).astype(int)
    scores = random.normal(size=count) + labels
    return (np.round(scores) if ties else scores), labels


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_and_auroc_are_scikit_learns(ties):
    scores, labels = labelled(ties=ties)
    found = statistics.against_labels(scores, labels, k=10)
    assert found["average_precision"].value == pytest.approx(average_precision_score(labels, scores))
    assert found["auroc"].value == pytest.approx(roc_auc_score(labels, scores))
    assert found["precision_at_k"].value == pytest.approx(labels[np.argsort(-scores, kind="stable")[:10]].mean())
    for estimate in found.values():
        assert estimate.low < estimate.value < estimate.high


def test_within_topics_a_topics_own_level_does_not_count():
    random = np.random.default_rng(3)
    topics = np.repeat(["a", "b"], 50)
    labels = np.concatenate([random.random(50) < 0.8, random.random(50) < 0.2]).astype(int)
    scores = (topics == "a") + 0.01 * random.normal(size=100)  # knows the topic, and nothing else
    found = statistics.against_labels(scores, labels, 10, topics.tolist())
    each = [roc_auc_score(labels[topics == t], scores[topics == t]) for t in "ab"]
    weights = [labels[topics == t].sum() for t in "ab"]
    assert found["auroc"].value > 0.75
    assert found["auroc_within"].value == pytest.approx(np.average(each, weights=weights))
    assert found["auroc_within"].low < 0.5 < found["auroc_within"].high


def test_one_label_alone_says_nothing():
    assert statistics.against_labels(np.arange(4.0), np.zeros(4), 2) == {}


def test_rank_correlations_are_spearmans_of_all_pairs():
    random = np.random.default_rng(4)
    scores = {name: random.normal(size=30) for name in "abc"}
    scores["c"][4] = np.nan
    found = statistics.rank_correlations(scores)
    known = np.isfinite(scores["c"])
    assert found.loc["a", "b"] == pytest.approx(stats.spearmanr(scores["a"], scores["b"]).statistic)
    assert found.loc["c", "a"] == pytest.approx(stats.spearmanr(scores["a"][known], scores["c"][known]).statistic)
    assert np.allclose(np.diag(found), 1) and np.allclose(found, found.T)


def test_rows_that_every_query_ranks_alike_are_certain():
    random = np.random.default_rng(5)
    per_query = random.normal(size=(50, 8))
    per_query[0] = 100.0  # first for every query
    found = statistics.stability(statistics.resampled(per_query), per_query.mean(1))
    assert found.low[0] == found.high[0] == 100
    assert (found.high[1:] - found.low[1:]).min() > 1
    assert 0 < found.spearman.low < found.spearman.value < 1
    alike = np.repeat(per_query[:, :1], 8, axis=1)
    assert statistics.stability(statistics.resampled(alike), alike.mean(1)).spearman.value == pytest.approx(1)


def test_rows_that_the_direction_was_fitted_to_have_no_say_as_labels():
    concept = Concept("probe:tone", "tone", "probe", 2, np.ones(4, np.float32))
    nothing = Rows([np.arange(3)] * 4, [np.ones(3, bool)] * 4)
    labels, fitted = np.array([1, 0, 1, -1]), np.array([True, False, False, False])
    setting = Setting(concept, None, {}, None, [], nothing, False, np.arange(4), labels, None, fitted, 0, 0)
    assert setting.judged.tolist() == [False, True, True, False]
    kept = score_frame({"bm25": np.arange(4.0)}, setting, {})
    assert kept["label"].isna().tolist() == [True, False, False, True]
