"""Chance that depends on names alone: the same draw in any order of the data, on any machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from heapq import nsmallest

import numpy as np


def uniform(key: str, seed: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) that depend on a key and a seed alone: float64."""
    return np.random.default_rng(int.from_bytes(_digest(key, seed), "big")).random(count)


def shuffled(keys: Sequence[str], seed: int) -> list[int]:
    """Places of the keys in an order that looks random; leaving keys out leaves the order of the rest."""
    return sorted(range(len(keys)), key=lambda place: _digest(keys[place], seed))


def first_shuffled(keys: Iterable[tuple[str, int]], seed: int, count: int) -> list[int]:
    """The numbers of the keys that come first in the order of `shuffled`; no more than `count` keys are held.

    Args:
        keys: each with a number.
    """
    return [number for _, number in nsmallest(count, keys, key=lambda pair: _digest(pair[0], seed))]


def _digest(key: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()
