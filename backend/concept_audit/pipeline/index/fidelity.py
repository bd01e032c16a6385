"""How faithful an index is: its scores against exact ones, for rows and concepts that its projection has not seen.

Some rows are held out: the projection learns from none of them, nor from a copy of one.
Half of them are scored; the other half are what the concepts come from, so that no row
is scored on a concept of its own. The concepts are of the kinds that people ask for; the
projection learns from such kinds as well, but from none of these. The curvature, which exact
scores and the index share, may have been fitted on any row. Where rows are preference pairs, concepts are asked for
on the chosen sides of some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from concept_audit.influence.fidelity import difference_of_means, fidelity
from concept_audit.influence.pairs import weighted_sequences
from concept_audit.influence.queries import NegatedConcept, Rows
from concept_audit.influence.scoring import score_rows_for_many
from concept_audit.influence.targets import Projection
from concept_audit.model.activations import response_activations
from concept_audit.model.block_groups import block_groups
from concept_audit.model.linear import linear_layers, n_weights
from concept_audit.model.load import LanguageModel
from concept_audit.model.memory import free_bytes, room_on
from concept_audit.model.pairs import sequences
from concept_audit.pipeline.index.query import OpenIndex, Target, index_scores
from concept_audit.pipeline.sampling import as_rows, chosen_sides, drawn_contents
from concept_audit.pipeline.sources import Sources
from concept_audit.progress import Progress
from concept_audit.sampling import shuffled
from concept_audit.store import features as store_features
from concept_audit.store import queries as store_queries
from concept_audit.store.examples import TokenizedExample
from concept_audit.store.shard_store import RowShards

SCORED_ROWS, SOURCE_ROWS = 64, 64
LEARNING_PARTS = 3
"""Where rows are few, the projection learns from this many times as many as are held out."""
LEAST_SCORED = 8
"""With fewer rows a rank correlation says nothing, and none is held out."""
SAE_CONCEPTS, ALL_CONCEPTS = 3, 6
QUERY_ROWS = 8
"""Query examples of a concept: as many as an SAE feature has by default."""
LEAST_FIRING = 2
"""Held-out rows in which a feature has to fire."""
QUERY_BYTES = 2 << 30
"""Of whole query gradients in memory at one time; one concept's of one block are always taken."""

COPY_SHARE = 0.4
"""Of the free memory, that a copy of the model in float32 may take."""


@dataclass(frozen=True)
class HeldOut:
    """Rows that the projection does not learn from.

    Attributes:
        scored: those that the index is checked on.
        sources: those that the concepts it is checked with come from.
    """

    scored: Sequence[TokenizedExample]
    sources: Sequence[TokenizedExample]

    @cached_property
    def content_hashes(self) -> frozenset[str]:
        """Of all of them."""
        return frozenset(row.content_hash for row in (*self.scored, *self.sources))


def hold_out(tokens: RowShards, seed: int) -> HeldOut:
    """Rows drawn by their content: `SCORED_ROWS` and `SOURCE_ROWS`, or a quarter of all that differ, if that is less."""
    parts = 1 + LEARNING_PARTS
    drawn = drawn_contents(tokens, parts * (SCORED_ROWS + SOURCE_ROWS), "held out", seed)
    held = drawn[: len(drawn) // parts]
    return HeldOut(held[::2], held[1::2]) if len(held) >= 2 * LEAST_SCORED else HeldOut((), ())


def measure_fidelity(sources: Sources, about: Mapping[str, Any], held: HeldOut, progress: Progress) -> dict[str, Any]:
    """Rank correlation and overlap with exact scores in float32, and what they were measured on.

    Args:
        about: the description of the index, whose rows are all there.

    Returns:
        as `fidelity`, its figures None where too few rows differ for any to be held out; and ``damping``,
        ``precision`` (of the exact scores), ``held_out`` (rows that the projection has not learned from),
        ``sae_directions`` and ``row_mean_differences`` (concepts of each kind).
    """
    measured = {"damping": about["damping"], "held_out": len(held.content_hashes)}
    measured |= {"precision": "float32", "sae_directions": 0, "row_mean_differences": 0}
    nothing = dict.fromkeys(("spearman", "spearman_least", "overlap", "overlap_least"))
    if not held.scored:
        return {"rows": 0, "concepts": 0, "top": 0, **nothing, **measured}
    with _exact_model(sources, about, progress) as exact:
        of_features = _sae_directions(sources, about, held)
        of_means = list(_row_mean_differences(exact, about, held, ALL_CONCEPTS - len(of_features)))
        targets = of_features + of_means
        truth = _exact_scores(sources, about, targets, as_rows([*held.scored]), exact, progress)
        measured |= {"sae_directions": len(of_features), "row_mean_differences": len(of_means)}
        measured["precision"] = str(exact.dtype).removeprefix("torch.")
    scores = index_scores(sources, about, targets, about["damping"], Progress())
    guess = scores[[row.example_id for row in held.scored]]
    there = np.isfinite(truth).all(1) & np.isfinite(guess).all(1)
    return {**fidelity(guess[there], truth[there]), **measured}


@contextmanager
def _exact_model(sources: Sources, about: Mapping[str, Any], progress: Progress) -> Iterator[LanguageModel]:
    """The model in float32, for the time being; as the index has it, where a copy in float32 finds no room."""
    lm = sources.model()
    there = torch.float32 in lm.copies
    try:
        if not (there or copy_has_room(lm)):
            raise MemoryError
        exact = lm.in_dtype(torch.float32)
    except (MemoryError, torch.OutOfMemoryError):
        progress.say(f"No room for the model in float32: the index is checked against scores in {about['precision']}")
        exact = lm.in_dtype(getattr(torch, about["precision"]))
    try:
        yield exact
    finally:
        if not there:
            lm.copies.pop(torch.float32, None)


def copy_has_room(lm: LanguageModel) -> bool:
    """Whether a model in float32 would take no more than `COPY_SHARE` of the free memory, or is there already."""
    narrow = sum(parameter.numel() for parameter in lm.model.parameters() if parameter.dtype != torch.float32)
    return 4 * narrow <= COPY_SHARE * free_bytes(lm.device)


def _exact_scores(
    sources: Sources,
    about: Mapping[str, Any],
    targets: Sequence[Target],
    rows: Rows,
    lm: LanguageModel,
    progress: Progress,
) -> np.ndarray:
    """Scores of rows, or pairs, with whole gradients and the curvature of the index: float64 [rows, targets].

    A score is a sum over layers: a few blocks at a time, and as many concepts with them as there is room for.
    """
    first, last = about["blocks"]
    layers = linear_layers(lm, first, last, about["weights"])
    opened = OpenIndex(sources, about, progress, lm.dtype)
    blocks = block_groups(layers, lambda layer: layer.d_in * layer.d_out, 0)
    widest = lm.dtype.itemsize * max(n_weights(group.layers) for group in blocks)
    room = room_on(lm.device, QUERY_BYTES)
    at_once = min(len(targets), max(1, room // widest))
    size = lm.dtype.itemsize * at_once
    groups = list(block_groups(layers, lambda layer: size * layer.d_in * layer.d_out, room))
    parts = weighted_sequences(rows, sources.beta)
    found = np.zeros((len(parts.rows), len(targets)))
    together = [range(start, min(start + at_once, len(targets))) for start in range(0, len(targets), at_once)]
    count = len(parts.rows)
    with progress.stage("Exact scores of rows held out", count * len(groups) * len(together)) as stage:
        for group in groups:
            for places in together:
                if all(targets[place].reach < group.layers[0].block for place in places):
                    stage.advance(count)
                    continue
                # Zero in the layers that a concept does not reach.
                shapes = [(len(places), layer.d_out, layer.d_in) for layer in group.layers]
                queries = [torch.zeros(shape, dtype=lm.dtype, device=lm.device) for shape in shapes]
                for column, place in enumerate(places):
                    for layer, dense in zip(
                        queries, opened.solved(targets[place], about["damping"], group), strict=True
                    ):
                        layer[column] = dense
                found[:, places] += score_rows_for_many(
                    lm, group.layers, queries, parts.rows, say=progress.say, advance=stage.advance
                )
    return parts.summed(found)


def _sae_directions(sources: Sources, about: Mapping[str, Any], held: HeldOut) -> list[Target]:
    """Decoder directions of SAE features drawn at random, each on the held-out rows in which it fires highest."""
    rows = {row.example_id: row for row in held.sources}
    targets: list[Target] = []
    for feature, where in checked_features(sources, about, held):
        concept = sources.read(partial(store_queries.concept, wanted=f"sae:{feature}"))
        targets.append(_target(concept.layer, concept.direction, [rows[i] for i in where]))
    return targets


def checked_features(sources: Sources, about: Mapping[str, Any], held: HeldOut) -> list[tuple[int, list[int]]]:
    """SAE features that the index is checked with, and the held-out rows that they are asked for on.

    The projection learns from none of them.
    """
    rows = [row.example_id for row in held.sources]
    firings = sources.read(lambda cursor: store_features.firings_in(cursor, rows))
    firing = [feature for feature, where in firings.items() if len(where) >= LEAST_FIRING]
    order = shuffled([f"feature {feature}" for feature in firing], about["seed"])
    chosen = [firing[place] for place in order[:SAE_CONCEPTS]]
    layers = {layer for layer, _ in sources.read(partial(store_features.decoder_directions, features=chosen)).values()}
    if any(layer > about["blocks"][1] for layer in layers):
        return []
    return [(feature, firings[feature][:QUERY_ROWS]) for feature in chosen]


def _row_mean_differences(lm: LanguageModel, about: Mapping[str, Any], held: HeldOut, count: int) -> Iterator[Target]:
    """Directions as probes find them: some held-out rows that are alike, against the others."""
    rows, layers = as_rows([*held.sources]), about["layers"]
    parts = sequences(rows.ids, rows.response)
    means = {layer: np.zeros((len(rows), lm.d_model), np.float32) for layer in layers}
    for batch in response_activations(lm, parts.ids, parts.response, layers):
        for found in batch:
            for layer, mean in found.mean.items():
                # Of a pair the difference of its sides, as the audit keeps it.
                means[layer][parts.owner[found.index]] += parts.sign[found.index] * mean
    size = min(QUERY_ROWS, len(rows) // 2)
    order = shuffled([row.content_hash for row in held.sources], about["seed"])
    for place in range(count):
        layer, seed_row = layers[place % len(layers)], order[place % len(order)]
        alike, direction = difference_of_means(means[layer], seed_row, size)
        yield _target(layer, direction, [held.sources[i] for i in alike])


def _target(layer: int, direction: np.ndarray, queries: Sequence[TokenizedExample]) -> Target:
    quantity = NegatedConcept(Projection(layer, direction))
    return Target(quantity, chosen_sides([*queries]), [1 / len(queries)] * len(queries), layer)
