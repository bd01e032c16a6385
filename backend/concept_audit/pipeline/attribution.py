"""Stage: influence scores of all rows for one concept, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from concept_audit.errors import ConceptError
from concept_audit.influence.fitting import Fisher, FisherKind
from concept_audit.influence.queries import (
    DenseQueries,
    LowRankQueries,
    PreparedQueries,
    Quantity,
    Rows,
    precondition,
    query_gradient,
)
from concept_audit.influence.scoring import Mode, plan, score_rows
from concept_audit.model.chat import PROMPT
from concept_audit.model.linear import Weights, linear_layers
from concept_audit.model.load import LanguageModel
from concept_audit.pipeline.curvature import CurvatureFit, CurvatureKind, curvature_of, fit_curvature
from concept_audit.progress import Progress
from concept_audit.store.influence import (
    influence_directory,
    read_about,
    read_scores,
    read_tensors,
    read_token_influence,
    remove_tree,
    write_scores,
    write_tensors,
)
from concept_audit.store.layout import ROWS_PER_SHARD, Layout
from concept_audit.store.shards import TokenizedExample, read_tokens
from concept_audit.types import LabelledExample

Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS = ("auto", "float32", "bfloat16")
TargetKind = Literal["direction", "activation"]
TARGETS = ("direction", "activation")
Engine = Literal["auto", "index", "exact"]
ENGINES = ("auto", "index", "exact")
GRAPH_BYTES = 2 << 30
"""What the activations of a single long row may take before forward mode is chosen."""


@dataclass(frozen=True)
class InfluenceOptions:
    """How influence is computed; each method reads what concerns it.

    Attributes:
        queries: the query examples; None takes a probe's labelled examples, or the rows in which an
            SAE feature fires highest. Those labelled 0 count only in a contrast.
        contrast: the positive queries minus the negative ones.
        own_answers: replace the queries' last responses by what the model itself answers.
        layer: where a probe is read; None for the layer that it was trained at.
        target: for an SAE feature, the projection onto its decoder ``direction``, or its ``activation``.
        curvature: ``ekfac``, ``kfac``, or ``identity``.
        fisher: of the curvature: ``sampled`` or ``empirical``.
        curvature_tokens: the curvature is fitted on rows with this many tokens together.
        damping: added to the curvature, as a share of each layer's mean eigenvalue.
        blocks: first and last block whose weights count; None for all that the target can reach.
        weights: ``linear``, ``lora``, or ``auto`` for what fine-tuning would train.
        rank: the query is reduced to this rank in each layer; None keeps it whole.
        unit_normalised: divide by the norm of each row's gradient.
        precision: of the scoring pass; ``auto`` is bfloat16 where the processor computes in it.
        seed: of everything that is drawn.
        mode: ``token_sum``, ``forward``, or ``auto`` for the cheaper one. Changes no score.
        keep_tokens: keep the influence of every token. Changes no score.
        engine: ``index`` reads the gradient index, ``exact`` differentiates every row, and ``auto`` takes the
            index for concept influence where there is one that serves these options.
    """

    queries: tuple[LabelledExample, ...] | None = None
    contrast: bool = False
    own_answers: bool = False
    layer: int | None = None
    target: TargetKind = "direction"
    curvature: CurvatureKind = "ekfac"
    fisher: FisherKind = "sampled"
    curvature_tokens: int = 20_000
    damping: float = 10.0
    blocks: tuple[int, int] | None = None
    weights: Weights = "auto"
    rank: int | None = None
    unit_normalised: bool = False
    precision: Precision = "auto"
    seed: int = 0
    mode: Mode = "auto"
    keep_tokens: bool = False
    engine: Engine = "auto"


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
        data: fingerprint of the rows as tokens.
        options: with precision and weights settled.
    """

    ranking: int
    concept_id: str
    quantity: Quantity
    queries: Rows
    weights: Sequence[float]
    reach: int
    data: str
    options: InfluenceOptions


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


def attribute(layout: Layout, lm: LanguageModel, run: Attribution, progress: Progress) -> Scores:
    """Compute an attribution, or go on computing it.

    Raises:
        ConceptError: a query cannot be differentiated.
        ModelError: the blocks have no linear layers.
        StoreError: the curvature on disk is of another model or data set.
    """
    directory = influence_directory(layout, run.ranking)
    query = directory / "query.safetensors"
    if not query.exists():
        _write_query(query, layout, lm, run, progress)
    scorer = lm.in_dtype(getattr(torch, run.options.precision))
    prepared = _read_query(query, scorer.dtype, scorer.device)
    layers = linear_layers(scorer, *_blocks(run), run.options.weights)
    numbers = layout.shard_numbers("examples")
    lengths = [len(row.input_ids) for number in numbers for row in read_tokens(layout, number)]
    mode = "token_sum" if run.options.keep_tokens or run.options.unit_normalised else run.options.mode
    chosen = plan(scorer, layers, prepared, max(lengths, default=0), GRAPH_BYTES, mode)
    named = f"Influence of every row ({chosen.mode.replace('_', ' ')}, {run.options.precision})"
    with progress.stage(named, len(lengths), "rows") as stage:
        for number in numbers:
            rows = read_tokens(layout, number)
            path = directory / f"{number:06}.safetensors"
            if path.exists():
                stage.skip(len(rows))
                continue
            scores = np.full(len(rows), np.nan)
            failed: list[int] = []
            tokens: dict[int, np.ndarray] = {}
            for batch in score_rows(
                scorer, layers, prepared, as_rows(rows), chosen.mode, run.options.unit_normalised, say=progress.say
            ):
                for row in batch:
                    example = rows[row.index]
                    scores[row.index] = row.scores[0]
                    if np.isnan(row.scores[0]) and has_loss(example):
                        failed.append(example.example_id)
                    if run.options.keep_tokens and row.tokens is not None:
                        tokens[example.example_id] = row.tokens[:, 0]
                stage.advance(len(batch))
            write_scores(path, scores, failed, tokens)
    paths = [directory / f"{number:06}.safetensors" for number in numbers]
    unscored = [example_id for path in paths for example_id in read_about(path)["unscored"]]
    if unscored:
        shown = ", ".join(map(str, unscored[:10])) + (" ..." if len(unscored) > 10 else "")
        progress.say(f"{len(unscored)} rows left unscored, their loss or gradient is not finite: {shown}")
    scores = np.concatenate([read_scores(path) for path in paths]) if paths else np.empty(0)
    return Scores(scores, unscored, float(read_about(query)["retained"]))


def finish(layout: Layout, ranking: int, keep_tokens: bool) -> None:
    """Delete what was kept to go on with; the query stays, and token influences that were asked for."""
    if not keep_tokens:
        for path in influence_directory(layout, ranking).glob("[0-9]*.safetensors"):
            path.unlink()


def token_influence(
    layout: Layout, lm: Callable[[], LanguageModel], ranking: int, rows: Sequence[TokenizedExample]
) -> dict[int, np.ndarray]:
    """The summands of rows' scores: example id → float32 [tokens].

    Those kept with the scores are read; the rest is computed, with the query that the scores were
    computed with.

    Raises:
        ConceptError: the query is not there any more.
    """
    directory = influence_directory(layout, ranking)
    found: dict[int, np.ndarray] = {}
    for number in {row.example_id // ROWS_PER_SHARD for row in rows}:
        ids = [row.example_id for row in rows if row.example_id // ROWS_PER_SHARD == number]
        found |= read_token_influence(directory / f"{number:06}.safetensors", ids)
    rest = [row for row in rows if row.example_id not in found]
    if not rest:
        return found
    query = directory / "query.safetensors"
    if not query.exists():
        raise ConceptError(
            "the query of this ranking has been deleted; compute the ranking again to see token influences"
        )
    about = read_about(query)
    scorer = lm().in_dtype(getattr(torch, about["precision"]))
    layers = linear_layers(scorer, *about["blocks"], about["weights"])
    prepared = _read_query(query, scorer.dtype, scorer.device)
    for batch in score_rows(scorer, layers, prepared, as_rows(rest), "token_sum", about["unit_normalised"]):
        for row in batch:
            if row.tokens is not None:
                found[rest[row.index].example_id] = row.tokens[:, 0]
    return found


def forget_influence(layout: Layout, concept_id: str) -> None:
    """Delete the queries and token influences of a concept that is no more."""
    directory = layout.shards("influence")
    for query in directory.glob("*/query.safetensors") if directory.is_dir() else ():
        if read_about(query).get("concept_id") == concept_id:
            remove_tree(query.parent)


def as_rows(rows: Sequence[TokenizedExample]) -> Rows:
    """Rows of a shard as the engine takes them."""
    return Rows([row.input_ids for row in rows], [row.parts != PROMPT for row in rows])


def has_loss(row: TokenizedExample) -> bool:
    """Whether a row has a response token to predict."""
    return bool((row.parts[1:] != PROMPT).any())


def _blocks(run: Attribution) -> tuple[int, int]:
    first, last = run.options.blocks or (1, run.reach)
    if not 1 <= first <= last <= run.reach:
        raise ConceptError(f"--blocks {first}-{last}: the target depends on blocks 1 to {run.reach}; choose from these")
    return first, last


def _write_query(path: Path, layout: Layout, lm: LanguageModel, run: Attribution, progress: Progress) -> None:
    """Differentiate the queries, apply the inverse curvature, reduce the rank, and keep the result."""
    options = run.options
    blocks = _blocks(run)
    layers = linear_layers(lm, *blocks, options.weights)
    curvature: Callable | None = None
    if options.curvature != "identity":
        fit = CurvatureFit(
            Fisher(options.fisher, options.seed), options.curvature_tokens, options.weights, options.precision
        )
        files = fit_curvature(layout, lm, fit, run.data, range(blocks[0], blocks[1] + 1), progress)
        curvature = curvature_of(files, layers, options.curvature, lm.device)
    with progress.stage("Gradient of the concept on the queries", len(run.queries), "queries") as stage:
        gradients = query_gradient(lm, layers, run.quantity, run.queries, run.weights, advance=stage.advance)
    with progress.stage("Applying the curvature"):
        if curvature is not None:
            gradients = precondition(gradients, curvature, options.damping)
        dtype = getattr(torch, options.precision)
        prepared: PreparedQueries
        if options.rank is None:
            prepared = DenseQueries([gradients], dtype)
            tensors = {f"dense.{i}": matrix for i, matrix in enumerate(prepared.matrices)}
        else:
            prepared = LowRankQueries([gradients], options.rank, dtype, options.seed)
            tensors = {f"U.{i}": U for i, (U, _) in enumerate(prepared.factors)}
            tensors |= {f"V.{i}": V for i, (_, V) in enumerate(prepared.factors)}
        about: Mapping[str, Any] = {
            "concept_id": run.concept_id,
            "retained": float(prepared.retained[0]),
            "precision": options.precision,
            "blocks": blocks,
            "weights": options.weights,
            "unit_normalised": options.unit_normalised,
        }
        write_tensors(path, tensors, about)
    if options.rank is not None:
        progress.say(f"Rank {options.rank} keeps {prepared.retained[0]:.2%} of the query's squared norm")


def write_dense_query(
    layout: Layout,
    ranking: int,
    concept_id: str,
    gradients: Sequence[torch.Tensor],
    precision: str,
    blocks: tuple[int, int],
    weights: str,
    unit_normalised: bool,
) -> None:
    """Keep a query, the inverse curvature applied, so that rows can be scored with it exactly."""
    dtype = getattr(torch, precision)
    about = {
        "concept_id": concept_id,
        "retained": 1.0,
        "precision": precision,
        "blocks": blocks,
        "weights": weights,
        "unit_normalised": unit_normalised,
    }
    tensors = {f"dense.{i}": matrix.to(dtype)[None] for i, matrix in enumerate(gradients)}
    write_tensors(influence_directory(layout, ranking) / "query.safetensors", tensors, about)


def has_query(layout: Layout, ranking: int) -> bool:
    """Whether the query of a ranking is kept."""
    return (influence_directory(layout, ranking) / "query.safetensors").exists()


def _read_query(path: Path, dtype: torch.dtype, device: torch.device) -> PreparedQueries:
    tensors = read_tensors(path, device)
    if "dense.0" in tensors:
        return DenseQueries.kept([tensors[f"dense.{i}"].to(dtype) for i in range(len(tensors))])
    count = len(tensors) // 2
    return LowRankQueries.kept([(tensors[f"U.{i}"].to(dtype), tensors[f"V.{i}"].to(dtype)) for i in range(count)])


def identity_of(options: InfluenceOptions, names: Sequence[str]) -> dict[str, Any]:
    """The options of these names as JSON values, to tell rankings apart."""
    values = asdict(options)
    return {name: values[name] for name in names}
