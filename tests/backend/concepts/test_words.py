"""Words that tell texts apart: the formula against a loop, and what becomes a label."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from concept_audit.concepts.words import has_tokens, has_words, log_odds, telling_words, words_of


def test_log_odds_are_those_of_the_paper_word_by_word():
    rng = np.random.default_rng(0)
    inside, outside = rng.integers(0, 30, 25), rng.integers(0, 30, 25)
    prior = rng.uniform(0.01, 5, 25)
    found = log_odds(inside, outside, prior)
    n_in, n_out, alpha = int(inside.sum()), int(outside.sum()), float(prior.sum())
    for w in range(25):
        y_in, y_out, a = int(inside[w]), int(outside[w]), float(prior[w])
        odds_in = (y_in + a) / (n_in + alpha - y_in - a)
        odds_out = (y_out + a) / (n_out + alpha - y_out - a)
        delta = math.log(odds_in) - math.log(odds_out)
        deviation = math.sqrt(1 / (y_in + a) + 1 / (y_out + a))
        assert found.value[w] == pytest.approx(delta)
        assert found.z[w] == pytest.approx(delta / deviation)
        assert (found.low[w], found.high[w]) == pytest.approx(
            (delta - 1.959964 * deviation, delta + 1.959964 * deviation)
        )


def test_a_frequent_word_of_both_sides_is_no_label_and_a_telling_one_is():
    firing = [f"the Bank of the river {i}" for i in range(12)]
    other = [f"the city of the garden {i}" for i in range(12)]
    background = Counter(words_of(" ".join([*firing, *other] * 3)))
    taken = telling_words(firing, other, background)
    assert taken and set(taken) <= {"bank", "river"}


def test_words_are_added_only_where_they_tell_more():
    firing = ["a money x"] * 10 + ["b loan y"] * 10
    other = ["c tree"] * 20
    background = Counter(words_of(" ".join([*firing, *other])))
    taken = telling_words(firing, other, background)
    # "money" and "loan" together name all; a third word cannot tell more.
    assert len(taken) == 2 and all(has_words(text, taken) for text in firing)


def test_nothing_is_called_telling_where_the_sides_are_alike():
    texts = [f"word{i % 5} and more" for i in range(20)]
    assert telling_words(texts, texts, Counter(words_of(" ".join(texts)))) == []
    assert telling_words([], texts, Counter()) == []


def test_words_are_whole_and_tokens_may_be_parts():
    assert has_words("They RUN, don’t they?", ["don’t"]) and not has_words("running", ["run"])
    assert has_tokens("running", [" nin"]) and not has_tokens("running", ["", "  "])
    assert words_of("Über 12 Bäume_x") == ["über", "12", "bäume", "x"]
