"""Rows that are query examples are scored by the other queries, as if these had been the only ones."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from concept_audit import Audit, InfluenceOptions, LabelledExample, Message
from concept_audit.influence.baselines import activation_similarity, bm25
from concept_audit.influence.fitting import Fisher
from concept_audit.influence.own_queries import by_sign, own_queries, own_token_scores
from concept_audit.influence.queries import DenseQueries, Loss, NegatedConcept, Rows, precondition, query_gradient
from concept_audit.influence.targets import Projection
from concept_audit.model.linear import linear_layers
from concept_audit.store import queries as store_queries
from concept_audit.store.examples import messages_from_json
from tests.backend.influence.test_brute_force import DAMPING, LAYER, close, direction, engine, fitted, model, rows
from tests.backend.influence.test_index import EXACT, FROM_INDEX, SMALL

LABELS = [1, 1, 0, 1, 0]
"""Of queries that are rows 0 to 3, and row 4 once more as a query that is not a row."""


def weights_of(labels):
    signs = {label: labels.count(label) for label in labels}
    return [1 / signs[1] if label else -1 / signs[0] for label in labels]


@pytest.mark.parametrize("quantity", [Loss(), NegatedConcept(Projection(LAYER, direction()))], ids=["loss", "concept"])
@pytest.mark.parametrize("curved", [False, True], ids=["identity", "ekfac"])
@pytest.mark.parametrize("unit", [False, True], ids=["plain", "unit"])
def test_the_score_equals_that_by_the_queries_without_the_row(quantity, curved, unit):
    lm, data = model("llama"), rows()
    layers = linear_layers(lm, 2, LAYER)
    curvature = fitted(lm, layers, data, Fisher("empirical", 7), True).__getitem__ if curved else None
    asked = Rows(data.ids[:5], data.response[:5])

    def solved(queries, weights):
        gradient = query_gradient(lm, layers, quantity, queries, weights)
        return precondition(gradient, curvature, DAMPING) if curvature else gradient

    own = own_queries(list("abcde"), LABELS, {"a": [0], "b": [1], "c": [2], "d": [3]})
    parts = [solved(part, weights) for part, weights, _ in by_sign(asked, weights_of(LABELS))]
    mine = Rows(data.ids[:4], data.response[:4])
    parts = [DenseQueries([part], torch.float64) for part in parts]
    found = own_token_scores(lm, layers, parts, quantity, mine, mine, own.shares, curvature, DAMPING, unit, budget=64)
    wanted = []
    for left in range(4):
        others = [i for i in range(5) if i != left]
        labels = [LABELS[i] for i in others]
        query = solved(Rows([data.ids[i] for i in others], [data.response[i] for i in others]), weights_of(labels))
        wanted.append(engine(lm, layers, DenseQueries([query], torch.float64), data, unit_normalised=unit)[left])
    close([tokens.sum() for tokens in found], [row.scores[0] for row in wanted], 1e-9)
    for tokens, row in zip(found, wanted, strict=True):
        assert tokens == pytest.approx(row.tokens[:, 0], rel=1e-4, abs=1e-6 * float(np.abs(row.tokens).max()))


def test_a_sign_of_which_nothing_would_be_left_stays():
    assert own_queries(["a"], [1], {"a": [4]}) is None
    assert own_queries(["a", "b"], [1, 0], {"a": [4]}) is None
    assert own_queries(["a", "b"], [1, 1], {}) is None
    own = own_queries(["a", "b", "a", "c"], [1, 1, 1, 0], {"a": [4, 9], "c": [2]})
    assert own.rows == ((4, 9),) and own.places == (0,) and own.of == (0, -1, 0, -1)
    assert own.shares.tolist() == [[2 / 3, 0]]


def test_baselines_compare_a_row_with_the_others():
    random = np.random.default_rng(0)
    activations = random.normal(size=(6, 8)).astype(np.float32)
    own = own_queries(list("xyz"), [1, 1, 1], {"x": [2], "y": [4, 5]})
    activations[5] = activations[4]
    queries = np.stack([activations[2], activations[4], random.normal(size=8).astype(np.float32)])
    found = activation_similarity([activations], queries, own)
    for row, left in ((0, []), (2, [0]), (4, [1]), (5, [1])):
        alone = activation_similarity([activations], np.delete(queries, left, 0))
        assert found[row] == pytest.approx(alone[row], rel=1e-6)
    texts = ["red boat", "green boat", "a red old boat", "new city", "city garden", "city garden"]
    asked = ["a red old boat", "city garden", "new garden boat"]
    found = bm25(lambda: [texts], asked, own)
    for row, left in ((0, None), (2, 0), (4, 1), (5, 1)):
        alone = bm25(lambda: [texts], [text for i, text in enumerate(asked) if i != left])
        assert found[row] == pytest.approx(alone[row], rel=1e-5)
    assert bm25(lambda: [texts], asked)[4] > found[4]


@pytest.fixture(scope="module")
def audit(built, tmp_path_factory):
    audit = Audit(shutil.copytree(built, tmp_path_factory.mktemp("own") / "small"))
    audit.build_index(SMALL)
    return audit


FEATURE = "sae:3"
FORMS = {
    "exact": ("concept_influence", EXACT),
    "unit": ("concept_influence", EXACT.changed(curvature="identity", unit_normalised=True)),
    "index": ("concept_influence", FROM_INDEX),
    "similarity": ("activation_similarity", InfluenceOptions()),
    "bm25": ("bm25", InfluenceOptions()),
}


def strongest(audit):
    return audit.opened.read(lambda cursor: store_queries.strongest_rows(cursor, 3, 8))


@pytest.mark.parametrize("form", FORMS)
def test_a_features_strongest_rows_are_ranked_by_the_others_and_marked(audit, form):
    method, options = FORMS[form]
    queries = strongest(audit)
    table = audit.rank(FEATURE, method, options=options).set_index("example_id")
    assert set(table.index[table["is_query"]]) >= set(queries["example_id"])
    examples = [LabelledExample(messages_from_json(text), 1) for text in queries["messages"]]
    row = int(queries["example_id"].iloc[0])
    others = options.changed(queries=tuple(examples[1:]))
    wanted = audit.rank(FEATURE, method, options=others).set_index("example_id")
    scale = wanted["score"].abs().max()
    assert table.loc[row, "score"] == pytest.approx(wanted.loc[row, "score"], rel=1e-3, abs=1e-4 * scale)
    inflated = audit.rank(FEATURE, method, options=options.changed(leave_out_own=False)).set_index("example_id")
    own, rest = table.index[table["is_query"]], ~table["is_query"]
    assert inflated.loc[own, "score"].mean() > table.loc[own, "score"].mean() + 1e-3 * scale
    close(table.loc[rest, "score"].sort_index(), inflated.loc[table.index[rest], "score"].sort_index(), 1e-3)
    assert inflated.loc[row, "is_query"]


@pytest.mark.parametrize("form", ["exact", "unit", "index"])
def test_token_influences_of_a_query_row_sum_to_its_score(audit, form):
    method, options = FORMS[form]
    row = int(strongest(audit)["example_id"].iloc[0])
    table = audit.rank(FEATURE, method, options=options).set_index("example_id")
    heatmap = audit.rows.influence_heatmaps(FEATURE, method, [row], options)[row]
    shown = sum(segment.value for turn in heatmap.turns for segment in turn) + heatmap.elsewhere
    exact = audit.rank(FEATURE, method, options=EXACT).set_index("example_id") if form == "index" else table
    scale = exact["score"].abs().max()
    assert shown == pytest.approx(exact.loc[row, "score"], rel=1e-3, abs=1e-3 * scale)


def test_query_rows_are_in_the_store_and_do_not_tell_rankings_apart(audit):
    options = InfluenceOptions.of(leave_out_own=False)
    found = audit.rankings.find(FEATURE, "bm25", options)
    assert len(found.request.parameters["query_rows"]) >= 8
    assert "leave_out_own" not in found.request.parameters
    audit.rank(FEATURE, "bm25")
    kept = audit.opened.read(
        lambda cursor: cursor.execute(
            "SELECT example_id, is_query, parameters FROM main.scores WHERE concept_id = ? AND method = 'bm25'",
            [FEATURE],
        ).df()
    )
    own = kept[kept["parameters"].map(lambda text: json.loads(text).get("leave_out_own", False))]
    assert set(own["example_id"][own["is_query"]]) == set(found.request.parameters["query_rows"])
    outside = LabelledExample((Message("user", "Hello"), Message("assistant", "red boat")), 1)
    asked = audit.rankings.find(FEATURE, "bm25", InfluenceOptions.of(queries=(outside,))).request.parameters
    assert "query_rows" not in asked and "leave_out_own" not in asked
