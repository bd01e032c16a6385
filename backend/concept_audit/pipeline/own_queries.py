"""Query examples that are rows of the data: which they are, and their influence by the other queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from concept_audit.influence.curvature import LayerCurvature
from concept_audit.influence.own_queries import OwnQueries, own_queries, own_token_scores
from concept_audit.influence.queries import PreparedQueries, Quantity, Rows
from concept_audit.model.linear import LinearLayer
from concept_audit.model.load import LanguageModel
from concept_audit.pipeline.sources import Sources
from concept_audit.progress import Progress
from concept_audit.store import queries as store_queries
from concept_audit.store.examples import read_texts
from concept_audit.types import PROMPT, LabelledExample


def rows_of(sources: Sources, queries: Sequence[LabelledExample]) -> dict[str, list[int]]:
    """content_hash → the rows that a query example is, copies included, of those that are rows."""
    hashes = [query.content_hash for query in queries]
    return sources.read(lambda cursor: store_queries.rows_with(cursor, hashes)) if hashes else {}


def own_among(queries: Sequence[LabelledExample], rows: dict[str, list[int]]) -> OwnQueries | None:
    """The queries that rows are to be scored without; None if that changes no score."""
    return own_queries([query.content_hash for query in queries], [query.label for query in queries], rows)


def own_influence(
    sources: Sources,
    lm: LanguageModel,
    layers: Sequence[LinearLayer],
    solved: Sequence[PreparedQueries],
    quantity: Quantity,
    queries: Rows,
    own: OwnQueries,
    curvatures: Callable[[int], LayerCurvature] | None,
    damping: float,
    unit_normalised: bool,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """What is kept of rows that are queries: ids [rows], scores float64 [rows], and tokens.ID float32 [tokens].

    Args:
        solved: (H + λI)⁻¹ of the gradients of the queries of each sign; see `own_token_scores`.
    """
    first = [rows[0] for rows in own.rows]
    texts = read_texts(sources.shards("tokens"), first)
    as_rows = Rows([texts[i].input_ids for i in first], [texts[i].parts != PROMPT for i in first])
    as_queries = Rows([queries.ids[i] for i in own.places], [queries.response[i] for i in own.places])
    with progress.stage("Query examples that are rows, by the other queries", len(first), "rows") as stage:
        found = own_token_scores(
            lm, layers, solved, quantity, as_rows, as_queries, own.shares, curvatures, damping, unit_normalised
        )
        stage.advance(len(first))
    kept: dict[str, torch.Tensor] = {}
    ids, scores = [], []
    for rows, tokens in zip(own.rows, found, strict=True):
        for example_id in rows:
            ids.append(example_id)
            scores.append(float(tokens.sum()))
            kept[f"tokens.{example_id}"] = torch.from_numpy(tokens.copy()).float()
    return {"ids": torch.tensor(ids, dtype=torch.int64), "scores": torch.tensor(scores, dtype=torch.float64), **kept}
