"""The first-order check on an audit, each step a unit that is whole or absent."""

from __future__ import annotations

import numpy as np
import pandas as pd

from concept_audit.errors import ConceptError
from concept_audit.evidence.first_order import Query, changes, identity_scores, learning_rate
from concept_audit.influence.options import InfluenceOptions
from concept_audit.metrics import Estimate, correlation
from concept_audit.model.linear import linear_layers, resolve_weights
from concept_audit.model.trainable import private_copy
from concept_audit.pipeline.options import key
from concept_audit.pipeline.rank import request
from concept_audit.pipeline.rollouts import refuse_training
from concept_audit.pipeline.sampling import as_rows
from concept_audit.pipeline.sources import Sources
from concept_audit.pipeline.validation.options import VERSION
from concept_audit.pipeline.validation.setting import digest, rendered, tokens_of
from concept_audit.progress import Progress
from concept_audit.sampling import shuffled
from concept_audit.store.evidence import read_unit, write_unit
from concept_audit.store.examples import has_loss
from concept_audit.types import Concept


def first_order(
    sources: Sources,
    concept: Concept,
    progress: Progress,
    subsets: int = 40,
    size: int = 8,
    pool: int = 96,
    seed: int = 0,
) -> tuple[Estimate, pd.DataFrame]:
    """Influence with identity curvature against one small step on each of some random subsets.

    Args:
        subsets: how many.
        size: rows of each.
        pool: rows that they are drawn from.

    Returns:
        Pearson's correlation, and predicted and actual of each subset, in units of f.

    Raises:
        ConceptError: the concept has no query examples, there are no rows, or they are rollouts.
    """
    refuse_training(sources)
    identity = InfluenceOptions.of(curvature="identity", precision="float32", engine="exact")
    wanted = request(sources, concept, "concept_influence", identity)
    tokens = [row for row in tokens_of(sources) if has_loss(row)]
    if len(tokens) <= size:
        raise ConceptError(f"{len(tokens)} rows with a response are too few for subsets of {size}; lower the size")
    order = shuffled([str(row.example_id) for row in tokens], seed)[:pool]
    rows = as_rows([tokens[i] for i in order])
    draws = [shuffled(list(map(str, range(len(rows)))), seed + 1 + n)[:size] for n in range(subsets)]
    lm = sources.model()
    about = {
        "version": VERSION,
        "model": lm.fingerprint,
        "data": sources.data,
        "concept": [concept.concept_id, concept.version, digest([concept.direction])],
        "queries": wanted.parameters["queries"],
        "rows": [tokens[i].example_id for i in order],
    }
    copy = private_copy(lm, lm.wide_dtype)
    # The step is taken on these weights alone, so nothing is left out.
    layers = linear_layers(copy, 1, concept.layer, resolve_weights(copy, "auto"), partial=True)
    query = Query(
        concept.layer,
        concept.direction,
        rendered(sources, copy, wanted.queries),
        [1 / len(wanted.queries)] * len(wanted.queries),
    )
    scored = f"first-order-{key(about)}"
    kept = read_unit(sources.layout, scored)
    if kept is None:
        with progress.stage("Influence of the rows, without curvature", len(rows), "rows") as stage:
            kept = {"scores": identity_scores(copy, layers, query, rows, stage.advance).tolist()}
        write_unit(sources.layout, scored, {**kept, **about})
    scores = np.array(kept["scores"])
    predicted = np.array([scores[draw].mean() for draw in draws])
    rate = learning_rate(copy, query, predicted)
    actual = []
    with progress.stage("One small step on each subset", subsets, "subsets") as stage:
        for draw in draws:
            unit = f"first-order-{key(about, draw, rate)}"
            done = read_unit(sources.layout, unit)
            if done is None:
                (change,) = changes(copy, layers, query, rows, [draw], rate)
                done = {"change": change, "rows": draw, "learning_rate": rate}
                write_unit(sources.layout, unit, done)
                stage.advance()
            else:
                stage.skip(1)
            actual.append(done["change"])
    table = pd.DataFrame({"predicted": rate * predicted, "actual": actual})
    return correlation(rate * predicted, np.array(actual), "pearson"), table
