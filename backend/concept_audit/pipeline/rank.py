"""From a concept and a method to scores: which method needs what, and what tells rankings apart.

Influence comes from the gradient index where there is one that serves the options,
and from the engine, which differentiates every row, where there is none or it is
asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from concept_audit.concepts.examples import example_activations
from concept_audit.concepts.probe import fit_direction
from concept_audit.concepts.sae import SparseAutoencoder, load_sae
from concept_audit.errors import ConceptError, StoreError
from concept_audit.influence.baselines import activation_similarity, bm25, projection_difference
from concept_audit.influence.queries import Lack, Loss, Quantity, Rows
from concept_audit.influence.targets import FeatureActivation, Projection
from concept_audit.influence.vector_filter import vector_filter
from concept_audit.model.chat import ChatRenderer
from concept_audit.model.linear import resolve_weights
from concept_audit.model.load import LanguageModel, native_bfloat16
from concept_audit.pipeline.answers import ANSWER_TOKENS, answer_stage, answered
from concept_audit.pipeline.attribution import (
    Attribution,
    InfluenceOptions,
    attribute,
    finish,
    has_query,
    identity_of,
    write_dense_query,
)
from concept_audit.pipeline.index import Target, index_scores, open_index, solved_query
from concept_audit.pipeline.options import key
from concept_audit.progress import Progress
from concept_audit.store import queries as store_queries
from concept_audit.store import workspace
from concept_audit.store.database import Database
from concept_audit.store.index import index_files, read_norms
from concept_audit.store.layout import Layout
from concept_audit.store.manifest import Manifest
from concept_audit.store.shards import messages_from_json, read_activations, read_answer_activations
from concept_audit.types import METHODS, Concept, LabelledExample, Method

STRONGEST_ROWS = 8
"""Queries of an SAE feature: this many rows in which it fires highest."""
NEED_QUERIES = {"concept_influence", "influence_function", "gradient_dot", "activation_similarity", "bm25"}
NEED_GRADIENTS = {"concept_influence", "influence_function", "gradient_dot"}
AT_A_LAYER = {"vector_filter", "projection_difference", "activation_similarity", "concept_influence"}
_SHARED = ("contrast", "own_answers", "blocks", "weights", "rank", "unit_normalised", "precision", "seed")
_CURVED = ("curvature", "fisher", "curvature_tokens", "damping")
DEPENDS_ON: dict[str, tuple[str, ...]] = {
    "concept_influence": ("target", *_SHARED, *_CURVED),
    "influence_function": (*_SHARED, *_CURVED),
    "gradient_dot": _SHARED,
}
"""The options that change a method's scores, beside the layer and the queries."""


@dataclass(frozen=True)
class Sources:
    """An audit, as far as ranking its rows needs it.

    Attributes:
        model: loads the model; called only if it is needed.
    """

    layout: Layout
    database: Database
    manifest: Manifest
    model: Callable[[], LanguageModel]

    def read(self, query: Callable):
        """Run a query of the store."""
        with self.database.reading() as cursor:
            return query(cursor)


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
    """Settle what a ranking depends on, without loading the model.

    Raises:
        ConceptError: unknown method, a layer that the audit does not keep, or no queries.
    """
    if method not in METHODS:
        raise ConceptError(f"--method {method}: unknown; choose from {', '.join(METHODS)}")
    _check(options)
    parameters: dict[str, Any] = {}
    at = concept
    if method in AT_A_LAYER and options.layer is not None and options.layer != concept.layer:
        at = _at_layer(sources, concept, options.layer)
        parameters["layer"] = options.layer
    if method == "projection_difference":
        parameters["answer_tokens"] = ANSWER_TOKENS
    queries: tuple[LabelledExample, ...] = ()
    if method in NEED_QUERIES:
        contrast = options.contrast and method in NEED_GRADIENTS
        queries = _queries(sources, concept, options, contrast)
        parameters["queries"] = _digest(queries)
        parameters["n_queries"] = len(queries)
    index = None
    if method in NEED_GRADIENTS:
        if method == "gradient_dot":
            options = replace(options, curvature="identity")
        index = _index(sources, at, method, options)
    if index is not None:
        parameters |= {"engine": "index", "index": _key(index)}
        names = ["contrast", "own_answers", "unit_normalised", "damping"]
        names += ["target"] if method == "concept_influence" and concept.kind == "sae_feature" else []
        parameters |= identity_of(options, names)
        parameters["blocks"] = [1, min(_reach(at, method, index), index["blocks"][1])]
    elif method in NEED_GRADIENTS:
        # Without a curvature there is nothing to damp and nothing to fit.
        flat = options.curvature == "identity"
        dropped = {"fisher", "curvature_tokens", "damping"} if flat else set()
        dropped |= {"target"} if concept.kind == "probe" else set()
        options = replace(options, precision=_precision(sources.manifest, options))
        names = [name for name in DEPENDS_ON[method] if name not in dropped]
        parameters |= identity_of(options, names)
    return Request(at, method, options, queries, parameters, index)  # type: ignore[arg-type]


def scores_of(sources: Sources, wanted: Request, ranking: int, progress: Progress) -> np.ndarray:
    """Compute a ranking's scores: float64 [rows], NaN where a row has none.

    Args:
        ranking: its id, under which influence that is under way is kept.
    """
    concept = wanted.concept
    direction = concept.direction[:, None]
    layout = sources.layout
    match wanted.method:
        case "vector_filter":
            return vector_filter(read_activations(layout, concept.layer), direction)[:, 0]
        case "projection_difference":
            layers = tuple(sources.manifest.configuration["layers"])
            if layout.shard_numbers("answer_activations") != layout.shard_numbers("examples"):
                answer_stage(layout, sources.model(), layers, progress)
            own = vector_filter(read_answer_activations(layout, concept.layer), direction)
            return projection_difference(vector_filter(read_activations(layout, concept.layer), direction), own)[:, 0]
        case "activation_similarity":
            positive = [example for example in wanted.queries if example.label]
            found = _activations(sources, positive, concept.layer, progress)
            return activation_similarity(read_activations(layout, concept.layer), found)
        case "bm25":
            texts = ["\n".join(m.content for m in e.messages) for e in wanted.queries if e.label]
            return bm25(sources.read(store_queries.texts), texts)
        case _ if wanted.index is not None:
            return scores_of_many(sources, [wanted], progress)[:, 0]
        case _:
            run = _attribution(sources, wanted, ranking, progress)
            return attribute(layout, sources.model(), run, progress).rows


def scores_of_many(sources: Sources, wanted: Sequence[Request], progress: Progress) -> np.ndarray:
    """Scores of several requests that the index answers, in one sweep: float64 [rows, requests].

    Args:
        wanted: of one method, with the same options.
    """
    lm = sources.model()
    targets = [_target(sources, each, lm, progress) for each in wanted]
    scores = index_scores(sources.layout, lm, wanted[0].index, targets, wanted[0].options.damping, progress)
    if any(each.options.unit_normalised for each in wanted):
        norms = read_norms(index_files(sources.layout)).astype(np.float64)
        for place, each in enumerate(wanted):
            if each.options.unit_normalised:
                scores[:, place] /= np.maximum(norms, np.finfo(np.float32).tiny)
    return scores


def keep_query(sources: Sources, wanted: Request, ranking: int, progress: Progress) -> None:
    """Keep the whole query of a ranking that the index answered, so that rows can be scored exactly."""
    if wanted.index is None or has_query(sources.layout, ranking):
        return
    lm = sources.model()
    target = _target(sources, wanted, lm, progress)
    gradients = solved_query(sources.layout, lm, wanted.index, target, wanted.options.damping, progress)
    write_dense_query(
        sources.layout,
        ranking,
        wanted.concept.concept_id,
        gradients,
        wanted.index["precision"],
        tuple(wanted.parameters["blocks"]),
        wanted.index["weights"],
        wanted.options.unit_normalised,
    )


def finished(sources: Sources, wanted: Request, ranking: int) -> None:
    """Clear away what a ranking that is now in the store does not need any more."""
    if wanted.method in NEED_GRADIENTS:
        finish(sources.layout, ranking, wanted.options.keep_tokens)


def _attribution(sources: Sources, wanted: Request, ranking: int, progress: Progress) -> Attribution:
    lm = sources.model()
    options = replace(wanted.options, weights=resolve_weights(lm, wanted.options.weights))
    target = _target(sources, wanted, lm, progress)
    return Attribution(
        ranking=ranking,
        concept_id=wanted.concept.concept_id,
        quantity=target.quantity,
        queries=target.queries,
        weights=target.weights,
        reach=target.reach,
        data=sources.manifest.stages["read"]["key"],
        options=options,
    )


def _target(sources: Sources, wanted: Request, lm: LanguageModel, progress: Progress) -> Target:
    max_tokens = sources.manifest.configuration["max_tokens"]
    if wanted.options.own_answers:
        rows = answered(lm, wanted.queries, max_tokens, progress)
    else:
        renderer = ChatRenderer(lm.tokenizer, max_tokens)
        rendered = [renderer.render(example.messages) for example in wanted.queries]
        rows = Rows([row.input_ids for row in rendered], [row.response for row in rendered])
    reach = wanted.concept.layer if wanted.method == "concept_influence" else lm.n_layers
    return Target(_quantity(sources, wanted, wanted.options, lm), rows, _weights(wanted.queries), reach)


def _reach(concept: Concept, method: str, index: Mapping[str, Any]) -> int:
    """The deepest block of an index that a method's target depends on."""
    return concept.layer if method == "concept_influence" else index["blocks"][1]


def _index(sources: Sources, concept: Concept, method: str, options: InfluenceOptions) -> Mapping[str, Any] | None:
    """The index that is to answer, if any.

    Raises:
        StoreError, ConceptError: the index is asked for, and cannot answer; the reason.
    """
    if options.engine == "exact" or (options.engine == "auto" and method != "concept_influence"):
        return None
    asked = options.engine == "index"
    manifest = sources.manifest
    reach = concept.layer if method == "concept_influence" else None
    try:
        about = open_index(sources.layout, manifest.fingerprints["model"], manifest.stages["read"]["key"], reach)
    except (StoreError, ConceptError):
        if asked:
            raise
        return None
    lacking = []
    if options.curvature != "ekfac":
        lacking.append(f"--curvature {options.curvature}")
    usual = InfluenceOptions()
    for name in ("fisher", "curvature_tokens", "seed", "weights"):
        # What is left at its default takes the index's own.
        if getattr(options, name) not in (getattr(usual, name), about[name]):
            lacking.append(f"--{name.replace('_', '-')} {getattr(options, name)}")
    if options.blocks:
        lacking.append(f"--blocks {options.blocks[0]}-{options.blocks[1]}")
    if options.rank:
        lacking.append(f"--rank {options.rank}")
    if options.keep_tokens:
        lacking.append("--keep-tokens")
    if options.precision not in ("auto", about["precision"]):
        lacking.append(f"--precision {options.precision}")
    if options.mode != "auto":
        lacking.append(f"--mode {options.mode}")
    if lacking and asked:
        raise ConceptError(f"the gradient index does not serve {', '.join(lacking)}; rank with --exact")
    return None if lacking else about


def _key(index: Mapping[str, Any]) -> str:
    """Tells indexes apart by what they are of."""
    told = {k: v for k, v in index.items() if k not in ("fidelity", "rows", "kept", "done")}
    return key(told)


def _quantity(sources: Sources, wanted: Request, options: InfluenceOptions, lm: LanguageModel) -> Quantity:
    concept = wanted.concept
    if wanted.method != "concept_influence":
        return Loss()
    if concept.kind == "sae_feature" and options.target == "activation":
        configured = sources.manifest.configuration["sae"]
        source = str(sources.layout.sae) if configured == "train" else configured
        # The key of the features is a hash over the SAE's weights.
        sae = _sae(source, lm.device, sources.manifest.stages["features"]["key"])
        return Lack(FeatureActivation(concept.layer, sae.module, concept.feature_id))
    return Lack(Projection(concept.layer, concept.direction))


@lru_cache(maxsize=2)
def _sae(source: str, device: torch.device, weights: str) -> SparseAutoencoder:
    """An SAE, loaded once for all its features; `weights` tells others in the same place."""
    return load_sae(source, device)


def _weights(queries: Sequence[LabelledExample]) -> list[float]:
    """1/n for each of n positive queries; −1/m for each of m negative ones."""
    positive = sum(example.label == 1 for example in queries)
    negative = len(queries) - positive
    return [1 / positive if example.label else -1 / negative for example in queries]


def _queries(
    sources: Sources, concept: Concept, options: InfluenceOptions, contrast: bool
) -> tuple[LabelledExample, ...]:
    given = options.queries
    if given is None and concept.kind == "probe":
        given = tuple(sources.read(lambda cursor: workspace.labels(cursor, concept.name)))
    elif given is None:
        rows = sources.read(lambda cursor: store_queries.strongest_rows(cursor, concept.feature_id, STRONGEST_ROWS))
        given = tuple(LabelledExample(messages_from_json(text), 1) for text in rows["messages"])
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
    kept = tuple(sources.manifest.configuration["layers"])
    if layer not in kept:
        raise ConceptError(
            f"--layer {layer}: this audit keeps layers {', '.join(map(str, kept))}; choose one of "
            "them, or build again with --layers"
        )
    if concept.kind != "probe":
        raise ConceptError(
            f"--layer {layer}: {concept.name} lives at layer {concept.layer}, where its SAE reads; leave the option out"
        )
    examples = sources.read(lambda cursor: workspace.labels(cursor, concept.name))
    fit = next(p.fit for p in sources.read(workspace.probes) if p.name == concept.name)
    found = _activations(sources, examples, layer, Progress())
    spread = sources.read(store_queries.spreads)[layer]
    direction = fit_direction(fit, found, np.array([e.label for e in examples]), spread)
    return replace(concept, layer=layer, direction=direction.astype(np.float32))


def _activations(sources: Sources, examples: Sequence[LabelledExample], layer: int, progress: Progress) -> np.ndarray:
    manifest = sources.manifest
    return example_activations(
        sources.layout,
        sources.database,
        examples,
        (layer,),
        manifest.fingerprints["model"],
        manifest.configuration["max_tokens"],
        sources.model,
        progress,
    )[layer]


def _digest(queries: Sequence[LabelledExample]) -> str:
    content = ",".join(sorted(f"{example.content_hash}:{example.label}" for example in queries))
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _precision(manifest: Manifest, options: InfluenceOptions) -> str:
    """The precision of scoring that ``auto`` stands for on this machine."""
    if options.precision != "auto":
        return options.precision
    own = manifest.configuration["dtype"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bfloat16" if own == "float32" and native_bfloat16(device) else own


def _check(options: InfluenceOptions) -> None:
    wrong = []
    if options.damping < 0:
        wrong.append(f"--damping {options.damping}: must not be negative")
    if options.rank is not None and options.rank < 1:
        wrong.append(f"--rank {options.rank}: must be 1 or more")
    if options.curvature_tokens < 1:
        wrong.append(f"--curvature-tokens {options.curvature_tokens}: must be 1 or more")
    if options.unit_normalised and options.mode == "forward":
        wrong.append("--mode forward: does not see the norm of a gradient; leave it out, or --unit-normalised")
    if options.keep_tokens and options.mode == "forward":
        wrong.append("--mode forward: gives no token influences; leave it out, or --keep-tokens")
    if wrong:
        raise ConceptError("; ".join(wrong))
