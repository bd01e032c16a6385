"""What the projection of an index learns from: concepts of the kinds that people ask for, beside random ones.

A third of the rows are asked for the decoder direction of an SAE feature that fires in the row higher than in most
others; a third for a difference of row means as a probe finds it, the row being among those that are alike. The
others, and those for which there is no such direction, are asked for one drawn at random, so that no kind of concept
is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial

import numpy as np

from concept_audit.influence.fidelity import difference_of_means
from concept_audit.influence.learning import Directions
from concept_audit.pipeline.index.fidelity import LEAST_FIRING, QUERY_ROWS
from concept_audit.pipeline.sources import Sources
from concept_audit.store import features as store_features
from concept_audit.store.activations import means_of
from concept_audit.store.examples import TokenizedExample

FEATURE, MEANS, KINDS = 0, 1, 3


def asked_directions(
    sources: Sources, rows: Sequence[TokenizedExample], layers: Sequence[int], seed: int, besides: Collection[int]
) -> Directions:
    """Directions that rows are asked for, at each layer where concepts may live.

    Args:
        rows: what the projection learns on; a row may come more than once.
        seed: of what is drawn.
        besides: SAE features that are left out, since the index is checked with them.
    """
    draws = np.random.default_rng([seed, len(rows)])
    kinds = draws.permutation(len(rows)) % KINDS
    differing = {row.content_hash: row.example_id for row in rows}
    places = {content_hash: place for place, content_hash in enumerate(differing)}
    place = np.array([places[row.content_hash] for row in rows], np.int64)
    examples = list(differing.values())
    found = {layer: np.full((len(rows), sources.model().d_model), np.nan, np.float32) for layer in layers}
    for i, layer, direction in _of_features(sources, examples, place, kinds == FEATURE, draws, besides):
        if layer in found:
            found[layer][i] = direction
    for layer in set(layers) & set(sources.layers):  # of other layers the audit keeps no means
        for i, direction in _of_means(sources, examples, place, kinds == MEANS, layer):
            found[layer][i] = direction
    return found


def _of_features(
    sources: Sources,
    examples: Sequence[int],
    place: np.ndarray,
    asked: np.ndarray,
    draws: np.random.Generator,
    besides: Collection[int],
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Row, layer and direction of a feature for each row that is asked for one and has one."""
    firings = sources.read(partial(store_features.firings_in, example_ids=examples))
    there = {example_id: number for number, example_id in enumerate(examples)}
    of_row: list[list[int]] = [[] for _ in examples]
    for feature, where in firings.items():
        if feature not in besides and len(where) >= LEAST_FIRING:
            for example_id in where[:QUERY_ROWS]:
                of_row[there[example_id]].append(feature)
    chosen = {
        int(i): of_row[place[i]][draws.integers(len(of_row[place[i]]))]
        for i in np.flatnonzero(asked)
        if of_row[place[i]]
    }
    directions = sources.read(partial(store_features.decoder_directions, features=sorted(set(chosen.values()))))
    for i, feature in chosen.items():
        layer, direction = directions[feature]
        yield i, layer, direction


def _of_means(
    sources: Sources, examples: Sequence[int], place: np.ndarray, asked: np.ndarray, layer: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Row and direction of a difference of means for each row that is asked for one."""
    means = means_of(sources.shards("activations"), layer, examples)
    size = min(QUERY_ROWS, len(examples) // 2)
    known: dict[int, np.ndarray] = {}
    for i in np.flatnonzero(asked) if size else ():
        mine = int(place[i])
        if mine not in known:
            known[mine] = difference_of_means(means, mine, size)[1]
        if known[mine].any():
            yield int(i), known[mine]
