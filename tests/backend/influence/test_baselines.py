"""The methods without gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest

from concept_audit.influence.baselines import activation_similarity, bm25, projection_difference


def test_projection_difference_is_what_the_row_has_beyond_the_models_own_answer():
    found = projection_difference(np.array([[3.0], [1.0], [np.nan]]), np.array([[1.0], [np.nan], [0.0]]))
    assert found[0] == 2 and np.isnan(found[1:]).all()


def test_activation_similarity_is_the_cosine_with_the_mean_query():
    rows = np.array([[2.0, 0, 0], [0, 3, 0], [1, 1, 0], [np.nan] * 3], np.float32)
    queries = np.array([[1.0, 0, 0], [1, 2, 0]], np.float32)
    found = activation_similarity([rows[:2], rows[2:]], queries)
    assert found[:3] == pytest.approx([math.sqrt(0.5), math.sqrt(0.5), 1.0]) and np.isnan(found[3])


def test_bm25_is_lucenes_formula_averaged_over_the_queries():
    rows = ["the cat sat", "a dog ran far away", "Cat cat dog"]
    k1, b, mean = 1.5, 0.75, (3 + 5 + 3) / 3

    def term(count: int, length: int, having: int) -> float:
        idf = math.log(1 + (len(rows) - having + 0.5) / (having + 0.5))
        return idf * count / (count + k1 * (1 - b + b * length / mean))

    wanted = [(term(1, 3, 2) + 0) / 2, (0 + term(1, 5, 2) + term(1, 5, 1)) / 2, (term(2, 3, 2) + term(1, 3, 2)) / 2]
    assert bm25(rows, ["cat", "dog far unheard"]) == pytest.approx(wanted, rel=1e-5)
    assert bm25(["", ""], ["cat"]).tolist() == [0, 0]
    assert bm25(rows, ["???"]).tolist() == [0, 0, 0]
