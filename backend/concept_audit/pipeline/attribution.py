"""Stage: influence scores of all rows for one concept, shard by shard.

shards/influence/<ranking>/query.safetensors    the query as rows were scored with it
                          /own.safetensors      scores of the rows that are queries, by the other queries
                          /000003.safetensors   scores of shard 3's rows, with token influences
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from concept_audit.errors import ConceptError
from concept_audit.files import remove_leftovers
from concept_audit.influence.options import InfluenceOptions
from concept_audit.influence.own_queries import OwnQueries, by_sign
from concept_audit.influence.pairs import score_with_pairs
from concept_audit.influence.queries import (
    DenseQueries,
    Loss,
    LowRankQueries,
    PreparedQueries,
    Quantity,
    Rows,
    precondition,
    query_gradient,
)
from concept_audit.influence.scoring import plan, score_rows
from concept_audit.model.coverage import check_outside
from concept_audit.model.linear import linear_layers, resolve_weights
from concept_audit.model.memory import free_bytes
from concept_audit.model.options import ModelSource
from concept_audit.pipeline.curvature import CurvatureFit, curvature_of, fit_curvature
from concept_audit.pipeline.engine import Worker
from concept_audit.pipeline.kept_queries import (
    GRAPH_SHARE,
    OWN,
    Opened,
    influence_shards,
    kept_scores,
    lock_of,
    open_query,
    query_file,
)
from concept_audit.pipeline.own_queries import own_influence
from concept_audit.pipeline.place import taking_turns
from concept_audit.pipeline.sampling import as_rows, as_sequences
from concept_audit.pipeline.sources import Sources
from concept_audit.progress import Progress
from concept_audit.store.examples import has_loss, read_tokens
from concept_audit.store.layout import Layout
from concept_audit.store.shard_store import RowShards, intact, is_there, read_about, read_tensors


@dataclass(frozen=True)
class Attribution:
    """One influence ranking to be computed: everything that its scores depend on.

    Attributes:
        ranking: the ranking's id in the store.
        concept_id: of the concept that it is for.
        quantity: what of a query is differentiated.
        queries: the query examples as tokens.
        weights: of the queries, of both signs in a contrast.
        reach: the deepest block that the quantity depends on.
        options: with precision and weights resolved.
        own: the queries that are rows, which are scored without them; None for every row by all queries.
    """

    ranking: int
    concept_id: str
    quantity: Quantity
    queries: Rows
    weights: Sequence[float]
    reach: int
    options: InfluenceOptions
    own: OwnQueries | None = None


@dataclass(frozen=True)
class Scores:
    """What came out of an attribution.

    Attributes:
        rows: float64 [rows]; NaN where a row has no score.
        unscored: ids of rows whose loss is not finite.
        retained: share of the query's squared norm that its reduction to a rank kept.
    """

    rows: np.ndarray
    unscored: list[int] = field(default_factory=list)
    retained: float = 1.0


@dataclass(frozen=True)
class Scoring:
    """Influence of every row on a prepared query.

    Attributes:
        tokens: the rows as the model reads them.
        scores: to be made; the query lies beside them.
        mode: ``token_sum`` or ``forward``.
        longest: rows with more tokens are scored in forward mode; None for no limit.
        keep_tokens: keep the influence of every token.
        beta: of the DPO loss, where rows are preference pairs.
    """

    tokens: RowShards
    scores: RowShards
    model: ModelSource
    mode: Literal["token_sum", "forward"]
    longest: int | None
    keep_tokens: bool
    beta: float = 0.0

    @property
    def outputs(self) -> tuple[RowShards, ...]:
        return (self.scores,)

    def open(self, worker: Worker) -> tuple[Opened, Worker]:
        return open_query(query_file(self.scores), worker.model(self.model)), worker

    def run(self, opening: tuple[Opened, Worker], number: int) -> None:
        opened, worker = opening
        rows = read_tokens(self.tokens, number)
        scores = np.full(len(rows), np.nan)
        unscored: list[int] = []
        kept: dict[str, torch.Tensor] = {}
        for unit in self.tokens.partition.units(number):
            score = partial(
                score_rows,
                opened.lm,
                opened.layers,
                opened.queries,
                mode=self.mode,
                unit_normalised=opened.unit_normalised,
                longest=self.longest,
                say=worker.say,
            )
            for batch in score_with_pairs(score, as_rows(rows[unit]), self.beta):
                for found in batch:
                    row = rows[unit.start + found.index]
                    scores[unit.start + found.index] = found.scores[0]
                    if np.isnan(found.scores[0]) and has_loss(row):
                        unscored.append(row.example_id)
                    if self.keep_tokens and found.tokens is not None:
                        kept[f"tokens.{row.example_id}"] = torch.from_numpy(found.tokens[:, 0])
                worker.advance(len(batch))
        self.scores.write_tensors(number, {"scores": torch.from_numpy(scores), **kept}, {"unscored": unscored})


def attribute(sources: Sources, run: Attribution, progress: Progress) -> Scores:
    """Compute an attribution, or go on computing it.

    Raises:
        ConceptError: a query cannot be differentiated.
        ModelError: the blocks have no linear layers.
        StoreError: the curvature on disk is of another model or data set.
    """
    tokens = sources.shards("tokens")
    shards = influence_shards(sources.layout.shards, run.ranking, tokens.partition)
    scoring = run.options.scoring
    remove_leftovers(shards.file(""))
    prepare(sources, run, progress)
    opened = open_query(query_file(shards), sources.model())
    mode = "token_sum" if scoring.keep_tokens or scoring.unit_normalised else scoring.mode
    memory = int(GRAPH_SHARE * free_bytes(opened.lm.device))
    chosen = plan(opened.lm, opened.layers, opened.queries, memory, mode)
    if chosen.longest is not None:
        spans = (span for number in tokens.numbers() for span in as_sequences(read_tokens(tokens, number)).spans)
        far = sum(span > chosen.longest for span in spans)
        if far:
            progress.say(
                f"{far:,} rows of more than {chosen.longest:,} tokens are scored in forward mode, which keeps less of "
                "them in memory"
            )
    named = f"Influence of every row ({chosen.mode.replace('_', ' ')}, {scoring.precision})"
    work = Scoring(tokens, shards, sources.model_source, chosen.mode, chosen.longest, scoring.keep_tokens, sources.beta)
    sources.driver(progress).finish(work, named, tokens.partition.sizes())
    unscored = [example_id for number in shards.numbers() for example_id in read_about(shards.path(number))["unscored"]]
    if unscored:
        shown = ", ".join(map(str, unscored[:10])) + (" ..." if len(unscored) > 10 else "")
        progress.say(f"{len(unscored)} rows left unscored, their loss or gradient is not finite: {shown}")
    scores = [read_tensors(shards.path(number))["scores"].numpy() for number in shards.numbers()]
    rows = np.concatenate(scores) if scores else np.empty(0)
    if is_there(shards.file(OWN)):
        own = read_tensors(shards.file(OWN))
        rows[own["ids"].numpy()] = own["scores"].numpy()
    return Scores(rows, unscored, float(read_about(query_file(shards))["retained"]))


def prepare(sources: Sources, run: Attribution, progress: Progress) -> None:
    """Make the query of an attribution, if it is not kept already; raises as `attribute`."""
    path = query_file(influence_shards(sources.layout.shards, run.ranking, sources.shards("tokens").partition))
    if not intact(path):
        _prepare_query(path, sources, run, progress)


@contextmanager
def own_turn(sources: Sources, ranking: int, progress: Progress) -> Iterator[None]:
    """Be the only process that computes a ranking's influence, after waiting for one that does.

    Raises:
        StoreError: the audit has been built anew.
    """
    doing = "computes the same ranking; its scores will serve here, too"
    with taking_turns(sources.layout, sources.manifest, lock_of(ranking), doing, progress.say):
        yield


def finish(layout: Layout, ranking: int, keep_tokens: bool) -> None:
    """Delete what was kept to go on with; the query stays, and token influences that were asked for."""
    if not keep_tokens:
        layout.shards.delete(kept_scores(layout, ranking))


def _blocks(run: Attribution) -> tuple[int, int]:
    first, last = run.options.scoring.blocks or (1, run.reach)
    if not 1 <= first <= last <= run.reach:
        raise ConceptError(f"--blocks {first}-{last}: the target depends on blocks 1 to {run.reach}; choose from these")
    return first, last


def _prepare_query(path: Path, sources: Sources, run: Attribution, progress: Progress) -> None:
    """Differentiate the queries, apply the inverse curvature, reduce the rank, and keep the result."""
    curvature_options, scoring = run.options.curvature, run.options.scoring
    first, last = _blocks(run)
    lm = sources.model().differentiable()
    # Queries are few: they are differentiated in the wider of the model's precision and that of the rows.
    lm = lm.in_dtype(torch.promote_types(lm.dtype, getattr(torch, scoring.precision)))
    weights = resolve_weights(lm, scoring.weights)
    layers = linear_layers(lm, first, last, weights, scoring.partial)
    if weights == "lora" and not scoring.partial:
        check_outside(lm, isinstance(run.quantity, Loss))
    curvature: Callable | None = None
    if curvature_options.curvature != "identity":
        fit = CurvatureFit.of(curvature_options, weights, scoring.precision)
        files = fit_curvature(sources, lm, fit, range(first, last + 1), progress)
        curvature = curvature_of(files, layers, curvature_options.curvature, lm.device)
    parts: list[tuple[Rows, Sequence[float]]] = [(run.queries, run.weights)]
    if run.own is not None:
        parts = [(queries, weights) for queries, weights, _ in by_sign(run.queries, run.weights)]
    with progress.stage("Gradient of the concept on the queries", len(run.queries), "queries") as stage:
        of_parts = [query_gradient(lm, layers, run.quantity, *part, advance=stage.advance) for part in parts]
    if curvature is not None:
        with progress.stage("Applying the curvature"):
            of_parts = [precondition(part, curvature, curvature_options.damping) for part in of_parts]
    if run.own is not None:
        own = own_influence(
            sources,
            lm,
            layers,
            [DenseQueries.kept([matrix[None] for matrix in part]) for part in of_parts],
            run.quantity,
            run.queries,
            run.own,
            curvature,
            curvature_options.damping,
            scoring.unit_normalised,
            progress,
        )
        sources.layout.shards.write_tensors(path.with_name(OWN), own)
    gradients = of_parts[0] if len(of_parts) == 1 else [a + b for a, b in zip(*of_parts, strict=True)]
    with progress.stage("Preparing the query"):
        dtype = getattr(torch, scoring.precision)
        prepared: PreparedQueries
        if scoring.rank is None:
            prepared = DenseQueries([gradients], dtype)
            tensors = {f"dense.{i}": matrix for i, matrix in enumerate(prepared.matrices)}
        else:
            prepared = LowRankQueries([gradients], scoring.rank, dtype)
            tensors = {f"U.{i}": U for i, (U, _) in enumerate(prepared.factors)}
            tensors |= {f"V.{i}": V for i, (_, V) in enumerate(prepared.factors)}
        about: Mapping[str, Any] = {
            "concept_id": run.concept_id,
            "retained": float(prepared.retained[0]),
            "precision": scoring.precision,
            "blocks": (first, last),
            "weights": weights,
            "unit_normalised": scoring.unit_normalised,
        }
        sources.layout.shards.write_tensors(path, tensors, about)
    if scoring.rank is not None:
        progress.say(f"Rank {scoring.rank} keeps {prepared.retained[0]:.2%} of the query's squared norm")
