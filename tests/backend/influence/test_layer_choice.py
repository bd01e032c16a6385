"""Layers whose scores stand for those of all: what is chosen, when it ends, and what it never leaves out."""

import numpy as np
import pytest

from concept_audit.influence.layer_choice import LEAST_ROWS, choose_layers

ROWS, CONCEPTS = 80, 6


@pytest.fixture
def draws():
    return np.random.default_rng(3)


def everything(scores) -> np.ndarray:
    return np.ones(scores.shape[1:], bool)


def correlation(scores, places) -> np.ndarray:
    """Of each concept, by NumPy: [concepts]."""
    part, whole = scores[places].sum(0), scores.sum(0)
    return np.array([np.corrcoef(part[:, i], whole[:, i])[0, 1] for i in range(part.shape[1])])


def test_layers_that_say_the_same_are_not_taken_twice(draws):
    """Five layers carry a shared term, one of them alone almost without noise."""
    shared = draws.normal(size=(ROWS, CONCEPTS))
    scores = np.stack([shared + noise * draws.normal(size=shared.shape) for noise in (0.8, 0.9, 0.02, 1.0, 0.7)])
    choice = choose_layers(scores, np.full(CONCEPTS, 8), 0.9, everything(scores))
    assert choice.places == [2]
    assert choice.agreement == pytest.approx(correlation(scores, [2]).mean())


def test_it_goes_on_until_every_kind_of_concept_agrees(draws):
    """Concepts of the second kind live in one layer alone, which says nothing of the others."""
    shared = draws.normal(size=(ROWS, CONCEPTS))
    scores = np.stack([shared + 0.05 * draws.normal(size=shared.shape) for _ in range(4)])
    kinds = np.array([8, 8, 8, 8, 8, 16])
    scores[:, :, 5] = 0
    scores[3, :, 5] = draws.normal(size=ROWS)
    choice = choose_layers(scores, kinds, 0.95, everything(scores))
    assert 3 in choice.places and len(choice.places) < 4
    assert choice.agreement >= 0.95
    assert correlation(scores, choice.places)[5] == pytest.approx(1)


def test_factors_make_up_for_what_is_left_out(draws):
    shared = draws.normal(size=(ROWS, CONCEPTS))
    weights = np.array([1.0, 2.0, 5.0])
    scores = weights[:, None, None] * shared
    kinds = np.array([4, 4, 4, 8, 8, 8])
    scores[0][:, 3:] *= 3
    choice = choose_layers(scores, kinds, 0.9, everything(scores))
    (place,) = choice.places
    part = scores[place]
    for kind in (4, 8):
        mine = kinds == kind
        np.testing.assert_allclose(choice.factors[kind] * part[:, mine], scores.sum(0)[:, mine])


def test_pairs_that_do_not_count_change_nothing(draws):
    shared = draws.normal(size=(ROWS, CONCEPTS))
    scores = np.stack([shared + noise * draws.normal(size=shared.shape) for noise in (0.5, 0.4, 0.3)])
    counted = everything(scores)
    counted[:CONCEPTS, :][np.eye(CONCEPTS, dtype=bool)] = False
    wild = scores.copy()
    wild[0][~counted] = 1e6
    wild[1][~counted] = np.nan
    kinds = np.full(CONCEPTS, 2)
    found = choose_layers(wild, kinds, 0.97, counted)
    without = choose_layers(np.where(counted, scores, 0), kinds, 0.97, counted)
    assert found == without


@pytest.mark.parametrize("agreement", [1.0, 0.9])
def test_all_layers_where_that_is_asked_or_nothing_can_be_told(draws, agreement):
    rows = ROWS if agreement == 1 else LEAST_ROWS - 1
    scores = draws.normal(size=(4, rows, CONCEPTS))
    choice = choose_layers(scores, np.zeros(CONCEPTS), agreement, everything(scores))
    assert (choice.places, choice.agreement, choice.factors) == ([0, 1, 2, 3], 1.0, {})


def test_concepts_that_tell_no_rows_apart_choose_nothing(draws):
    scores = np.zeros((3, ROWS, CONCEPTS))
    assert choose_layers(scores, np.zeros(CONCEPTS), 0.9, everything(scores)).places == [0, 1, 2]
    scores[1] = draws.normal(size=(ROWS, CONCEPTS))
    scores[:, :, 0] = 7.0  # constant over rows
    assert choose_layers(scores, np.zeros(CONCEPTS), 0.9, everything(scores)).places == [1]
