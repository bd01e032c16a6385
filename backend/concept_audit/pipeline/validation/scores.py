"""The scores of every candidate, kept; and what they would be by redrawn queries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from concept_audit.concepts.probe import fit_direction
from concept_audit.errors import ConceptError
from concept_audit.evidence import statistics
from concept_audit.influence.vector_filter import vector_filter
from concept_audit.pipeline.examples import example_activations
from concept_audit.pipeline.options import key
from concept_audit.pipeline.own_queries import own_among, rows_of
from concept_audit.pipeline.rank import Request, claimed, request, scores_of, scores_of_many
from concept_audit.pipeline.sources import Sources
from concept_audit.pipeline.validation.options import RANDOM, Candidate, ResolvedOptions
from concept_audit.pipeline.validation.setting import Setting, digest, fit_of
from concept_audit.progress import Progress
from concept_audit.sampling import uniform
from concept_audit.store import queries as store_queries
from concept_audit.store import workspace
from concept_audit.store.activations import read_means
from concept_audit.store.evidence import ranking_scores, read_unit, write_unit
from concept_audit.store.rankings import identify, ranking_id

QUERY_DRAWS, PROBE_DRAWS = 200, 50


def all_scores(
    sources: Sources, setting: Setting, options: ResolvedOptions, progress: Progress
) -> dict[str, np.ndarray]:
    """Candidate → float64 [rows]."""
    found = {}
    n_rows = len(setting.rows)
    for candidate in options.methods:
        if candidate.method == RANDOM:
            found[candidate.name] = np.array([uniform(f"random:{i}", 0, 1)[0] for i in range(n_rows)])
        else:
            found[candidate.name] = _scores(sources, setting, candidate, n_rows, progress)
    return found


def _scores(sources: Sources, setting: Setting, candidate: Candidate, n_rows: int, progress: Progress) -> np.ndarray:
    wanted, ranking = request_of(sources, setting, candidate)
    unit = f"scores-{ranking:016x}"
    kept = read_unit(sources.layout, unit)
    if kept is None:
        if not setting.ranked_here and sources.read(lambda cursor: store_queries.ranking_stored(cursor, ranking)):
            scores = sources.read(lambda cursor: ranking_scores(cursor, ranking, n_rows))
        else:
            progress.say(f"Ranking by {candidate.name}")
            with claimed(sources, wanted, ranking, progress):
                scores = scores_of(sources, wanted, ranking, progress)
        kept = {"scores": _json(scores)}
        write_unit(sources.layout, unit, kept)
    return np.array(kept["scores"], float)


def request_of(sources: Sources, setting: Setting, candidate: Candidate) -> tuple[Request, int]:
    """What to rank by, and the ranking's id: the audit's own, unless half of the labels rank."""
    options = candidate.options
    concept = setting.concept
    if setting.ranked_here:
        layer = concept.layer if options.query.layer is None else options.query.layer
        if layer not in setting.directions:
            raise ConceptError(
                f"{candidate.name}: this audit keeps layers {', '.join(map(str, setting.directions))}; choose "
                "one of them"
            )
        concept = replace(concept, layer=layer, direction=setting.directions[layer])
        options = options.changed(layer=None, queries=options.query.queries or setting.queries)
    wanted = request(sources, concept, candidate.method, options)
    parameters = dict(wanted.parameters)
    if setting.ranked_here:
        parameters |= {"direction": digest([concept.direction]), "layer": concept.layer}
    build = sources.read(store_queries.build_id)
    if setting.ranked_here:
        return wanted, ranking_id(build, concept.concept_id, concept.version, candidate.method, parameters)
    return wanted, identify(build, concept, candidate.method, parameters, wanted.concept).ranking_id


def redrawn_scores(sources: Sources, setting: Setting, candidate: Candidate, progress: Progress) -> np.ndarray | None:
    """Scores by redrawn queries, float64 [draws, rows]; None where they are not cheap."""
    if candidate.method == "vector_filter" and setting.concept.kind == "probe":
        return _by_redrawn_probes(sources, setting, candidate, progress)
    if candidate.method != "concept_influence":
        return None
    wanted, _ = request_of(sources, setting, candidate)
    one_sign = all(query.label == 1 for query in wanted.queries)
    if wanted.index is None or candidate.options.query.own_answers or len(wanted.queries) < 3 or not one_sign:
        return None
    per_query = _per_query(sources, wanted, progress)
    own = own_among(wanted.queries, rows_of(sources, wanted.queries)) if wanted.options.query.leave_out_own else None
    for place, rows in enumerate(own.rows if own else ()):
        # As if a row's own query were the mean of the others: with all of them drawn once, that is the row's score.
        mine = np.array(own.of) == place  # type: ignore[union-attr]
        per_query[np.ix_(rows, mine)] = per_query[np.ix_(rows, ~mine)].mean(1, keepdims=True)
    return statistics.resampled(per_query, QUERY_DRAWS)


def _by_redrawn_probes(sources: Sources, setting: Setting, candidate: Candidate, progress: Progress) -> np.ndarray:
    """Vector filter by probes of labelled examples drawn with replacement: float64 [draws, rows]."""
    wanted, _ = request_of(sources, setting, candidate)
    name, layer = wanted.concept.name, wanted.concept.layer
    examples = setting.queries or sources.read(lambda cursor: workspace.labels(cursor, name))
    inputs = example_activations(sources, examples, (layer,), progress)[layer]
    labels = np.array([example.label for example in examples])
    spread, fit = sources.read(store_queries.spreads)[layer], fit_of(sources, setting.concept)
    random = np.random.default_rng(0)
    strata = [np.flatnonzero(labels == label) for label in (0, 1)]
    directions = []
    for _ in range(PROBE_DRAWS):
        rows = np.concatenate([random.choice(part, len(part)) for part in strata])
        directions.append(fit_direction(fit, inputs[rows], labels[rows], spread))
    return vector_filter(read_means(sources.shards("activations"), layer), np.stack(directions, axis=1)).T


def _per_query(sources: Sources, wanted: Request, progress: Progress) -> np.ndarray:
    """The scores of each query alone, kept: float64 [rows, queries]."""
    unit = f"queries-{key(wanted.parameters, digest([wanted.concept.direction]))}"
    kept = read_unit(sources.layout, unit)
    if kept is None:
        alone = [replace(wanted, queries=(query,)) for query in wanted.queries]
        found = scores_of_many(sources, alone, progress)
        kept = {"scores": _json(found)}
        write_unit(sources.layout, unit, kept)
    return np.array(kept["scores"], float)


def _json(scores: np.ndarray) -> list:
    """Scores as JSON has them: null where a row has none, which NumPy reads as NaN."""
    values = scores.astype(object)
    values[~np.isfinite(scores)] = None
    return values.tolist()
