"""Symmetric matrices as what is on and above their diagonal, in strips: nine sixteenths of their numbers."""

from __future__ import annotations

from itertools import pairwise

import torch

STRIPS = 8
"""More would save little: of two matrices, one is saved but for a share of 1 / STRIPS."""


def upper(matrix: torch.Tensor) -> torch.Tensor:
    """Of a symmetric matrix [n, n] the strips of rows, each from the diagonal on: one vector."""
    return torch.cat([matrix[a:b, a:].flatten() for a, b in _edges(len(matrix))])


def from_upper(numbers: torch.Tensor, n: int) -> torch.Tensor:
    """The symmetric matrix [n, n] of which these are the `upper` strips."""
    found = numbers.new_empty(n, n)
    start = 0
    for a, b in _edges(n):
        strip = numbers[start : (start := start + (b - a) * (n - a))].view(b - a, n - a)
        found[a:b, a:] = strip
        found[a:, a:b] = strip.T
    return found


def _edges(n: int) -> list[tuple[int, int]]:
    return list(pairwise(n * i // STRIPS for i in range(STRIPS + 1)))
