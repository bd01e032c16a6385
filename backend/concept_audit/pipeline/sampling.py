"""Samples of the rows: chosen by content, so the same in any order of the data."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import accumulate
from typing import Any

import numpy as np

from concept_audit.influence.queries import Rows
from concept_audit.model.pairs import Sequences, sequences
from concept_audit.sampling import uniform
from concept_audit.store.examples import TokenizedExample, has_loss, read_tokens
from concept_audit.store.shard_store import RowShards
from concept_audit.types import PROMPT


def drawn_rows(
    tokens: RowShards, count: int, salt: str, seed: int, without: Collection[str] = ()
) -> list[TokenizedExample]:
    """At most `count` of the rows that have a loss, drawn with a salt and a seed.

    Args:
        without: content hashes of rows that are left out, and so are their copies.
    """
    return _least(
        tokens,
        lambda row: _draw(row, salt, seed) if has_loss(row) and row.content_hash not in without else None,
        lambda rows: count,
    )


def drawn_contents(tokens: RowShards, count: int, salt: str, seed: int) -> list[TokenizedExample]:
    """As `drawn_rows`, but of rows with the same content one alone."""
    kept: dict[str, tuple[float, TokenizedExample]] = {}
    for number in tokens.numbers():
        for row in read_tokens(tokens, number):
            if has_loss(row) and row.content_hash not in kept:
                kept[row.content_hash] = (_draw(row, salt, seed), row)
        kept = dict(sorted(kept.items(), key=lambda item: item[1][0])[:count])
    return [row for _, row in kept.values()]


def rows_with_tokens(tokens: RowShards, total: int) -> list[TokenizedExample]:
    """Rows with `total` tokens together, those of the smallest content hashes; copies of a row count once."""

    def enough(rows: list[TokenizedExample]) -> int:
        sums = accumulate(len(row.input_ids) for row in rows)
        return next((place + 1 for place, tokens in enumerate(sums) if tokens >= total), len(rows))

    found = _least(tokens, lambda row: row.content_hash if (row.parts != PROMPT).any() else None, enough)
    # Copies of a row would draw the same labels.
    return list({row.content_hash: row for row in found}.values())


def as_rows(rows: list[TokenizedExample]) -> Rows:
    """Rows of a shard as the influence engine takes them."""
    return Rows([row.input_ids for row in rows], [row.parts != PROMPT for row in rows])


def as_sequences(rows: list[TokenizedExample]) -> Rows:
    """As `as_rows`, with preference pairs taken apart into their sides."""
    parts = _taken_apart(rows)
    return Rows(parts.ids, parts.response)


def chosen_sides(rows: list[TokenizedExample]) -> Rows:
    """As `as_rows`, of preference pairs their chosen sides: as query examples, which are single sequences."""
    parts = _taken_apart(rows)
    return _some(parts, parts.sign > 0)


def drawn_sides(rows: list[TokenizedExample], seed: int) -> Rows:
    """As `as_rows`, of preference pairs one side each, drawn by content: what is asked for may be like either."""
    parts = _taken_apart(rows)
    rejected = np.array([_draw(row, "side", seed) < 0.5 for row in rows], bool)
    return _some(parts, ~parts.paired | ((parts.sign < 0) == rejected[parts.owner]))


def _taken_apart(rows: list[TokenizedExample]) -> Sequences:
    return sequences([row.input_ids for row in rows], [row.parts != PROMPT for row in rows])


def _some(parts: Sequences, wanted: np.ndarray) -> Rows:
    places = np.flatnonzero(wanted)
    return Rows([parts.ids[i] for i in places], [parts.response[i] for i in places])


def _draw(row: TokenizedExample, salt: str, seed: int) -> float:
    return float(uniform(row.content_hash + salt, seed, 1)[0])


def _least(
    tokens: RowShards, order: Callable[[TokenizedExample], Any], enough: Callable[[list[TokenizedExample]], int]
) -> list[TokenizedExample]:
    """The first rows in an order, one shard in memory at a time.

    Args:
        order: where a row stands; None for a row that is left out.
        enough: how many of the rows, which are in order, are wanted.
    """
    kept: list[tuple[Any, TokenizedExample]] = []
    for number in tokens.numbers():
        kept += [(place, row) for row in read_tokens(tokens, number) if (place := order(row)) is not None]
        kept.sort(key=lambda pair: pair[0])
        del kept[enough([row for _, row in kept]) :]
    return [row for _, row in kept]
