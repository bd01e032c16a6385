"""Stage: does removing what a ranking flags change the model?

Fine-tunes on the whole set, on the set less its top rows by each method, on only
those, and on random subsets, and measures the concept on prompts that neither the
rankings nor the training saw. Every run is a unit of its own, whole or absent, so
that a killed validation goes on where it was.

Where the data come from that must not meet: a probe's labelled examples are split in
two. One half ranks (its positives are the queries, its direction the concept's); the
other half measures (its prompts, and a probe of its own). With `held_out` examples
the rankings are those of the audit, and these examples measure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from backend.concepts.examples import distinct, example_activations
from backend.concepts.probe import MIN_EACH, Fit, fit_direction
from backend.errors import ConceptError
from backend.evidence import statistics
from backend.evidence.first_order import Query, changes, identity_scores, learning_rate
from backend.evidence.judge import Judge
from backend.evidence.measures import HeldOut, answered_rows, measure, projections
from backend.evidence.statistics import NAN, Estimate
from backend.evidence.training import Recipe, fine_tuned, shuffled
from backend.influence.fitting import uniform
from backend.influence.queries import Rows
from backend.influence.vector_filter import vector_filter
from backend.model.chat import ChatRenderer
from backend.model.linear import linear_layers, resolve_weights
from backend.model.load import LanguageModel
from backend.model.trainable import private_copy
from backend.pipeline.attribution import InfluenceOptions, as_rows, has_loss, native_bfloat16
from backend.pipeline.options import key
from backend.pipeline.rank import Request, Sources, request, scores_of, scores_of_many
from backend.progress import Progress
from backend.store import queries as store_queries
from backend.store import workspace
from backend.store.evidence import (
    RESULT_COLUMNS,
    RUN_COLUMNS,
    Evidence,
    metadata_values,
    ranking_scores,
    read_unit,
    save_evidence,
    unit_path,
    write_unit,
)
from backend.store.rankings import ranking_id
from backend.store.shards import TokenizedExample, read_activations, read_tokens
from backend.types import METHODS, Concept, LabelledExample

VERSION = 1
"""Counted up when units of an earlier version would not be the same."""
RANDOM = "random"
QUERY_DRAWS, PROBE_DRAWS = 200, 50
QUANTITIES = ("own", "text", "shown", "loss", "judge")


@dataclass(frozen=True)
class Candidate:
    """A method as it is put to the test.

    Attributes:
        name: what the results call it; unique.
        method: one of `METHODS`, or ``random``.
        options: how its influence is computed.
    """

    name: str
    method: str
    options: InfluenceOptions = field(default_factory=InfluenceOptions)


@dataclass(frozen=True)
class ValidateOptions:
    """What is tried, and how thoroughly.

    What is None takes the value of `FULL`, or of `QUICK` with ``quick``.

    Attributes:
        methods: names of methods, or candidates with options of their own; ``random`` is always added.
        removed: names of those whose top rows are removed and retained in runs of their own (each costs
            2 × shares × seeds runs, and random as many); the others are compared by LDS, labels and
            agreement alone. None for all of them, empty for none.
        shares: of the rows that are removed or retained, between 0 and 1.
        seeds: repetitions, of the order of the rows, the first LoRA weights, and what is removed at random.
        subsets: random subsets for the linear datamodelling score (LDS); 0 leaves it out.
        subset_seeds: repetitions of each.
        subset_share: their share of the rows.
        recipe: of the fine-tuning.
        answer_tokens: own answers are cut at this many tokens.
        natural_rows: training rows that are withheld from every run to measure the loss on.
        held_out: labelled examples to measure on; None takes half of a probe's labels.
        origin: metadata field that tells where a row comes from.
        positive: its values for rows that show the behaviour.
        topic: metadata field within whose values rows are compared too.
        first_order: random subsets for `first_order`, the cheap version of LDS; 0 leaves it out.
        judge_url, judge_model: an OpenAI-compatible endpoint that judges the answers.
        judge_behaviour: what they are judged for; None for the concept's name.
        quick: the reduced recipe.
    """

    methods: tuple[str | Candidate, ...] | None = None
    removed: tuple[str, ...] | None = None
    shares: tuple[float, ...] = (0.1,)
    seeds: int | None = None
    subsets: int | None = None
    subset_seeds: int | None = None
    subset_share: float | None = None
    recipe: Recipe | None = None
    answer_tokens: int | None = None
    natural_rows: int | None = None
    held_out: tuple[LabelledExample, ...] | None = None
    origin: str | None = None
    positive: tuple[str, ...] = ()
    topic: str | None = None
    first_order: int = 0
    judge_url: str | None = None
    judge_model: str | None = None
    judge_behaviour: str | None = None
    quick: bool = False


FULL: dict[str, Any] = {
    "methods": METHODS,
    "seeds": 3,
    "subsets": 30,
    "subset_seeds": 1,
    "subset_share": 0.5,
    "recipe": Recipe(),
    "answer_tokens": 64,
    "natural_rows": 32,
}
QUICK: dict[str, Any] = {
    "methods": ("concept_influence", "vector_filter", "activation_similarity", "bm25"),
    "removed": ("concept_influence",),
    "seeds": 3,
    "subsets": 8,
    "subset_seeds": 1,
    "subset_share": 0.1,
    "recipe": Recipe(rank=8, learning_rate=2e-3, max_steps=10, batch=12, max_tokens=96),
    "answer_tokens": 24,
    "natural_rows": 12,
}
"""For a laptop: 96 tokens of a row, 120 rows a run."""


@dataclass(frozen=True)
class Run:
    """One fine-tuning run, to be done or done.

    Attributes:
        kind: ``base``, ``whole``, ``removal``, ``retention`` or ``subset``.
        method: the candidate whose top rows are removed or retained; empty for the other kinds.
        share: of the rows that are removed, retained or drawn.
        number: of the subset; 0 for the other kinds.
        seed: of the training.
        rows: places of the rows to train on, in order.
    """

    kind: str
    method: str
    share: float
    number: int
    seed: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """What all runs of a validation share.

    Attributes:
        concept: with the direction that rows are ranked by.
        queries: the labelled examples that rows are ranked by; None for those of the audit.
        directions: layer → direction of a probe of `queries`; empty where rows are ranked as in the audit.
        held_out: what is measured on.
        prompts: the held-out prompts as text.
        rows: every row of the audit, as tokens.
        ids: example ids of the rows that may be trained on, [pool].
        labels: int [rows], 1 shows the behaviour, 0 does not, −1 unknown.
        topics: of each row; None where no field was named.
    """

    concept: Concept
    queries: tuple[LabelledExample, ...] | None
    directions: dict[int, np.ndarray]
    held_out: HeldOut
    prompts: list[str]
    rows: Rows
    ids: np.ndarray
    labels: np.ndarray
    topics: list[str] | None

    @property
    def ranked_here(self) -> bool:
        """Whether rows are ranked by half of the labels, not as in the audit."""
        return bool(self.directions)


def validate(sources: Sources, concept: Concept, options: ValidateOptions, progress: Progress) -> Evidence:
    """Do the runs that are missing, and put what they say into the store.

    Raises:
        ConceptError: options that make no sense, too few labelled examples, or no rows to train on.
        AuditError: the judge cannot be used.
    """
    chosen = settled(options)
    lm = sources.model()
    setting = _setting(sources, concept, chosen, lm, progress)
    scores = _all_scores(sources, setting, chosen, progress)
    runs = plan(setting, scores, chosen)
    measured = _do(sources, setting, runs, chosen, lm, progress)
    about = _about(sources, concept, setting, chosen, lm)
    checked: list[list[Any]] = []
    if chosen.first_order:
        e, _ = first_order(sources, concept, progress, chosen.first_order)
        name = "concept_influence without curvature"
        checked.append(["first_order", "shown", name, "", 1.0, e.value, e.low, e.high, e.p, e.n])
    frame = _run_frame(runs, measured)
    with progress.stage("Comparing the methods"):
        results = _results(frame, runs, scores, setting, chosen)
        steady = _stability(sources, setting, scores, chosen, progress)
        results += steady["results"] + checked
        evidence = Evidence(
            evidence_id=key(VERSION, about),
            concept_id=concept.concept_id,
            about=about,
            runs=frame,
            results=pd.DataFrame(results, columns=RESULT_COLUMNS),
            scores=_score_frame(scores, setting, steady["intervals"]),
        )
    build = sources.read(store_queries.build_id)
    with sources.database.writing() as cursor:
        save_evidence(cursor, build, concept.version, evidence)
    return evidence


def settled(options: ValidateOptions) -> ValidateOptions:
    """With nothing left open.

    Raises:
        ConceptError: a value is out of range, or a method is unknown.
    """
    usual = QUICK if options.quick else FULL
    filled = {name: value for name, value in usual.items() if getattr(options, name) is None}
    if options.methods is not None:
        filled.pop("removed", None)
    made = replace(options, **filled)
    candidates = tuple(m if isinstance(m, Candidate) else Candidate(m, m) for m in made.methods)
    names = [candidate.name for candidate in candidates]
    wrong = []
    unknown = [c.method for c in candidates if c.method not in (*METHODS, RANDOM)]
    if unknown:
        wrong.append(f"--methods {', '.join(unknown)}: unknown; choose from {', '.join(METHODS)}")
    if len(set(names)) < len(names) or not names:
        wrong.append("--methods: name at least one, and each once")
    for share in (*made.shares, made.subset_share):
        if not 0 < share < 1:
            wrong.append(f"--share {share:g}: must be more than 0 and less than 1, such as 0.1 for a tenth")
    for name, least in (("seeds", 1), ("subset_seeds", 1), ("subsets", 0), ("answer_tokens", 1)):
        if getattr(made, name) < least:
            wrong.append(f"--{name.replace('_', '-')} {getattr(made, name)}: must be {least} or more")
    if bool(made.judge_url) != bool(made.judge_model):
        wrong.append("--judge-url and --judge-model go together: give both, or neither")
    if bool(made.origin) != bool(made.positive):
        wrong.append("--origin and --positive go together: the field, and its values for the behaviour")
    removed = names if made.removed is None else made.removed
    lost = [name for name in removed if name not in names]
    if lost:
        wrong.append(f"removed: {', '.join(lost)} is not among the methods {', '.join(names)}")
    if wrong:
        raise ConceptError("; ".join(wrong))
    made.recipe.check()
    if RANDOM not in names:
        candidates = (*candidates, Candidate(RANDOM, RANDOM))
    removed = tuple(name for name in removed if name != RANDOM)
    return replace(made, methods=candidates, removed=removed)


def plan(setting: Setting, scores: dict[str, np.ndarray], options: ValidateOptions) -> list[Run]:
    """Every run of a validation, the cheapest to learn from first.

    Args:
        scores: candidate → float64 [rows].
    """
    pool = setting.ids
    runs = [Run("base", "", 0.0, 0, 0, ())]
    for seed in range(options.seeds):
        runs.append(Run("whole", "", 1.0, 0, seed, tuple(pool.tolist())))
        for share in options.shares if options.removed else ():
            count = max(1, round(share * len(pool)))
            for method in (RANDOM, *options.removed):
                if method == RANDOM:
                    order = pool[shuffled([f"random:{i}" for i in pool.tolist()], seed)]
                else:
                    # Rows without a score cannot be flagged, so they come last.
                    worth = np.where(np.isfinite(scores[method][pool]), scores[method][pool], -np.inf)
                    order = pool[np.argsort(-worth, kind="stable")]
                top = set(order[:count].tolist())
                rest = tuple(i for i in pool.tolist() if i not in top)
                runs.append(Run("removal", method, share, 0, seed, rest))
                runs.append(Run("retention", method, share, 0, seed, tuple(sorted(top))))
    size = max(1, round(options.subset_share * len(pool)))
    for number in range(options.subsets):
        order = pool[shuffled([f"subset:{i}" for i in pool.tolist()], number)]
        drawn = tuple(sorted(order[:size].tolist()))
        for seed in range(options.subset_seeds):
            runs.append(Run("subset", "", options.subset_share, number, seed, drawn))
    return runs


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
        ConceptError: the concept has no query examples, or there are no rows.
    """
    identity = InfluenceOptions(curvature="identity", precision="float32", engine="exact")
    wanted = request(sources, concept, "concept_influence", identity)
    tokens = [row for row in _tokens(sources) if has_loss(row)]
    if len(tokens) <= size:
        raise ConceptError(
            f"{len(tokens)} rows with a response are too few for subsets of {size}; lower the size"
        )
    order = shuffled([str(row.example_id) for row in tokens], seed)[:pool]
    rows = as_rows([tokens[i] for i in order])
    draws = [shuffled(list(map(str, range(len(rows)))), seed + 1 + n)[:size] for n in range(subsets)]
    lm = sources.model()
    about = {
        "version": VERSION,
        "model": lm.fingerprint,
        "data": sources.manifest.stages["read"]["key"],
        "concept": [concept.concept_id, concept.version, _digest([concept.direction])],
        "queries": wanted.parameters["queries"],
        "rows": [tokens[i].example_id for i in order],
    }
    copy = private_copy(lm, lm.wide_dtype)
    layers = linear_layers(copy, 1, concept.layer, resolve_weights(copy, "auto"))
    query = Query(
        concept.layer, concept.direction, _rendered(sources, copy, wanted.queries),
        [1 / len(wanted.queries)] * len(wanted.queries),
    )  # fmt: skip
    scored = unit_path(sources.layout, f"first-order-{key(about)}")
    kept = read_unit(scored)
    if kept is None:
        with progress.stage("Influence of the rows, without curvature", len(rows), "rows") as stage:
            kept = {"scores": identity_scores(copy, layers, query, rows, stage.advance).tolist()}
        write_unit(scored, {**kept, **about})
    scores = np.array(kept["scores"])
    predicted = np.array([scores[draw].mean() for draw in draws])
    rate = learning_rate(copy, query, predicted)
    actual = []
    with progress.stage("One small step on each subset", subsets, "subsets") as stage:
        for draw in draws:
            path = unit_path(sources.layout, f"first-order-{key(about, draw, rate)}")
            done = read_unit(path)
            if done is None:
                (change,) = changes(copy, layers, query, rows, [draw], rate)
                done = {"change": change, "rows": draw, "learning_rate": rate}
                write_unit(path, done)
                stage.advance()
            else:
                stage.skip(1)
            actual.append(done["change"])
    table = pd.DataFrame({"predicted": rate * predicted, "actual": actual})
    return statistics.correlation(table["predicted"], table["actual"], "pearson"), table


# What is measured on, and what is ranked by


def _setting(
    sources: Sources, concept: Concept, options: ValidateOptions, lm: LanguageModel, progress: Progress
) -> Setting:
    ranking, held = _halves(sources, concept, options)
    spread = sources.read(store_queries.spreads)
    layers = tuple(sources.manifest.configuration["layers"])
    fit = _fit(sources, concept)

    def directions(examples: Sequence[LabelledExample], layers: Sequence[int]) -> dict[int, np.ndarray]:
        manifest = sources.manifest
        found = example_activations(
            sources.layout, sources.database, examples, layers, manifest.fingerprints["model"],
            manifest.configuration["max_tokens"], sources.model, progress,
        )  # fmt: skip
        labelled = np.array([e.label for e in examples])
        return {layer: fit_direction(fit, found[layer], labelled, spread[layer]) for layer in layers}

    tokens = _tokens(sources)
    hashes = {example.content_hash for example in held}
    usable = [row.example_id for row in tokens if has_loss(row) and row.content_hash not in hashes]
    labels = np.full(len(tokens), -1)
    if options.origin:
        values = sources.read(lambda cursor: metadata_values(cursor, options.origin))
        unknown = sorted(set(options.positive) - {str(v) for v in values})
        if unknown:
            raise ConceptError(
                f"--positive {', '.join(unknown)}: no row has this {options.origin}; there are "
                f"{', '.join(sorted({str(v) for v in values})[:12])}"
            )
        labels = np.array([int(value in options.positive) for value in values])
    withheld = _withheld(usable, labels, options.natural_rows)
    pool = np.array([i for i in usable if i not in set(withheld)], int)
    if len(pool) < 2:
        raise ConceptError(
            f"only {len(pool)} rows have a response to train on; a validation needs 2 or more, and more to mean "
            "anything"
        )
    rows = as_rows(tokens)
    negatives = _rendered(sources, lm, [e for e in held if e.label == 0])
    natural = Rows(
        [rows.ids[i] for i in withheld] + list(negatives.ids),
        [rows.response[i] for i in withheld] + list(negatives.response),
    )
    cut = options.recipe.max_tokens
    natural = Rows([ids[:cut] for ids in natural.ids], [mask[:cut] for mask in natural.response])
    prompts, texts = _prompts(sources, lm, held)
    positives = _rendered(sources, lm, [e for e in held if e.label == 1])
    here = options.held_out is None
    ranked_by = directions(ranking, layers) if here else {}
    measured_by = directions(held, (concept.layer,))[concept.layer]
    return Setting(
        concept=replace(concept, direction=ranked_by[concept.layer]) if here else concept,
        queries=tuple(ranking) if here else None,
        directions=ranked_by,
        held_out=HeldOut(concept.layer, measured_by, prompts, positives, natural),
        prompts=texts,
        rows=rows,
        ids=pool,
        labels=labels,
        topics=_topics(sources, options),
    )


def _fit(sources: Sources, concept: Concept) -> Fit:
    """How the concept's probe was fitted; what probes are usually fitted with, for an SAE feature."""
    saved = {probe.name: probe.fit for probe in sources.read(workspace.probes)}
    return saved[concept.name] if concept.kind == "probe" else "logistic_regression"


def _halves(
    sources: Sources, concept: Concept, options: ValidateOptions
) -> tuple[list[LabelledExample], list[LabelledExample]]:
    """The examples that rank, and those that measure."""
    if options.held_out is not None:
        ranking, held = [], distinct(options.held_out)
    elif concept.kind == "probe":
        ranking, held = split(sources.read(lambda cursor: workspace.labels(cursor, concept.name)))
    else:
        raise ConceptError(
            f"{concept.name}: an SAE feature has no labelled examples to measure on; give some that are not "
            "among the rows with --held-out"
        )
    for name, part in (("rank with", ranking), ("measure on", held)):
        counts = [sum(e.label == label for e in part) for label in (1, 0)]
        if (part or name == "measure on") and min(counts) < MIN_EACH:
            raise ConceptError(
                f"{concept.name}: {counts[0]} positive and {counts[1]} negative examples to {name} are too few; "
                f"at least {MIN_EACH} of each are needed. Label more (half of a probe's labels rank, the other "
                "half measures), or give others to measure on with --held-out"
            )
    return ranking, held


def split(examples: Sequence[LabelledExample]) -> tuple[list[LabelledExample], list[LabelledExample]]:
    """Two halves that share no prompt, each with half of the positive and half of the negative prompts.

    The same examples are split the same way in any order.
    """
    groups: dict[str, list[LabelledExample]] = {}
    for example in distinct(examples):
        groups.setdefault(_prompt_hash(example), []).append(example)
    halves: tuple[list[LabelledExample], list[LabelledExample]] = ([], [])
    by_labels: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(groups):
        by_labels.setdefault(tuple(sorted({e.label for e in groups[name]})), []).append(name)
    for names in by_labels.values():
        for place, name in enumerate(names):
            halves[place % 2].extend(sorted(groups[name], key=lambda e: e.content_hash))
    return halves


def _prompt_hash(example: LabelledExample) -> str:
    before = [f"{m.role}\0{m.content}" for m in example.messages[:-1]] or [example.messages[-1].content]
    return hashlib.blake2b("\1".join(before).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _withheld(usable: Sequence[int], labels: np.ndarray, count: int) -> list[int]:
    """Rows to measure the loss on: natural ones where the origin is known, else any; a tenth at most."""
    natural = [i for i in usable if labels[i] != 1]
    order = shuffled([f"withheld:{i}" for i in natural], 0)
    return sorted(natural[place] for place in order[: min(count, len(usable) // 10)])


def _prompts(
    sources: Sources, lm: LanguageModel, examples: Sequence[LabelledExample]
) -> tuple[list[np.ndarray], list[str]]:
    """Distinct prompts as tokens, and their last turn as text."""
    renderer = ChatRenderer(lm.tokenizer, sources.manifest.configuration["max_tokens"])
    found: dict[str, tuple[np.ndarray, str]] = {}
    for example in examples:
        if len(example.messages) > 1:
            turns = example.messages[:-1] if example.messages[-1].role == "assistant" else example.messages
            found.setdefault(_prompt_hash(example), (renderer.prompt(turns), turns[-1].content))
    if not found:
        raise ConceptError(
            "none of the held-out examples has a prompt for the model to answer; give conversations"
        )
    return [ids for ids, _ in found.values()], [text for _, text in found.values()]


def _rendered(sources: Sources, lm: LanguageModel, examples: Iterable[LabelledExample]) -> Rows:
    renderer = ChatRenderer(lm.tokenizer, sources.manifest.configuration["max_tokens"])
    made = [renderer.render(example.messages) for example in examples]
    return Rows([row.input_ids for row in made], [row.response for row in made])


def _topics(sources: Sources, options: ValidateOptions) -> list[str] | None:
    if options.topic is None:
        return None
    return [str(v) for v in sources.read(lambda cursor: metadata_values(cursor, options.topic))]


def _tokens(sources: Sources) -> list[TokenizedExample]:
    numbers = sources.layout.shard_numbers("examples")
    return [row for number in numbers for row in read_tokens(sources.layout, number)]


# Scores


def _all_scores(
    sources: Sources, setting: Setting, options: ValidateOptions, progress: Progress
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


def _scores(
    sources: Sources, setting: Setting, candidate: Candidate, n_rows: int, progress: Progress
) -> np.ndarray:
    wanted, ranking = _request(sources, setting, candidate)
    path = unit_path(sources.layout, f"scores-{ranking:016x}")
    kept = read_unit(path)
    if kept is None:
        if not setting.ranked_here and sources.read(
            lambda cursor: store_queries.ranking_stored(cursor, ranking)
        ):
            scores = sources.read(lambda cursor: ranking_scores(cursor, ranking, n_rows))
        else:
            progress.say(f"Ranking by {candidate.name}")
            scores = scores_of(sources, wanted, ranking, progress)
        kept = {"scores": [float(s) if np.isfinite(s) else None for s in scores]}
        write_unit(path, kept)
    return np.array([NAN if s is None else s for s in kept["scores"]], float)


def _request(sources: Sources, setting: Setting, candidate: Candidate) -> tuple[Request, int]:
    """What to rank by, and the ranking's id: the audit's own, unless half of the labels rank."""
    options = candidate.options
    concept = setting.concept
    if setting.ranked_here:
        layer = concept.layer if options.layer is None else options.layer
        if layer not in setting.directions:
            raise ConceptError(
                f"{candidate.name}: this audit keeps layers {', '.join(map(str, setting.directions))}; choose "
                "one of them"
            )
        concept = replace(concept, layer=layer, direction=setting.directions[layer])
        options = replace(options, layer=None, queries=options.queries or setting.queries)
    wanted = request(sources, concept, candidate.method, options)
    parameters = dict(wanted.parameters)
    if setting.ranked_here:
        parameters |= {"direction": _digest([concept.direction]), "layer": concept.layer}
    build = sources.read(store_queries.build_id)
    return wanted, ranking_id(build, concept.concept_id, concept.version, candidate.method, parameters)


# Runs


def _do(
    sources: Sources, setting: Setting, runs: Sequence[Run], options: ValidateOptions, lm: LanguageModel,
    progress: Progress,
) -> list[dict[str, Any]]:  # fmt: skip
    """What each run measured; runs that are done already are read."""
    dtype = _precision(lm, options.recipe)
    common = _common(sources, setting, options, lm, dtype)
    paths = [unit_path(sources.layout, key(common, run.seed, run.rows)) for run in runs]
    found: dict[Any, dict[str, Any]] = {}
    copy: LanguageModel | None = None
    with progress.stage("Counterfactual runs", len(runs), "runs") as stage:
        for run, path in zip(runs, paths, strict=True):
            unit = found.get(path) or read_unit(path)
            if unit is None:
                copy = copy or private_copy(lm, dtype)
                stage.detail = f"{run.kind} {run.method}".strip()
                unit = {"seed": run.seed, "n_rows": len(run.rows), **_one(copy, setting, run, options)}
                write_unit(path, unit)
                stage.advance()
            else:
                stage.skip(1)
            found[path] = unit
    if options.judge_url:
        _judge(sources, setting, paths, found, options, lm, progress)
    return [found[path] for path in paths]


def _one(lm: LanguageModel, setting: Setting, run: Run, options: ValidateOptions) -> dict[str, Any]:
    """Train on a run's rows, measure, and put the model back."""
    if not run.rows:
        training, measured = None, measure(lm, setting.held_out, options.answer_tokens)
    else:
        chosen = Rows([setting.rows.ids[i] for i in run.rows], [setting.rows.response[i] for i in run.rows])
        with fine_tuned(lm, chosen, list(map(str, run.rows)), options.recipe, run.seed) as training:
            measured = measure(lm, setting.held_out, options.answer_tokens)
    made = [np.asarray(ids, np.int64) for ids in measured.answers]
    # What is said, as the model that was not trained reads it.
    own = answered_rows(setting.held_out.prompts, made)
    text = projections(lm, own, setting.held_out.layer, setting.held_out.direction)
    renderer = ChatRenderer(lm.tokenizer, lm.context)
    return {
        "own": measured.own,
        "text": text.tolist(),
        "shown": measured.shown,
        "loss": measured.loss,
        "answers": [renderer.decode(ids) for ids in made],
        "training": asdict(training) if training else None,
    }


def _judge(
    sources: Sources, setting: Setting, paths: Sequence, found: dict[Any, dict[str, Any]],
    options: ValidateOptions, lm: LanguageModel, progress: Progress,
) -> None:  # fmt: skip
    """Add the judge's scores to the units; each unit's are kept once they are complete."""
    behaviour = options.judge_behaviour or setting.concept.name
    judge = Judge(options.judge_url, options.judge_model, behaviour)
    with progress.stage("Judging the answers", len(found), "runs") as stage:
        for path in dict.fromkeys(paths):
            kept = unit_path(
                sources.layout, f"judge-{key(judge.url, judge.model, behaviour, found[path]['answers'])}"
            )
            judged = read_unit(kept)
            if judged is None:
                pairs = zip(setting.prompts, found[path]["answers"], strict=True)
                judged = {"judge": [judge.score(prompt, answer) for prompt, answer in pairs]}
                write_unit(kept, judged)
                stage.advance()
            else:
                stage.skip(1)
            found[path] = {**found[path], **judged}


def _precision(lm: LanguageModel, recipe: Recipe) -> torch.dtype:
    if recipe.precision != "auto":
        return getattr(torch, recipe.precision)
    new_adapter = recipe.weights == "lora" and resolve_weights(lm, "auto") == "linear"
    if new_adapter and lm.dtype == torch.float32 and native_bfloat16(lm.device):
        return torch.bfloat16
    # Weights that are trained themselves need the precision that small steps are made in.
    return lm.dtype if new_adapter else lm.wide_dtype


def _common(
    sources: Sources, setting: Setting, options: ValidateOptions, lm: LanguageModel, dtype: torch.dtype
) -> dict[str, Any]:
    """What every run depends on, beside its rows and its seed."""
    held = setting.held_out
    return {
        "version": VERSION,
        "recipe": asdict(options.recipe),
        "precision": str(dtype),
        "model": lm.fingerprint,
        "data": sources.manifest.stages["read"]["key"],
        "layer": held.layer,
        "held_out": _digest([held.direction, *held.prompts, *held.shown.ids, *held.natural.ids]),
        "answer_tokens": options.answer_tokens,
    }


def _about(
    sources: Sources, concept: Concept, setting: Setting, options: ValidateOptions, lm: LanguageModel
) -> dict[str, Any]:
    """What the evidence is about, as JSON values."""
    names = (
        "removed", "shares", "seeds", "subsets", "subset_seeds", "subset_share", "answer_tokens", "origin",
        "positive", "topic", "first_order", "judge_url", "judge_model", "judge_behaviour", "quick",
    )  # fmt: skip
    common = _common(sources, setting, options, lm, _precision(lm, options.recipe))
    return {
        **common,
        **{name: getattr(options, name) for name in names},
        "shares": list(options.shares),
        "removed": list(options.removed),
        "positive": list(options.positive),
        "concept": concept.name,
        "concept_version": concept.version,
        "audit": sources.layout.root.resolve().name,
        "model_name": lm.name,
        "methods": {c.name: _candidate_about(c) for c in options.methods},
        "n_rows": len(setting.rows),
        "n_pool": len(setting.ids),
        "n_prompts": len(setting.held_out.prompts),
        "n_shown": len(setting.held_out.shown),
        "n_natural": len(setting.held_out.natural),
        "ranked_by": "half of the labels" if setting.ranked_here else "the audit's concept",
    }


def _candidate_about(candidate: Candidate) -> dict[str, Any]:
    """The method, and the options that are not at their defaults."""
    usual = asdict(InfluenceOptions())
    given = asdict(candidate.options)
    told = {name: value for name, value in given.items() if value != usual[name] and name != "queries"}
    if candidate.options.queries is not None:
        told["queries"] = len(candidate.options.queries)
    return {"method": candidate.method, **told}


def _digest(arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


# Findings


def _run_frame(runs: Sequence[Run], measured: Sequence[dict[str, Any]]) -> pd.DataFrame:
    lines = [
        [
            run.kind, run.method, run.share, run.number, run.seed, len(run.rows),
            *(_mean(unit.get(quantity)) for quantity in QUANTITIES),
        ]
        for run, unit in zip(runs, measured, strict=True)
    ]  # fmt: skip
    return pd.DataFrame(lines, columns=RUN_COLUMNS)


def _mean(values: Sequence[float] | None) -> float:
    known = [v for v in values or () if v is not None and np.isfinite(v)]
    return float(np.mean(known)) if known else NAN


def _results(
    frame: pd.DataFrame, runs: Sequence[Run], scores: dict[str, np.ndarray], setting: Setting,
    options: ValidateOptions,
) -> list[list[Any]]:  # fmt: skip
    """Lines of `RESULT_COLUMNS`."""
    found: list[list[Any]] = []

    def add(measure: str, quantity: str, method: str, other: str, share: float, e: Estimate) -> None:
        found.append([measure, quantity, method, other, share, e.value, e.low, e.high, e.p, e.n])

    for quantity in QUANTITIES:
        if not frame[quantity].notna().any():
            continue
        value = frame.set_index(["kind", "method", "share", "number", "seed"])[quantity].to_dict()
        base = value["base", "", 0.0, 0, 0]
        seeds = range(options.seeds)
        whole = np.array([value["whole", "", 1.0, 0, s] for s in seeds])
        add("whole", quantity, "", "base", 1.0, statistics.paired(whole - base))
        for share in options.shares if options.removed else ():
            for kind in ("removal", "retention"):
                chance = np.array([value[kind, RANDOM, share, 0, s] for s in seeds])
                for method in (RANDOM, *options.removed):
                    own = np.array([value[kind, method, share, 0, s] for s in seeds])
                    reference = whole if kind == "removal" else base
                    other = "whole" if kind == "removal" else "base"
                    add(kind, quantity, method, other, share, statistics.paired(own - reference))
                    if method != RANDOM:
                        add(kind, quantity, method, RANDOM, share, statistics.paired(own - chance))
        if options.subsets and quantity != "loss":
            subsets = [run for run in runs if run.kind == "subset" and run.seed == 0]
            actual = np.array(
                [
                    np.mean(
                        [value["subset", "", run.share, run.number, s] for s in range(options.subset_seeds)]
                    )
                    for run in subsets
                ]
            )
            for method, worth in scores.items():
                predicted = np.array([np.nansum(worth[list(run.rows)]) for run in subsets])
                lds = statistics.correlation(predicted, actual)
                add("lds", quantity, method, "", options.subset_share, lds)
    for method, worth in scores.items():
        known = setting.labels >= 0
        k = max(1, round(options.shares[0] * len(setting.rows)))
        topics = (
            [t for t, kept in zip(setting.topics, known, strict=True) if kept] if setting.topics else None
        )
        for name, estimate in statistics.against_labels(
            worth[known], setting.labels[known], k, topics
        ).items():
            share = options.shares[0] if name == "precision_at_k" else 1.0
            add(name, "labels", method, options.origin or "", share, estimate)
    matrix = statistics.agreement(scores)
    for one in matrix.index:
        for other in matrix.columns:
            e = Estimate(float(matrix.loc[one, other]), n=len(setting.rows))
            add("agreement", "scores", one, other, 1.0, e)
    return found


def _stability(
    sources: Sources,
    setting: Setting,
    scores: dict[str, np.ndarray],
    options: ValidateOptions,
    progress: Progress,
) -> dict[str, Any]:
    """How far rankings depend on what was drawn: queries, labelled examples, samples of the Fisher matrix.

    Queries are redrawn where that is cheap: for concept influence from the gradient index, which scores
    every query alone in one sweep, and for the direction of vector filter, fitted anew to redrawn examples.
    Candidates that differ in their seed alone tell what the samples of the Fisher matrix matter.
    """
    results: list[list[Any]] = []
    intervals = {}

    def add(quantity: str, candidate: Candidate, other: str, e: Estimate) -> None:
        results.append(["stability", quantity, candidate.name, other, 1.0, e.value, e.low, e.high, e.p, e.n])

    for candidate in options.methods:
        redrawn = _redrawn(sources, setting, candidate, progress)
        if redrawn is not None:
            found = statistics.stability(redrawn, scores[candidate.name])
            intervals[candidate.name] = (found.low, found.high)
            add("queries", candidate, "", found.spearman)
        for other in options.methods:
            seeds = (candidate.options.seed, other.options.seed)
            reseeded = replace(other.options, seed=seeds[0])
            if seeds[0] < seeds[1] and candidate.method == other.method and reseeded == candidate.options:
                matrix = statistics.agreement({name: scores[name] for name in (candidate.name, other.name)})
                add("fisher", candidate, other.name, Estimate(float(matrix.iloc[0, 1]), n=len(setting.rows)))
    return {"results": results, "intervals": intervals}


def _redrawn(
    sources: Sources, setting: Setting, candidate: Candidate, progress: Progress
) -> np.ndarray | None:
    """Scores by redrawn queries, float64 [draws, rows]; None where they are not cheap."""
    if candidate.method == "vector_filter" and setting.concept.kind == "probe":
        return _by_redrawn_probes(sources, setting, candidate, progress)
    if candidate.method != "concept_influence":
        return None
    wanted, _ = _request(sources, setting, candidate)
    one_sign = all(query.label == 1 for query in wanted.queries)
    if wanted.index is None or candidate.options.own_answers or len(wanted.queries) < 3 or not one_sign:
        return None
    return statistics.resampled(_per_query(sources, wanted, progress), QUERY_DRAWS)


def _by_redrawn_probes(
    sources: Sources, setting: Setting, candidate: Candidate, progress: Progress
) -> np.ndarray:
    """Vector filter by probes of labelled examples drawn with replacement: float64 [draws, rows]."""
    wanted, _ = _request(sources, setting, candidate)
    name, layer = wanted.concept.name, wanted.concept.layer
    examples = setting.queries or sources.read(lambda cursor: workspace.labels(cursor, name))
    manifest = sources.manifest
    inputs = example_activations(
        sources.layout, sources.database, examples, (layer,), manifest.fingerprints["model"],
        manifest.configuration["max_tokens"], sources.model, progress,
    )[layer]  # fmt: skip
    labels = np.array([example.label for example in examples])
    spread, fit = sources.read(store_queries.spreads)[layer], _fit(sources, setting.concept)
    random = np.random.default_rng(0)
    strata = [np.flatnonzero(labels == label) for label in (0, 1)]
    directions = []
    for _ in range(PROBE_DRAWS):
        rows = np.concatenate([random.choice(part, len(part)) for part in strata])
        directions.append(fit_direction(fit, inputs[rows], labels[rows], spread))
    return vector_filter(read_activations(sources.layout, layer), np.stack(directions, axis=1)).T


def _per_query(sources: Sources, wanted: Request, progress: Progress) -> np.ndarray:
    """The scores of each query alone, kept: float64 [rows, queries]."""
    path = unit_path(sources.layout, f"queries-{key(wanted.parameters, _digest([wanted.concept.direction]))}")
    kept = read_unit(path)
    if kept is None:
        alone = [replace(wanted, queries=(query,)) for query in wanted.queries]
        found = scores_of_many(sources, alone, progress)
        kept = {"scores": [[float(s) if np.isfinite(s) else None for s in row] for row in found]}
        write_unit(path, kept)
    return np.array([[NAN if s is None else s for s in row] for row in kept["scores"]], float)


def _score_frame(
    scores: dict[str, np.ndarray], setting: Setting, intervals: dict[str, tuple[np.ndarray, np.ndarray]]
) -> pd.DataFrame:
    n_rows = len(setting.rows)
    nothing = np.full(n_rows, NAN)
    label = pd.array(np.where(setting.labels < 0, None, setting.labels), "Int8")
    parts = []
    for method, worth in scores.items():
        low, high = intervals.get(method, (nothing, nothing))
        parts.append(
            pd.DataFrame(
                {
                    "method": method,
                    "example_id": np.arange(n_rows),
                    "score": worth,
                    "label": label,
                    "percentile_low": low,
                    "percentile_high": high,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
