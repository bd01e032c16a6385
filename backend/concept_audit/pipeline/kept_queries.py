"""What is kept of influence rankings: their queries, the inverse curvature applied, and token influences.

With its query a ranking's rows can be scored again, token by token, whenever someone looks at them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from concept_audit.errors import ConceptError, StoreError
from concept_audit.influence.pairs import score_with_pairs
from concept_audit.influence.queries import PreparedQueries
from concept_audit.influence.reduced_query import Form, ReducedQuery
from concept_audit.influence.scoring import score_rows
from concept_audit.model.linear import LinearLayer, linear_layers
from concept_audit.model.load import LanguageModel
from concept_audit.pipeline.sampling import as_rows
from concept_audit.pipeline.sources import Sources
from concept_audit.store.examples import TokenizedExample
from concept_audit.store.layout import Layout
from concept_audit.store.locks import held
from concept_audit.store.partition import RowPartition, by_shard
from concept_audit.store.shard_store import (
    RowShards,
    ShardStore,
    intact,
    is_there,
    open_tensors,
    read_about,
    read_tensors,
)

QUERY = "query.safetensors"
"""The query as rows are scored with it."""
OWN = "own.safetensors"
"""Scores of the rows that are queries, by the other queries."""
EXACT = "exact"
"""The directory of exact scores of a ranking that came from the gradient index; see `concept_audit.pipeline.refine`."""
GRAPH_SHARE = 0.5
"""What the activations of a single row may take of the free memory before it is scored in forward mode."""


@dataclass(frozen=True)
class Opened:
    """What every shard is scored with."""

    lm: LanguageModel
    layers: list[LinearLayer]
    queries: PreparedQueries
    unit_normalised: bool


def token_influence(sources: Sources, ranking: int, rows: Sequence[TokenizedExample]) -> dict[int, np.ndarray]:
    """The summands of rows' scores: example id → float32 [tokens].

    Those kept with the scores are read; the rest is computed, with the query that the scores were
    computed with.

    Raises:
        ConceptError: the query is not there any more.
    """
    shards = influence_shards(sources.layout.shards, ranking, sources.shards("tokens").partition)
    found = _kept_tokens(shards.file(OWN), [row.example_id for row in rows])
    for number, ids in by_shard([row.example_id for row in rows if row.example_id not in found]).items():
        found |= _kept_tokens(shards.path(number), ids)
    for piece in shards.store.glob(shards.kind, f"{shards.key}/{EXACT}", "[0-9]*.safetensors"):
        found |= _kept_tokens(piece, [row.example_id for row in rows if row.example_id not in found])
    rest = [row for row in rows if row.example_id not in found]
    if not rest:
        return found
    if not has_query(sources.layout, ranking):
        raise ConceptError(
            "the query of this ranking has been deleted; compute the ranking again to see token influences"
        )
    opened = open_query(query_file(shards), sources.model())
    score = partial(
        score_rows, opened.lm, opened.layers, opened.queries, mode="token_sum", unit_normalised=opened.unit_normalised
    )
    for batch in score_with_pairs(score, as_rows(rest), sources.beta):
        for row in batch:
            if row.tokens is not None:
                found[rest[row.index].example_id] = row.tokens[:, 0]
    return found


def forget_influence(layout: Layout, concept_id: str) -> None:
    """Delete the queries and token influences of a concept that is no more."""
    for query in layout.shards.glob("influence", "", f"*/{QUERY}"):
        if not intact(query) or read_about(query).get("concept_id") != concept_id:
            continue
        # One that is being computed is left to whoever does so.
        with suppress(StoreError), held(layout.lock_of(lock_of(int(query.parent.name, 16))), "{who} computes it"):
            layout.shards.remove("influence", query.parent.name)


def keep_reduced_query(
    layout: Layout,
    ranking: int,
    query: ReducedQuery,
    precision: str,
    about: Mapping[str, Any],
    own: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Keep a query, the inverse curvature applied, so that rows can be scored with it to float32's tolerance.

    Args:
        about: concept_id, blocks, weights and unit_normalised.
        own: as from `own_influence`, for the rows that are scored by other queries than these.
    """
    if own:
        layout.shards.write_tensors(layout.shards.path("influence", _key(ranking), OWN), own)
    tensors: dict[str, torch.Tensor] = {}
    for i, form in enumerate(query.forms):
        # Whole matrices have a leading dimension, for queries that there might be more of.
        tensors |= {f"dense.{i}": form[0][None]} if len(form) == 1 else {f"U.{i}": form[0], f"V.{i}": form[1]}
    tensors = {name: tensor.to(getattr(torch, precision)) for name, tensor in tensors.items()}
    path = layout.shards.path("influence", _key(ranking), QUERY)
    layout.shards.write_tensors(path, tensors, {"retained": float(query.retained[0]), "precision": precision, **about})


def has_query(layout: Layout, ranking: int) -> bool:
    """Whether the query of a ranking is kept."""
    return intact(layout.shards.path("influence", _key(ranking), QUERY))


def open_query(path: Path, lm: LanguageModel) -> Opened:
    """A query that was kept, with the model and the layers that it was prepared for."""
    about = read_about(path)
    scorer = lm.in_dtype(getattr(torch, about["precision"]))
    first, last = about["blocks"]
    # Who prepared the query was asked whether weights may be left out.
    layers = linear_layers(scorer, first, last, about["weights"], partial=True)
    tensors = {name: tensor.to(scorer.dtype) for name, tensor in read_tensors(path, scorer.device).items()}
    forms: list[Form] = [
        (tensors[f"dense.{i}"][0],) if f"dense.{i}" in tensors else (tensors[f"U.{i}"], tensors[f"V.{i}"])
        for i in range(len(layers))
    ]
    return Opened(scorer, layers, ReducedQuery(forms, about["retained"]), about["unit_normalised"])


def _key(ranking: int) -> str:
    return f"{ranking:016x}"


def lock_of(ranking: int) -> str:
    """The name of the lock that whoever computes a ranking holds."""
    return f"ranking-{_key(ranking)}"


def influence_shards(store: ShardStore, ranking: int, partition: RowPartition) -> RowShards:
    """Where a ranking's scores are kept while they are computed, with its query beside them."""
    return RowShards(store, "influence", _key(ranking), partition)


def kept_scores(layout: Layout, ranking: int) -> Sequence[Path]:
    """The files of `influence_shards` that hold rows' scores."""
    return layout.shards.glob("influence", _key(ranking), "[0-9]*.safetensors")


def query_file(shards: RowShards) -> Path:
    """Where a ranking's query is kept."""
    return shards.file(QUERY)


def _kept_tokens(path: Path, example_ids: Sequence[int]) -> dict[int, np.ndarray]:
    """Token influences kept in one shard, of those of the rows that have them: float32 [tokens]."""
    if not is_there(path):
        return {}
    with open_tensors(path, "numpy") as file:
        names = set(file.keys())
        return {i: file.get_tensor(f"tokens.{i}") for i in example_ids if f"tokens.{i}" in names}
