"""Chance that depends on names alone."""

from __future__ import annotations

import pytest

from concept_audit.sampling import first_shuffled, shuffled

KEYS = [f"row {n % 37}" for n in range(60)]


@pytest.mark.parametrize("count", [0, 1, 9, 60, 100])
def test_the_first_in_a_random_order_are_those_of_the_whole_order(count):
    keys = ((key, number) for number, key in enumerate(KEYS))
    assert first_shuffled(keys, 5, count) == shuffled(KEYS, 5)[:count]
