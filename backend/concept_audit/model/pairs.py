"""Preference pairs as tokens: a row that is two sequences, with a separator between them.

Whatever runs the model on rows takes them apart with `sequences`, and puts what it found of the two sides
together again. A row that is no pair is a single sequence, and comes out as it went in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from concept_audit.types import SEPARATOR


@dataclass(frozen=True)
class Sequences:
    """What the model reads of rows.

    Attributes:
        ids, response: one int array and one bool array [tokens] a sequence.
        owner: int64 [sequences], the row that each is of; a pair's chosen side comes before its rejected one.
        sign: int64 [sequences], 1, and -1 for rejected sides.
        paired: bool [sequences], whether it is a side of a pair.
    """

    ids: list[np.ndarray]
    response: list[np.ndarray]
    owner: np.ndarray
    sign: np.ndarray
    paired: np.ndarray


def separator(ids: np.ndarray) -> int | None:
    """Where the separator of a row's tokens lies; None if the row is no pair."""
    found = np.flatnonzero(ids == SEPARATOR)
    return int(found[0]) if len(found) else None


def exchanged(ids: np.ndarray, response: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A pair's tokens and response mask with its sides exchanged."""
    place = separator(ids)
    assert place is not None, "only a pair has sides"
    sides = ((part[place + 1 :], part[place : place + 1], part[:place]) for part in (ids, response))
    tokens, mask = (np.concatenate(parts) for parts in sides)
    return tokens, mask


def sequences(ids: Sequence[np.ndarray], response: Sequence[np.ndarray]) -> Sequences:
    """Rows taken apart.

    Args:
        ids: one int array [tokens] a row, a pair's with a separator.
        response: one bool array [tokens] a row.
    """
    made: list[tuple[np.ndarray, np.ndarray, int, int, bool]] = []
    for row, (tokens, mask) in enumerate(zip(ids, response, strict=True)):
        place = separator(tokens)
        if place is None:
            made.append((tokens, mask, row, 1, False))
        else:
            made.append((tokens[:place], mask[:place], row, 1, True))
            made.append((tokens[place + 1 :], mask[place + 1 :], row, -1, True))
    columns = list(zip(*made, strict=True)) if made else [(), (), (), (), ()]
    owner, sign = np.array(columns[2], np.int64), np.array(columns[3], np.int64)
    return Sequences(list(columns[0]), list(columns[1]), owner, sign, np.array(columns[4], bool))
