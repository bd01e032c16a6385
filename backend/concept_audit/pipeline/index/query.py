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
from concept_audit.influence.own_queries import OwnQueries, by_sign, compress_each, left_out
from concept_audit.influence.projection import LayerProjection, compress_query
from concept_audit.influence.queries import Gradients, NegatedConcept, Quantity, Rows, query_gradient
from concept_audit.influence.targets import Projection
from concept_audit.model.gradients import gradient_tokens_per_batch
from concept_audit.model.linear import LinearLayer, linear_layers
from concept_audit.pipeline.curvature import CurvatureFit, curvature_of, fit_curvature
from concept_audit.pipeline.index.codes import CODING, Codes
from concept_audit.pipeline.own_queries import own_influence
from concept_audit.pipeline.sources import Sources
from concept_audit.progress import Progress
from concept_audit.store.index import IndexFiles, present_index, products, sweep
from concept_audit.store.shard_store import read_tensors

NORMS = "squares of each block"
"""What an index says of the norms of its rows' gradients; earlier ones had a single estimate over all blocks."""


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


def open_index(sources: Sources, reach: int | None = None, norms: bool = False) -> dict[str, Any]:
    """The description of a finished index that fits the audit.

    Args:
        reach: the deepest block that a query depends on; None for any.
        norms: the norms of the rows' gradients are needed.

    Raises:
        StoreError: there is none, it is of another model or data set or of an earlier version, or it lacks the norms.
        ConceptError: the query reaches deeper than the index.
    """
    root = sources.layout.root
    files = present_index(sources.layout, sources.shards("tokens").partition)
    found = files and files.describe()
    if not found or not found.get("done"):
        raise StoreError(f"{root}: no gradient index yet; make one with `concept-audit index {root}`")
    for name, wanted in (("model", sources.manifest.fingerprints["model"]), ("data", sources.data)):
        if found[name] != wanted:
            raise StoreError(
                f"{root}: the gradient index is of another {name} (fingerprint {found[name]}, the audit has "
                f"{wanted}); build it again with `concept-audit index {root}`"
            )
    if found.get("coding") != CODING:
        raise StoreError(
            f"{root}: the gradient index is of an earlier version, which coded the numbers of rows otherwise; build it "
            f"again with `concept-audit index {root} --replace`, or rank with --exact"
        )
    if norms and found.get("norms") != NORMS:
        raise StoreError(
            f"{root}: the gradient index is of an earlier version, which did not keep the norms of gradients by block, "
            f"so it does not serve --unit-normalised; build it again with `concept-audit index {root}`, or rank with "
            "--exact"
        )
    if reach is not None and reach > found["blocks"][1]:
        raise ConceptError(
            f"a concept at layer {reach} is deeper than the gradient index, which ends with block "
            f"{found['blocks'][1]}; extend it with `concept-audit index {root} --layers {reach}`, or rank with "
            "--exact"
        )
    return found


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
    columns = []
    many = len(targets) > 1
    named = "Gradients of the concepts" if many else "Gradient of the concept on its queries"
    with progress.stage(named, len(targets), "concepts") as stage:
        for target in targets:
            columns.append(opened.compressed(target, damping))
            stage.advance()
    codes = Codes.read(opened.files)
    queries, offsets = codes.queries([column.whole for column in columns])
    paths = opened.files.paths()
    blocks = []
    with progress.stage("Reading the index", len(paths), "shards") as stage:
        for block in sweep(paths, queries, codes.packing, offsets):
            blocks.append(block)
            stage.advance()
    scores = np.concatenate(blocks)
    for place, (target, column) in enumerate(zip(targets, columns, strict=True)):
        if target.own is not None:
            for rows, without in zip(target.own.rows, column.own, strict=True):
                mine, offset = codes.queries([without])
                scores[list(rows), place] = products(opened.files, rows, mine, codes.packing, offset)[:, 0]
    return scores


def solved_query(
    sources: Sources,
    about: Mapping[str, Any],
    target: Target,
    damping: float,
    unit_normalised: bool,
    progress: Progress,
) -> tuple[Gradients, dict[str, torch.Tensor]]:
    """A target's query, whole, with the curvature of the index; and the influence of rows that are queries.

    Returns:
        (H + λI)⁻¹ of the gradient, and what `own_influence` gives; empty without such rows.
    """
    opened = OpenIndex(sources, about, progress)
    with progress.stage("Applying the curvature to the whole query"):
        if target.own is None:
            return opened.solved(target, damping), {}
        parts = by_sign(target.queries, target.weights)
        solved = [opened.solved(replace(target, queries=q, weights=w), damping) for q, w, _ in parts]
    own = opened.own(target, solved, damping, unit_normalised, progress)
    return [sum(same[1:], same[0]) for same in zip(*solved, strict=True)], own


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
        fit = CurvatureFit(
            Fisher(about["fisher"], about["seed"]), about["curvature_tokens"], about["weights"], about["precision"]
        )
        curvature = fit_curvature(sources, lm, fit, range(first, last + 1), progress)
        self._curvatures = curvature_of(curvature, self._layers, "ekfac", lm.device)

    def gradients(self, target: Target) -> tuple[list[LinearLayer], Gradients]:
        """The layers that a target reaches, and its gradient in each."""
        layers = [layer for layer in self._layers if layer.block <= target.reach]
        # Queries are few: large batches are faster, and what they take is soon given back.
        budget = 4 * gradient_tokens_per_batch(self._lm.device)
        return layers, query_gradient(self._lm, layers, target.quantity, target.queries, target.weights, budget)

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

    def own(
        self, target: Target, solved: Sequence[Gradients], damping: float, unit_normalised: bool, progress: Progress
    ) -> dict[str, torch.Tensor]:
        """Exact influence of the rows that are queries, by the other queries; see `own_influence`."""
        assert target.own is not None, "there are such rows"
        layers = [layer for layer in self._layers if layer.block <= target.reach]
        return own_influence(
            self._sources,
            self._lm,
            layers,
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
        _, gradients = self.gradients(target)
        return compress_query(gradients, self._curvatures, self._reader(), damping, self._lm.dtype).cpu().numpy()

    def _by_own(self, target: Target, damping: float) -> Compressed:
        """Queries that are rows one by one, the others of each sign together."""
        own, queries = target.own, target.queries
        assert own is not None, "there are such queries"
        layers = [layer for layer in self._layers if layer.block <= target.reach]
        texts = Rows([queries.ids[i] for i in own.places], [queries.response[i] for i in own.places])
        budget = 4 * gradient_tokens_per_batch(self._lm.device)
        each = compress_each(
            self._lm, layers, target.quantity, texts, self._curvatures, self._reader(), damping, budget
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

    def solved(self, target: Target, damping: float) -> Gradients:
        """(H + λI)⁻¹ of a target's gradient, whole."""
        _, gradients = self.gradients(target)
        return [self._curvatures(i).solve(gradient, damping) for i, gradient in enumerate(gradients)]


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
