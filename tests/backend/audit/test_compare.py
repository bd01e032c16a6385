"""Two rankings side by side, and rankings against groups of rows, checked with SciPy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from concept_audit import Audit, InfluenceOptions, LabelledExample, RowFilter
from concept_audit.audit.comparisons import OwnRows
from concept_audit.metrics import Estimate
from concept_audit.store.examples import messages_from_json

A = ("sae:3", "vector_filter", InfluenceOptions())
B = ("sae:3", "activation_similarity", InfluenceOptions())


def both(audit, where=RowFilter()):  # noqa: B008 - never changed
    one = audit.rank(*A[:2], where=where).set_index("example_id").sort_index()
    other = audit.rank(*B[:2], where=where).set_index("example_id").sort_index()
    return one, other


@pytest.mark.parametrize("where", [RowFilter(), RowFilter(text="money")])
def test_agreement_is_spearmans_and_the_overlap_of_the_first_rows(audit, where):
    one, other = both(audit, where)
    found = audit.comparisons.agreement(A, B, where)
    assert found.n_rows == len(one)
    assert found.spearman == pytest.approx(spearmanr(one["rank"], other["rank"]).statistic, abs=1e-9)
    for depth, overlap in zip(found.depths, found.overlap, strict=True):
        shared = set(one["rank"].nsmallest(depth).index) & set(other["rank"].nsmallest(depth).index)
        assert overlap == pytest.approx(len(shared) / depth)
    assert {10, 50} <= set(found.depths) and found.overlap[-1] == 1


def test_disagreements_come_by_the_gap_of_percentiles(audit):
    one, other = both(audit)
    gap = (one["percentile"] - other["percentile"]).abs().sort_values(ascending=False)
    rows = audit.comparisons.disagreements(A, B, limit=5)
    mine = (rows["a_percentile"] - rows["b_percentile"]).abs()
    assert mine.tolist() == pytest.approx(gap.to_numpy()[:5])
    up = audit.comparisons.disagreements(A, B, higher="a", limit=5)
    assert (up["a_percentile"] >= up["b_percentile"]).all()
    points = audit.comparisons.points(A, B, limit=20)
    assert len(points) == 20 and points["a_score"].tolist() == one.loc[points["example_id"], "score"].tolist()


def test_rankings_are_held_against_a_group_as_scikit_learn_does(audit):
    audit.rank("sae:3")
    audit.rank("sae:3", "bm25")
    table = audit.comparisons.against_group("sae:3", "metadata", "topic", "money", k=25).set_index("method")
    assert set(table.index) == {"feature_activation", "vector_filter", "bm25"}
    rows = audit.rank("sae:3", "bm25")
    labels = rows["metadata"].str.contains("money").astype(int).to_numpy()
    assert table.n_positive["bm25"] == labels.sum()
    assert table.auroc["bm25"] == pytest.approx(roc_auc_score(labels, rows["score"]))
    assert table.precision_at_k["bm25"] == pytest.approx(labels[:25].mean())
    vector = audit.rank("sae:3", "vector_filter")
    truth = vector["metadata"].str.contains("money").astype(int)
    assert table.average_precision["vector_filter"] == pytest.approx(average_precision_score(truth, vector["score"]))
    # Without ties, a point for each row of the group; tied rows share one.
    recall, precision = table.recall["vector_filter"], table.precision["vector_filter"]
    hits = np.flatnonzero(truth)
    assert vector["score"].is_unique
    assert recall.tolist() == pytest.approx(((np.arange(len(hits)) + 1) / len(hits)).tolist())
    assert precision.tolist() == pytest.approx((recall * len(hits) / (hits + 1)).tolist())
    precision, recall, _ = precision_recall_curve(labels, rows["score"])
    rises = np.flatnonzero(np.diff(recall[::-1])) + 1
    assert not rows["score"].is_unique
    assert table.recall["bm25"].tolist() == pytest.approx(recall[::-1][rises].tolist())
    assert table.precision["bm25"].tolist() == pytest.approx(precision[::-1][rises].tolist())
    assert audit.comparisons.against_group("sae:3", "flagged").empty


def test_the_matrix_of_methods_is_symmetric(audit):
    audit.rank("sae:3")
    audit.rank("sae:3", "bm25")
    audit.rank("sae:3", "activation_similarity")
    names, matrix = audit.comparisons.correlations("sae:3")
    assert len(names) == 4 and np.allclose(matrix, matrix.T) and np.allclose(np.diag(matrix), 1)


def test_other_rankings_of_the_rows_on_screen(audit):
    ranks = audit.rank("sae:3", "bm25").set_index("example_id")["rank"]
    found = audit.rankings.scores_elsewhere("sae:3", [4, 9])
    mine = found[found["method"] == "bm25"].set_index("example_id")["rank"]
    assert mine.to_dict() == {4: ranks[4], 9: ranks[9]}


def test_rows_that_a_probe_was_fitted_to_are_left_out_of_its_auroc(audit):
    rows = audit.rows.list()
    inside = rows["metadata"].str.contains("money")
    chosen = [*rows[inside].head(12).to_dict("records"), *rows[~inside].head(10).to_dict("records")]
    examples = [LabelledExample(messages_from_json(r["messages"]), int("money" in r["metadata"])) for r in chosen]
    audit.train_probe("tone", examples, layer=2)
    ranked = audit.rank("tone")
    labelled = ranked["content_hash"].isin({row["content_hash"] for row in chosen})
    assert audit.comparisons.labelled_rows("tone") == labelled.sum() >= 22
    table = audit.comparisons.against_group("tone", "metadata", "topic", "money").iloc[0]
    truth = ranked["metadata"].str.contains("money").astype(int)
    assert table.n_left_out == labelled.sum() and table.n_rows == (~labelled).sum()
    assert table.auroc == pytest.approx(roc_auc_score(truth[~labelled], ranked["score"][~labelled]))
    assert table.auroc < roc_auc_score(truth, ranked["score"])
    assert audit.comparisons.against_group("tone", "labelled", "tone").empty
    assert audit.comparisons.labelled_rows("sae:3") == 0


@pytest.mark.parametrize("concept", ["sae:3", "tone"])
def test_influence_is_held_against_the_rows_that_read_most_as_the_concept(audit, concept):
    rows = audit.rows.list(limit=8)
    examples = [LabelledExample(messages_from_json(text), i % 2) for i, text in enumerate(rows["messages"])]
    audit.train_probe("tone", examples, layer=2)
    asked = (concept, "concept_influence", InfluenceOptions.of(curvature="identity", precision="float32"))
    usual = audit.rank(concept, top=None).set_index("example_id")
    scores = audit.rank(*asked[:2], options=asked[2], top=None).set_index("example_id")["score"]
    own = ((usual["rank"] <= round(len(usual) / 10)) & (usual["score"] != 0)).reindex(scores.index)
    found = audit.comparisons.on_own_rows(asked)
    area = found.area
    assert area.n == own.sum() >= 5
    assert area.value == pytest.approx(roc_auc_score(own, scores))
    assert area.low < area.value < area.high
    assert f"The {area.n} rows" in found.in_words()
    assert audit.comparisons.on_own_rows((concept, "vector_filter", InfluenceOptions())) is None


def test_nothing_is_computed_for_it_in_read_only(audit):
    rows = audit.rows.list(limit=8)
    examples = [LabelledExample(messages_from_json(text), i % 2) for i, text in enumerate(rows["messages"])]
    audit.train_probe("tone", examples, layer=2)
    asked = ("tone", "concept_influence", InfluenceOptions.of(curvature="identity", precision="float32"))
    audit.rank(*asked[:2], options=asked[2])
    assert not audit.rankings.has("tone", "vector_filter")
    closed = Audit(audit.root, read_only=True)
    assert closed.comparisons.on_own_rows(asked) is None
    audit.rank("tone")
    assert Audit(audit.root, read_only=True).comparisons.on_own_rows(asked) is not None


@pytest.mark.parametrize(("high", "said"), [(0.49, True), (0.51, False)])
def test_it_is_said_where_influence_puts_such_rows_last(high, said):
    found = OwnRows("sae_feature", Estimate(0.4, 0.3, high, n=8))
    words = found.in_words()
    assert found.below == said
    assert ("below one half" in words) == said and "0.40 (95% interval 0.30 to 0." in words
