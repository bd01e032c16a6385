"""Putting queries to a gradient index: one backward pass, a projection, and a sweep of the rows' codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from concept_audit.errors import ConceptError, StoreError
from concept_audit.influence.fitting import Fisher
from concept_audit.influence.many_queries import (
    compress_concepts,
    compress_each,
    distinct_rows,
    parts_of_at_most,
    sharing,
)
from concept_audit.influence.own_queries import OwnQueries, by_sign, left_out, summed
from concept_audit.influence.projection import LayerProjection, compress_query
from concept_audit.influence.queries import Gradients, NegatedConcept, PreparedQueries, Quantity, Rows, query_gradient
from concept_audit.influence.reduced_query import GROUP_BYTES, ReducedQuery, solved_by_blocks, solved_group
from concept_audit.influence.targets import Projection
from concept_audit.influence.wide import wide_form
from concept_audit.model.block_groups import LayerGroup, block_groups
from concept_audit.model.budgets import gradient_tokens_per_batch, large_tokens_per_batch
from concept_audit.model.linear import LinearLayer, linear_layers
from concept_audit.model.memory import room_on
from concept_audit.pipeline.curvature import CurvatureFit, curvature_of, fit_curvature
from concept_audit.pipeline.index.codes import Codes, factor_at, kept_layers, kind_factors
from concept_audit.pipeline.own_queries import own_influence
from concept_audit.pipeline.sources import Sources
from concept_audit.progress import Progress
from concept_audit.store.index import IndexFiles, present_index, products, sweep
from concept_audit.store.shard_store import read_tensors

QUERIES_AT_ONCE = 1024
"""Of several concepts, whose numbers are in memory together: 128 MiB with the usual 32,768."""


@dataclass(frozen=True)
class Target:
    """A query that is to be put to the index.

    Attributes:
        quantity: what of the query examples is differentiated.
        queries: the query examples as tokens.
        weights: of the query examples.
        reach: the deepest block that the quantity depends on.
        own: the queries that are rows, which are scored without them; None for every row by all queries.
    """

    quantity: Quantity
    queries: Rows
    weights: Sequence[float]
    reach: int
    own: OwnQueries | None = None


def index_scores(
    sources: Sources, about: Mapping[str, Any], targets: Sequence[Target], damping: float, progress: Progress
) -> np.ndarray:
    """Influence of every row on several concepts, in one sweep of the index.

    Args:
        about: the index's description.

    Returns:
        float64 [rows, targets]; NaN where a row has no loss.

    Raises:
        ConceptError: a target has no gradient in the weights of the index.
    """
    opened = OpenIndex(sources, about, progress)
    many = len(targets) > 1
    named = "Gradients of the concepts" if many else "Gradient of the concept on its queries"
    asked = sum(len(target.queries) for target in targets)
    with progress.stage(named, asked, "queries") as stage:
        columns = opened.compressed_together(targets, damping, stage.advance)
    codes = Codes.read(opened.files)
    queries, offsets = codes.queries([column.whole for column in columns])
    paths = opened.files.paths()
    blocks = []
    with progress.stage("Reading the index", len(paths), "shards") as stage:
        for block in sweep(paths, queries, codes.packing, offsets, sources.model().device):
            blocks.append(block)
            stage.advance()
    scores = np.concatenate(blocks)
    for place, (target, column) in enumerate(zip(targets, columns, strict=True)):
        if target.own is not None:
            for rows, without in zip(target.own.rows, column.own, strict=True):
                mine, offset = codes.queries([without])
                scores[list(rows), place] = products(opened.files, rows, mine, codes.packing, offset)[:, 0]
    return scores * [opened.factor(target) for target in targets]


def solved_query(
    sources: Sources,
    about: Mapping[str, Any],
    target: Target,
    damping: float,
    unit_normalised: bool,
    progress: Progress,
) -> tuple[ReducedQuery, dict[str, torch.Tensor]]:
    """A target's query with the curvature of the index, and the influence of rows that are queries.

    Returns:
        (H + λI)⁻¹ of the gradient, and what `own_influence` gives; empty without such rows.
    """
    opened = OpenIndex(sources, about, progress)
    with progress.stage("Applying the curvature to the whole query") as stage:
        parts: list[tuple[Rows, Sequence[float]]] = [(target.queries, target.weights)]
        if target.own is not None:
            parts = [(queries, weights) for queries, weights, _ in by_sign(target.queries, target.weights)]
        query, solved = opened.reduced(target, parts, damping, lambda: stage.advance(0))
    if target.own is None:
        return query, {}
    own = opened.own(target, solved, damping, unit_normalised, progress)
    return query, own


def warm_index(sources: Sources, about: Mapping[str, Any]) -> None:
    """Make the copy of the model that queries are differentiated on, and put one small query to it."""
    opened = OpenIndex(sources, about, Progress())
    ids = np.arange(1, 17)
    deepest = about["blocks"][1]
    quantity = NegatedConcept(Projection(deepest, np.ones(sources.model().d_model, np.float32)))
    opened.compressed(Target(quantity, Rows([ids], [ids > 4]), [1.0], deepest), about["damping"])


@dataclass(frozen=True)
class Compressed:
    """A target as the index takes it.

    Attributes:
        whole: float32 [numbers of the blocks that it reaches].
        own: of each text of `Target.own`, the same without that query.
    """

    whole: np.ndarray
    own: Sequence[np.ndarray] = ()


class OpenIndex:
    """A finished projection, to put queries to.

    Args:
        about: the index's description.
        precision: in which queries are differentiated; None for that of the index.
    """

    def __init__(
        self, sources: Sources, about: Mapping[str, Any], progress: Progress, precision: torch.dtype | None = None
    ):
        lm = sources.model()
        files = present_index(sources.layout, sources.shards("tokens").partition)
        assert files is not None, "an index that has a description has files"
        self.files = files
        self._sources = sources
        self._lm = lm.in_dtype(precision or getattr(torch, about["precision"]))
        first, last = about["blocks"]
        self._layers = linear_layers(self._lm, first, last, about["weights"], partial=True)
        if about.get("wide_sides") != wide_form(self._layers):
            root = sources.layout.root
            raise StoreError(
                f"{root}: the gradient index is of a version that kept the curvature of wide layers in another form; "
                f"build it again with `concept-audit index {root} --replace`, or rank with --exact"
            )
        fit = CurvatureFit(
            Fisher(about["fisher"], about["seed"]), about["curvature_tokens"], about["weights"], about["precision"]
        )
        curvature = fit_curvature(sources, lm, fit, range(first, last + 1), progress)
        self._curvatures = curvature_of(curvature, self._layers, "ekfac", lm.device)
        self._kept, self._factors = kept_layers(files, len(self._layers)), kind_factors(files)

    def reached(self, target: Target) -> list[LinearLayer]:
        """The tracked layers that a target reaches, the first of them."""
        return [layer for layer in self._layers if layer.block <= target.reach]

    def factor(self, target: Target) -> float:
        """What a target's products with the rows' numbers are multiplied with, for the layers that are left out."""
        return factor_at(self._factors, target.reach if isinstance(target.quantity, NegatedConcept) else None)

    def _kept_within(self, reach: int) -> LayerGroup:
        """The layers whose numbers the index keeps, up to a block."""
        return LayerGroup.of(self._layers, [place for place in self._kept if self._layers[place].block <= reach])

    def compressed(self, target: Target, damping: float) -> Compressed:
        """A target as the index takes it.

        Raises:
            ConceptError: it has no gradient in the weights of the index.
        """
        found = Compressed(self._compressed(target, damping)) if target.own is None else self._by_own(target, damping)
        if not found.whole.any():
            raise ConceptError(
                "the concept has no gradient on its query examples (an SAE feature's activation has none where it "
                "does not fire); choose other queries, or --target direction"
            )
        return found

    def compressed_together(
        self, targets: Sequence[Target], damping: float, advance: Callable[[int], None] = lambda queries: None
    ) -> list[Compressed]:
        """As `compressed`, of each target: concepts at one layer share the forward passes of their queries.

        Args:
            advance: told the number of queries as they are done.

        Raises:
            ConceptError: a target has no gradient in the weights of the index.
        """
        found: dict[int, Compressed] = {}
        for layer, places in _by_layer(targets).items():
            for part in parts_of_at_most(QUERIES_AT_ONCE, places, [len(targets[i].queries) for i in places]):
                found |= zip(part, self._at_layer(layer, [targets[i] for i in part], damping, advance), strict=True)
        for place, target in enumerate(targets):
            if place not in found:
                found[place] = self.compressed(target, damping)
                advance(len(target.queries))
            elif not np.isfinite(found[place].whole).all() or not found[place].whole.any():
                found[place] = self.compressed(target, damping)  # says what is wrong with it
        return [found[place] for place in range(len(targets))]

    def _at_layer(
        self, layer: int, targets: Sequence[Target], damping: float, advance: Callable[[int], None]
    ) -> list[Compressed]:
        """Targets that are directions at one layer."""
        rows, asked, places = distinct_rows([target.queries for target in targets])
        kept = self._kept_within(layer)
        numbers = compress_concepts(
            self._lm,
            kept.layers,
            layer,
            torch.from_numpy(np.stack([v for target in targets if (v := _direction(target)) is not None])),
            rows,
            asked,
            kept.within(self._curvatures),
            kept.within(self._reader()),
            damping,
            advance=advance,
        )
        wide = [each.cpu().double().numpy() for each in numbers]
        return [
            Compressed(*summed(target.queries, target.weights, target.own, [wide[row][turn] for row, turn in mine]))
            for target, mine in zip(targets, places, strict=True)
        ]

    def own(
        self,
        target: Target,
        solved: Sequence[PreparedQueries],
        damping: float,
        unit_normalised: bool,
        progress: Progress,
    ) -> dict[str, torch.Tensor]:
        """Exact influence of the rows that are queries, by the other queries; see `own_influence`."""
        assert target.own is not None, "there are such rows"
        return own_influence(
            self._sources,
            self._lm,
            self.reached(target),
            solved,
            target.quantity,
            target.queries,
            target.own,
            self._curvatures,
            damping,
            unit_normalised,
            progress,
        )

    def _compressed(self, target: Target, damping: float) -> np.ndarray:
        found, size = [], self._lm.wide_dtype.itemsize
        kept = self._kept_within(target.reach)
        of_curvature, of_projection = kept.within(self._curvatures), kept.within(self._reader())
        room = room_on(self._lm.device, GROUP_BYTES)
        for group in block_groups(kept.layers, lambda layer: size * layer.d_in * layer.d_out, room):
            gradients = query_gradient(
                self._lm,
                group.layers,
                target.quantity,
                target.queries,
                target.weights,
                large_tokens_per_batch(self._lm),
            )
            curvatures, projections = group.within(of_curvature), group.within(of_projection)
            found.append(compress_query(gradients, curvatures, projections, damping, self._lm.dtype).cpu().numpy())
        return np.concatenate(found)

    def _by_own(self, target: Target, damping: float) -> Compressed:
        """Queries that are rows one by one, the others of each sign together."""
        own, queries = target.own, target.queries
        assert own is not None, "there are such queries"
        kept = self._kept_within(target.reach)
        of_curvature, of_projection = kept.within(self._curvatures), kept.within(self._reader())
        texts = Rows([queries.ids[i] for i in own.places], [queries.response[i] for i in own.places])
        each = compress_each(
            self._lm,
            kept.layers,
            target.quantity,
            texts,
            of_curvature,
            of_projection,
            damping,
            large_tokens_per_batch(self._lm),
        )
        alone = each.cpu().double().numpy()
        totals = []
        for part, weights, places in by_sign(queries, target.weights):
            total = np.zeros(alone.shape[1])
            rest = [i for i, place in enumerate(places) if own.of[place] < 0]
            for place, weight in zip(places, weights, strict=True):
                if own.of[place] >= 0:
                    total += weight * alone[own.of[place]]
            if rest:
                others = Rows([part.ids[i] for i in rest], [part.response[i] for i in rest])
                total += self._compressed(
                    replace(target, queries=others, weights=[weights[i] for i in rest], own=None), damping
                )
            totals.append(total)
        without = [left_out(totals, one, shares) for one, shares in zip(alone, own.shares, strict=True)]
        return Compressed(np.sum(totals, axis=0).astype(np.float32), [vector.astype(np.float32) for vector in without])

    def _reader(self) -> Callable[[int], LayerProjection]:
        return projection_reader(self.files, self._layers, self._lm.device)

    def reduced(
        self, target: Target, parts: Sequence[tuple[Rows, Sequence[float]]], damping: float, step: Callable[[], None]
    ) -> tuple[ReducedQuery, list[ReducedQuery]]:
        """(H + λI)⁻¹ of a target's gradient, and of each part of its queries; see `solved_by_blocks`."""
        lm, layers = self._lm, self.reached(target)
        # In batches of the usual size: between two of them this work steps back for somebody who waits.
        budget = gradient_tokens_per_batch(lm)
        quantity = target.quantity
        return solved_by_blocks(lm, layers, quantity, parts, self._curvatures, damping, lm.wide_dtype, budget, step)

    def solved(self, target: Target, damping: float, group: LayerGroup | None = None) -> Gradients:
        """(H + λI)⁻¹ of a target's gradient, whole, in some blocks or in all that it reaches."""
        layers = self.reached(target)
        group = LayerGroup.of(layers, range(len(layers))) if group is None else group
        part = target.queries, target.weights
        return solved_group(
            self._lm, group, target.quantity, part, self._curvatures, damping, large_tokens_per_batch(self._lm)
        )


def _direction(target: Target) -> np.ndarray | None:
    """float32 [d_model]: the direction that a target is, at the layer that it reaches to; None if it is none."""
    inner = target.quantity.target if isinstance(target.quantity, NegatedConcept) else None
    return inner.direction if isinstance(inner, Projection) and inner.layer == target.reach else None


def _by_layer(targets: Sequence[Target]) -> dict[int, list[int]]:
    """layer → places of the targets that are directions there and are compressed together, two or more."""
    found: dict[int, list[int]] = {}
    for place, shared in enumerate(sharing([target.queries for target in targets])):
        # Queries that are summed before they are compressed cost less, unless others need them too.
        if (shared or targets[place].own is not None) and _direction(targets[place]) is not None:
            found.setdefault(targets[place].reach, []).append(place)
    return {layer: places for layer, places in found.items() if len(places) > 1}


def projection_reader(
    files: IndexFiles, layers: Sequence[LinearLayer], device: torch.device
) -> Callable[[int], LayerProjection]:
    """The projection of each layer by its index, read a block at a time."""

    @lru_cache(maxsize=1)
    def block(number: int) -> Mapping[str, torch.Tensor]:
        return read_tensors(files.projection(number), device)

    def read(index: int) -> LayerProjection:
        tensors = block(layers[index].block)
        names = ("row_left", "row_right", "query_left", "query_right", "places")
        return LayerProjection(*(tensors[f"{index}.{name}"] for name in names))

    return read
