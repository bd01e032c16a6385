"""The methods without gradients."""

from __future__ import annotations

import math
import random

import bm25s
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
    assert bm25(lambda: [rows[:2], rows[2:]], ["cat", "dog far unheard"]) == pytest.approx(wanted, rel=1e-5)
    assert bm25(lambda: [["", ""]], ["cat"]).tolist() == [0, 0]
    assert bm25(lambda: [rows], ["???"]).tolist() == [0, 0, 0]


def test_bm25_equals_the_librarys():
    chance = random.Random(3)
    words = [f"{letter}{n}" for letter in "aäé_" for n in range(6)] + ["don't", "CAPS"]
    rows = [" ".join(chance.choices(words, k=chance.randrange(12))) for _ in range(80)]
    asked = [" ".join(chance.choices([*words, "unheard"], k=7)) for _ in range(5)]
    split = {"stopwords": [], "show_progress": False, "token_pattern": r"(?u)\b\w+\b"}
    index = bm25s.BM25(method="lucene")
    tokens = bm25s.tokenize(rows, **split)
    index.index(tokens, show_progress=False)
    expected = np.mean(
        [
            index.get_scores([word for word in query if word in tokens.vocab])
            for query in bm25s.tokenize(asked, return_ids=False, **split)
        ],
        axis=0,
    )
    found = bm25(lambda: (rows[i : i + 7] for i in range(0, 80, 7)), asked)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.min() == 0 < found.max()
