"""Chance that depends on names alone: the same draw in any order of the data, on any machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def uniform(key: str, seed: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) that depend on a key and a seed alone: float64."""
    return np.random.default_rng(int.from_bytes(_digest(key, seed), "big")).random(count)


def shuffled(keys: Sequence[str], seed: int) -> list[int]:
    """Places of the keys in an order that looks random; leaving keys out leaves the order of the rest."""
    return sorted(range(len(keys)), key=lambda place: _digest(keys[place], seed))


def _digest(key: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()
