"""From a concept and a method to scores: which method needs what, and what tells rankings apart.

Influence comes from the gradient index where there is one that serves the options,
and from the engine, which differentiates every row, where there is none or it is
asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from concept_audit.concepts.probe import fit_direction
from concept_audit.concepts.sae import SaeSource, SparseAutoencoder
from concept_audit.errors import ConceptError, StoreError
from concept_audit.influence.baselines import activation_similarity, bm25, projection_difference
from concept_audit.influence.options import CurvatureOptions, InfluenceOptions, ScoringOptions, content
from concept_audit.influence.own_queries import OwnQueries
from concept_audit.influence.queries import Loss, NegatedConcept, Quantity, Rows
from concept_audit.influence.targets import FeatureActivation, Projection
from concept_audit.influence.vector_filter import vector_filter
from concept_audit.model.chat import ChatRenderer
from concept_audit.model.linear import resolve_weights
from concept_audit.model.load import LanguageModel, find_device
from concept_audit.model.pairs import separator
from concept_audit.model.precision import resolve_precision
from concept_audit.pipeline.answers import ANSWER_TOKENS, answered, own_answers
from concept_audit.pipeline.attribution import Attribution, attribute, finish, own_turn, prepare
from concept_audit.pipeline.examples import example_activations
from concept_audit.pipeline.index.finished import open_index
from concept_audit.pipeline.index.query import Target, index_scores, solved_query
from concept_audit.pipeline.kept_queries import has_query, keep_reduced_query
from concept_audit.pipeline.methods import AT_A_LAYER, NEED_GRADIENTS, NEED_QUERIES, check_options, check_rows
from concept_audit.pipeline.options import key
from concept_audit.pipeline.own_queries import own_among, rows_of
from concept_audit.pipeline.rollouts import by_advantage
from concept_audit.pipeline.sources import Sources
from concept_audit.progress import Progress
from concept_audit.store import queries as store_queries
from concept_audit.store import workspace
from concept_audit.store.activations import read_means
from concept_audit.store.examples import messages_from_json, read_row_texts
from concept_audit.store.features import feature_activation
from concept_audit.store.index import present_index
from concept_audit.store.rankings import QUERY_ROWS
from concept_audit.types import METHODS, OF_FEATURES, Concept, LabelledExample, Method

STRONGEST_ROWS = 8
"""Queries of an SAE feature: this many rows in which it fires highest."""


@dataclass(frozen=True)
class Request:
    """A ranking that is asked for, with nothing left open.

    Attributes:
        concept: at the layer that it is wanted at.
        queries: the query examples that the method reads; empty where it reads none.
        parameters: what tells this ranking from others of the same concept and method, JSON values.
        index: the description of the gradient index that answers it; None for the engine.
    """

    concept: Concept
    method: Method
    options: InfluenceOptions
    queries: tuple[LabelledExample, ...]
    parameters: dict[str, Any]
    index: Mapping[str, Any] | None = None


def request(sources: Sources, concept: Concept, method: str, options: InfluenceOptions) -> Request:
    """Resolve what a ranking depends on, without loading the model.

    Raises:
        ConceptError: unknown method, a layer that the audit does not keep, or no queries.
    """
    known = {name: name for name in METHODS}
    if method not in known:
        raise ConceptError(f"--method {method}: unknown; choose from {', '.join(METHODS)}")
    check_options(options)
    if method in OF_FEATURES and concept.kind != "sae_feature":
        raise ConceptError(f"{method}: of SAE features alone, and {concept.name} is a probe; use vector_filter")
    check_rows(sources, method, options)
    parameters: dict[str, Any] = {}
    if sources.rollouts is not None and sources.weighs(options):
        parameters |= sources.rollouts.parameters()
    at = concept
    layer = options.query.layer
    if method in AT_A_LAYER and layer is not None and layer != concept.layer:
        at = _at_layer(sources, concept, layer)
        parameters["layer"] = layer
    if method == "projection_difference":
        parameters["answer_tokens"] = ANSWER_TOKENS
    queries: tuple[LabelledExample, ...] = ()
    if method in NEED_QUERIES:
        contrast = options.query.contrast and method in NEED_GRADIENTS
        queries = _queries(sources, concept, options, contrast)
        parameters["queries"] = _digest(queries)
        parameters["n_queries"] = len(queries)
        rows = rows_of(sources, queries)
        if rows:
            parameters[QUERY_ROWS] = sorted(i for ids in rows.values() for i in ids)
        if options.query.leave_out_own and own_among(queries, rows) is not None:
            parameters["leave_out_own"] = True
    index = None
    if method in NEED_GRADIENTS:
        if method == "gradient_dot":
            options = options.changed(curvature="identity")
        index = _index(sources, at, method, options)
        asked: dict[str, Any] = {"contrast": options.query.contrast, "own_answers": options.query.own_answers}
        if method == "concept_influence" and concept.kind == "sae_feature":
            asked["target"] = options.query.target
        parameters |= asked
    if index is not None:
        parameters |= {"engine": "index", "index": _key(index), "damping": options.curvature.damping}
        parameters["unit_normalised"] = options.scoring.unit_normalised
        if index.get("partial"):
            parameters["partial"] = True
        parameters["blocks"] = [1, min(_reach(at, method, index), index["blocks"][1])]
    elif method in NEED_GRADIENTS:
        dtype = getattr(torch, sources.manifest.configuration["dtype"])
        options = options.changed(
            precision=resolve_precision(options.scoring.precision, dtype, find_device(sources.device))
        )
        parameters |= content(options.scoring)
        # Said where it is so: rankings of all weights are what they were before there was the option.
        parameters = {name: value for name, value in parameters.items() if name != "partial" or value}
        # Without a curvature there is nothing to damp and nothing to fit.
        flat = options.curvature.curvature == "identity"
        parameters |= {"curvature": "identity"} if flat else content(options.curvature)
    return Request(at, known[method], options, queries, parameters, index)


def scores_of(sources: Sources, wanted: Request, ranking: int, progress: Progress) -> np.ndarray:
    """Compute a ranking's scores, of rollouts by their advantage: float64 [rows], NaN where a row has none.

    Args:
        ranking: its id, under which influence that is under way is kept.
    """
    return by_advantage(sources, _scores_of(sources, wanted, ranking, progress), wanted.options)


def scores_of_many(sources: Sources, wanted: Sequence[Request], progress: Progress) -> np.ndarray:
    """Scores of several requests that the index answers, in one sweep: float64 [rows, requests].

    Args:
        wanted: of one method, with the same options.
    """
    return by_advantage(sources, _scores_by_index(sources, wanted, progress), wanted[0].options)


def _scores_of(sources: Sources, wanted: Request, ranking: int, progress: Progress) -> np.ndarray:
    concept = wanted.concept
    direction = concept.direction[:, None]
    means = sources.shards("activations")
    match wanted.method:
        case "feature_activation":
            feature = concept.feature_id
            assert feature is not None, "only SAE features have this method"
            return sources.read(partial(feature_activation, features=[feature]))[:, 0]
        case "vector_filter":
            return vector_filter(read_means(means, concept.layer), direction)[:, 0]
        case "projection_difference":
            own = vector_filter(read_means(own_answers(sources, progress), concept.layer), direction)
            return projection_difference(vector_filter(read_means(means, concept.layer), direction), own)[:, 0]
        case "activation_similarity":
            positive = [example for example in wanted.queries if example.label]
            found = example_activations(sources, positive, (concept.layer,), progress)[concept.layer]
            return activation_similarity(read_means(means, concept.layer), found, _own(sources, wanted))
        case "bm25":
            texts = ["\n".join(m.content for m in e.messages) for e in wanted.queries if e.label]
            return bm25(lambda: read_row_texts(sources.shards("rows")), texts, _own(sources, wanted))
        case _ if wanted.index is not None:
            return _scores_by_index(sources, [wanted], progress)[:, 0]
        case _:
            return attribute(sources, _attribution(sources, wanted, ranking, progress), progress).rows


def _scores_by_index(sources: Sources, wanted: Sequence[Request], progress: Progress) -> np.ndarray:
    lm = sources.model()
    targets = [_target(sources, each, lm, progress) for each in wanted]
    index = wanted[0].index
    assert index is not None, "these requests are answered by the index"
    scores = index_scores(sources, index, targets, wanted[0].options.curvature.damping, progress)
    if wanted[0].options.scoring.unit_normalised:
        files = present_index(sources.layout, sources.shards("tokens").partition)
        assert files is not None, "an index that answers has files"
        norms = {last: files.norms(last) for last in {each.parameters["blocks"][1] for each in wanted}}
        for place, each in enumerate(wanted):
            scores[:, place] /= np.maximum(norms[each.parameters["blocks"][1]], np.finfo(np.float32).tiny)
    return scores


def claimed(sources: Sources, wanted: Request, ranking: int, progress: Progress) -> AbstractContextManager[None]:
    """For as long as a ranking is computed: whoever asks for the same one meanwhile waits for it."""
    if wanted.method in NEED_GRADIENTS and wanted.index is None:
        return own_turn(sources, ranking, progress)
    return nullcontext()  # done in seconds, and nothing of it lies on disk before it is in the store


def keep_query(sources: Sources, wanted: Request, ranking: int, progress: Progress) -> None:
    """Keep the whole query of a ranking, if it is not kept already, so that rows can be scored exactly."""
    if has_query(sources.layout, ranking):
        return
    if wanted.index is None:
        prepare(sources, _attribution(sources, wanted, ranking, progress), progress)
        return
    target = _target(sources, wanted, sources.model(), progress)
    damping, normalised = wanted.options.curvature.damping, wanted.options.scoring.unit_normalised
    query, own = solved_query(sources, wanted.index, target, damping, normalised, progress)
    about = {
        "concept_id": wanted.concept.concept_id,
        "blocks": wanted.parameters["blocks"],
        "weights": wanted.index["weights"],
        "unit_normalised": normalised,
    }
    keep_reduced_query(sources.layout, ranking, query, wanted.index["precision"], about, own)


def finished(sources: Sources, wanted: Request, ranking: int) -> None:
    """Clear away what a ranking that is now in the store does not need any more."""
    if wanted.method in NEED_GRADIENTS:
        finish(sources.layout, ranking, wanted.options.scoring.keep_tokens)


def _attribution(sources: Sources, wanted: Request, ranking: int, progress: Progress) -> Attribution:
    lm = sources.model()
    target = _target(sources, wanted, lm, progress)
    return Attribution(
        ranking=ranking,
        concept_id=wanted.concept.concept_id,
        quantity=target.quantity,
        queries=target.queries,
        weights=target.weights,
        reach=target.reach,
        options=wanted.options.changed(weights=resolve_weights(lm, wanted.options.scoring.weights)),
        own=target.own,
    )


def _own(sources: Sources, wanted: Request) -> OwnQueries | None:
    """The queries that rows are to be scored without."""
    return own_among(wanted.queries, rows_of(sources, wanted.queries)) if wanted.options.query.leave_out_own else None


def _target(sources: Sources, wanted: Request, lm: LanguageModel, progress: Progress) -> Target:
    max_tokens = sources.manifest.configuration["max_tokens"]
    if wanted.options.query.own_answers:
        rows = answered(lm, wanted.queries, max_tokens, progress)
    else:
        renderer = ChatRenderer(lm.tokenizer, max_tokens)
        rendered = [renderer.render(example.messages) for example in wanted.queries]
        rows = Rows([row.input_ids for row in rendered], [row.response for row in rendered])
    if any(separator(ids) is not None for ids in rows.ids):
        raise ConceptError("query examples are single conversations, not preference pairs; bring them with --queries")
    reach = wanted.concept.layer if wanted.method == "concept_influence" else lm.n_layers
    return Target(_quantity(sources, wanted, lm), rows, _weights(wanted.queries), reach, _own(sources, wanted))


def _reach(concept: Concept, method: str, index: Mapping[str, Any]) -> int:
    """The deepest block of an index that a method's target depends on."""
    return concept.layer if method == "concept_influence" else index["blocks"][1]


def _index(sources: Sources, concept: Concept, method: str, options: InfluenceOptions) -> Mapping[str, Any] | None:
    """The index that is to answer, if any.

    Raises:
        StoreError, ConceptError: the index is asked for, and cannot answer; the reason.
    """
    engine = options.scoring.engine
    if engine == "exact" or (engine == "auto" and method != "concept_influence"):
        return None
    reach = concept.layer if method == "concept_influence" else None
    try:
        about = open_index(sources, reach, options.scoring.unit_normalised)
    except (StoreError, ConceptError):
        if engine == "index":
            raise
        return None
    lacking = _not_served(options, about)
    if lacking and engine == "index":
        raise ConceptError(f"the gradient index does not serve {', '.join(lacking)}; rank with --exact")
    return None if lacking else about


def _not_served(options: InfluenceOptions, about: Mapping[str, Any]) -> list[str]:
    """Settings that an index cannot answer; what is left at its default takes the index's own."""
    usual = {**content(CurvatureOptions()), **content(ScoringOptions()), "mode": "auto", "keep_tokens": False}
    asked = {**content(options.curvature), **content(options.scoring)}
    asked |= {"mode": options.scoring.mode, "keep_tokens": options.scoring.keep_tokens}
    own = {"curvature": "ekfac", **{name: about[name] for name in ("fisher", "curvature_tokens", "seed", "weights")}}
    own["precision"] = about["precision"]
    # These it answers whatever they are; what an index leaves out it was allowed to when it was built.
    served = {"damping", "unit_normalised", "partial"}
    lacking = []
    for name, value in asked.items():
        if name in served or value == usual[name] or value == own.get(name, usual[name]):
            continue
        shown = "-".join(map(str, value)) if name == "blocks" else value
        lacking.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {shown}"))
    return lacking


def _key(index: Mapping[str, Any]) -> str:
    """Tells indexes apart by what they are of."""
    return key({k: v for k, v in index.items() if k not in ("fidelity", "rows", "kept", "chosen", "tracked", "done")})


def _quantity(sources: Sources, wanted: Request, lm: LanguageModel) -> Quantity:
    concept = wanted.concept
    if wanted.method != "concept_influence":
        return Loss()
    if concept.feature_id is not None and wanted.options.query.target == "activation":
        # The key of the features is a hash over the SAE's weights.
        sae = _sae(sources.sae_source, lm.device, sources.manifest.key("features"))
        return NegatedConcept(FeatureActivation(concept.layer, sae.module, concept.feature_id))
    return NegatedConcept(Projection(concept.layer, concept.direction))


@lru_cache(maxsize=2)
def _sae(source: SaeSource, device: torch.device, weights: str) -> SparseAutoencoder:
    """An SAE, loaded once for all its features; `weights` tells others in the same place."""
    return source.load(device)


def _weights(queries: Sequence[LabelledExample]) -> list[float]:
    """1/n for each of n positive queries; −1/m for each of m negative ones."""
    positive = sum(example.label == 1 for example in queries)
    negative = len(queries) - positive
    return [1 / positive if example.label else -1 / negative for example in queries]


def _queries(
    sources: Sources, concept: Concept, options: InfluenceOptions, contrast: bool
) -> tuple[LabelledExample, ...]:
    given, feature = options.query.queries, concept.feature_id
    if given is None and feature is not None:
        rows = sources.read(lambda cursor: store_queries.strongest_rows(cursor, feature, STRONGEST_ROWS))
        given = tuple(LabelledExample(messages_from_json(text), 1) for text in rows["messages"])
    elif given is None:
        given = tuple(sources.read(lambda cursor: workspace.labels(cursor, concept.name)))
    positive = tuple(example for example in given if example.label == 1)
    negative = tuple(example for example in given if example.label == 0)
    if not positive or (contrast and not negative):
        lacking = "positive" if not positive else "negative"
        raise ConceptError(
            f"{concept.name}: no {lacking} query examples; label some in the probe lab, or give a file of them "
            "with --queries"
        )
    return positive + negative if contrast else positive


def _at_layer(sources: Sources, concept: Concept, layer: int) -> Concept:
    """The concept at another layer: a probe is trained there from its labels, in the way it was trained."""
    if layer not in sources.layers:
        raise ConceptError(
            f"--layer {layer}: this audit keeps layers {', '.join(map(str, sources.layers))}; choose one of "
            "them, or build again with --layers"
        )
    if concept.kind != "probe":
        raise ConceptError(
            f"--layer {layer}: {concept.name} lives at layer {concept.layer}, where its SAE reads; leave the option out"
        )
    examples = sources.read(lambda cursor: workspace.labels(cursor, concept.name))
    fit = next(p.fit for p in sources.read(workspace.probes) if p.name == concept.name)
    found = example_activations(sources, examples, (layer,), Progress())[layer]
    spread = sources.read(store_queries.spreads)[layer]
    direction = fit_direction(fit, found, np.array([e.label for e in examples]), spread)
    return replace(concept, layer=layer, direction=direction.astype(np.float32))


def _digest(queries: Sequence[LabelledExample]) -> str:
    hashes = ",".join(sorted(f"{example.content_hash}:{example.label}" for example in queries))
    return hashlib.blake2b(hashes.encode(), digest_size=8).hexdigest()
