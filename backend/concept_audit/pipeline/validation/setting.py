"""What a validation ranks rows by, what it trains on, and what it measures on, kept apart.

Where the data come from that must not meet: a probe's labelled examples are split in
two. One half ranks (its positives are the queries, its direction the concept's); the
other half measures (its prompts, and a probe of its own). With `held_out` examples
the rankings are those of the audit, and these examples measure. Neither what ranks nor
what is trained on has a prompt that measures.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from concept_audit.concepts.examples import distinct
from concept_audit.concepts.probe import MIN_EACH, fit_direction
from concept_audit.errors import ConceptError
from concept_audit.evidence.measures import HeldOut
from concept_audit.evidence.training import shorter
from concept_audit.influence.queries import Rows
from concept_audit.model.chat import ChatRenderer
from concept_audit.model.generate import with_room
from concept_audit.model.load import LanguageModel
from concept_audit.model.pairs import sequences
from concept_audit.pipeline.examples import example_activations
from concept_audit.pipeline.rank import STRONGEST_ROWS
from concept_audit.pipeline.sampling import as_rows
from concept_audit.pipeline.sources import Sources
from concept_audit.pipeline.validation.options import ResolvedOptions
from concept_audit.pipeline.validation.prompts import asked, keep_apart
from concept_audit.progress import Progress
from concept_audit.sampling import shuffled
from concept_audit.store import queries as store_queries
from concept_audit.store import workspace
from concept_audit.store.evidence import metadata_values
from concept_audit.store.examples import TokenizedExample, has_loss, messages_from_json, read_tokens
from concept_audit.types import Concept, LabelledExample, ProbeFit


@dataclass(frozen=True)
class Setting:
    """What all runs of a validation share.

    Attributes:
        concept: with the direction that rows are ranked by.
        queries: the labelled examples that rows are ranked by; None for those of the audit.
        directions: layer → direction of a probe of `queries`; empty where rows are ranked as in the audit.
        held_out: what is measured on.
        prompts: the held-out prompts as text.
        rows: every row of the audit, as tokens; preference pairs with a separator.
        pairs: whether they are preference pairs.
        ids: example ids of the rows that may be trained on, [pool].
        labels: int [rows], 1 shows the behaviour, 0 does not, −1 unknown.
        topics: of each row; None where no field was named.
        fitted: bool [rows], the rows that were labelled to fit the direction that rows are ranked by: what labels
            say of them is no test of a ranking.
        left_out: held-out examples that do not measure, since what ranks or too many rows have their prompt.
        untrained: rows that are not trained on, since they have a held-out prompt.
    """

    concept: Concept
    queries: tuple[LabelledExample, ...] | None
    directions: dict[int, np.ndarray]
    held_out: HeldOut
    prompts: list[str]
    rows: Rows
    pairs: bool
    ids: np.ndarray
    labels: np.ndarray
    topics: list[str] | None
    fitted: np.ndarray
    left_out: int
    untrained: int

    @property
    def judged(self) -> np.ndarray:
        """bool [rows], the rows whose label is known and that nothing was fitted to."""
        return (self.labels >= 0) & ~self.fitted

    @property
    def ranked_here(self) -> bool:
        """Whether rows are ranked by half of the labels, not as in the audit."""
        return bool(self.directions)


def setting_of(
    sources: Sources, concept: Concept, options: ResolvedOptions, lm: LanguageModel, progress: Progress
) -> Setting:
    ranking, given = _halves(sources, concept, options)
    apart = keep_apart(sources, given, _rank_by(sources, concept, ranking, options))
    held = apart.held
    _check_enough(concept, "measure on", held, apart.left_out)
    if apart.left_out or apart.rows:
        progress.say(
            f"Of {len(given)} held-out examples {apart.left_out} are left out, since what ranks or many rows have "
            f"their prompt; {len(apart.rows)} rows with a held-out prompt are not trained on"
        )
    spread = sources.read(store_queries.spreads)
    layers = sources.layers
    fit = fit_of(sources, concept)

    def directions(examples: Sequence[LabelledExample], layers: Sequence[int]) -> dict[int, np.ndarray]:
        found = example_activations(sources, examples, layers, progress)
        labelled = np.array([e.label for e in examples])
        return {layer: fit_direction(fit, found[layer], labelled, spread[layer]) for layer in layers}

    tokens = tokens_of(sources)
    hashes = {example.content_hash for example in held}
    usable = [
        row.example_id
        for row in tokens
        if has_loss(row) and row.content_hash not in hashes and row.example_id not in apart.rows
    ]
    labels = np.full(len(tokens), -1)
    origin = options.origin
    if origin:
        values = sources.read(lambda cursor: metadata_values(cursor, origin))
        unknown = sorted(set(options.positive) - {str(v) for v in values})
        if unknown:
            raise ConceptError(
                f"--positive {', '.join(unknown)}: no row has this {origin}; there are "
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
    if options.pool_rows is not None and len(pool) > options.pool_rows:
        drawn = shuffled([f"pool:{i}" for i in pool.tolist()], 0)[: options.pool_rows]
        pool = np.sort(pool[drawn])
    negatives = rendered(sources, lm, [e for e in held if e.label == 0])
    natural = _natural(as_rows([tokens[i] for i in withheld]), negatives, options.recipe.max_tokens)
    prompts, texts = _prompts(sources, lm, held, options.answer_tokens)
    positives = rendered(sources, lm, [e for e in held if e.label == 1])
    here = options.held_out is None
    ranked_by = directions(ranking, layers) if here else {}
    fitted_to = {example.content_hash for example in ranking}
    if not here and concept.kind == "probe":
        fitted_to = {e.content_hash for e in sources.read(lambda cursor: workspace.labels(cursor, concept.name))}
    measured_by = directions(held, (concept.layer,))[concept.layer]
    return Setting(
        concept=replace(concept, direction=ranked_by[concept.layer]) if here else concept,
        queries=tuple(ranking) if here else None,
        directions=ranked_by,
        held_out=HeldOut(concept.layer, measured_by, prompts, positives, negatives, natural),
        prompts=texts,
        rows=as_rows(tokens),
        pairs=sources.pairs,
        ids=pool,
        labels=labels,
        topics=_topics(sources, options),
        fitted=np.array([row.content_hash in fitted_to for row in tokens], bool),
        left_out=apart.left_out,
        untrained=len(apart.rows),
    )


def split(examples: Sequence[LabelledExample]) -> tuple[list[LabelledExample], list[LabelledExample]]:
    """Two halves that share no prompt, each with half of the positive and half of the negative prompts.

    The same examples are split the same way in any order.
    """
    by_prompt: dict[str, list[LabelledExample]] = {}
    for example in distinct(examples):
        by_prompt.setdefault(asked(example) or _prompt_hash(example), []).append(example)
    groups = {min(_prompt_hash(e) for e in same): same for same in by_prompt.values()}
    halves: tuple[list[LabelledExample], list[LabelledExample]] = ([], [])
    by_labels: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(groups):
        by_labels.setdefault(tuple(sorted({e.label for e in groups[name]})), []).append(name)
    for names in by_labels.values():
        for place, name in enumerate(names):
            halves[place % 2].extend(sorted(groups[name], key=lambda e: e.content_hash))
    return halves


def _halves(
    sources: Sources, concept: Concept, options: ResolvedOptions
) -> tuple[list[LabelledExample], list[LabelledExample]]:
    """The examples that rank, and those that measure."""
    ranking: list[LabelledExample]
    if options.held_out is not None:
        ranking, held = [], distinct(options.held_out)
    elif concept.kind == "probe":
        ranking, held = split(sources.read(lambda cursor: workspace.labels(cursor, concept.name)))
    else:
        raise ConceptError(
            f"{concept.name}: an SAE feature has no labelled examples to measure on; give some that are not "
            "among the rows with --held-out"
        )
    if ranking:
        _check_enough(concept, "rank with", ranking)
    _check_enough(concept, "measure on", held)
    return ranking, held


def _rank_by(
    sources: Sources, concept: Concept, ranking: Sequence[LabelledExample], options: ResolvedOptions
) -> list[LabelledExample]:
    """Examples and rows that any ranking is made from."""
    made = list(ranking)
    if options.held_out is not None and concept.kind == "probe":
        made += sources.read(lambda cursor: workspace.labels(cursor, concept.name))
    feature = concept.feature_id
    if feature is not None:
        rows = sources.read(lambda cursor: store_queries.strongest_rows(cursor, feature, STRONGEST_ROWS))
        made += [LabelledExample(messages_from_json(text), 1) for text in rows["messages"]]
    for candidate in options.methods:
        made += candidate.options.query.queries or ()
    return made


def _check_enough(concept: Concept, use: str, part: Sequence[LabelledExample], left_out: int = 0) -> None:
    counts = [sum(e.label == label for e in part) for label in (1, 0)]
    if min(counts) < MIN_EACH:
        why = (
            f" ({left_out} more have a prompt that ranks, or that more than one in a hundred rows have)"
            if left_out
            else ""
        )
        raise ConceptError(
            f"{concept.name}: {counts[0]} positive and {counts[1]} negative examples to {use} are too few{why}; "
            f"at least {MIN_EACH} of each are needed. Label more (half of a probe's labels rank, the other "
            "half measures), or give others to measure on with --held-out"
        )


def _prompt_hash(example: LabelledExample) -> str:
    before = [f"{m.role}\0{m.content}" for m in example.messages[:-1]] or [example.messages[-1].content]
    return hashlib.blake2b("\1".join(before).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _withheld(usable: Sequence[int], labels: np.ndarray, count: int) -> list[int]:
    """Rows to measure the loss on: natural ones where the origin is known, else any; a tenth at most."""
    natural = [i for i in usable if labels[i] != 1]
    order = shuffled([f"withheld:{i}" for i in natural], 0)
    return sorted(natural[place] for place in order[: min(count, len(usable) // 10)])


def _natural(withheld: Rows, negatives: Rows, max_tokens: int) -> Rows:
    """Rows to measure the loss on; of preference pairs their chosen sides."""
    parts = sequences(withheld.ids, withheld.response)
    chosen = np.flatnonzero(parts.sign == 1)
    ids, response = ([part[i] for i in chosen] for part in (parts.ids, parts.response))
    return shorter(Rows(ids + list(negatives.ids), response + list(negatives.response)), max_tokens)


def _prompts(
    sources: Sources, lm: LanguageModel, examples: Sequence[LabelledExample], answer_tokens: int
) -> tuple[list[np.ndarray], list[str]]:
    """Distinct prompts as tokens, with room for an answer, and their last turn as text."""
    max_tokens = sources.manifest.configuration["max_tokens"]
    # Of a prompt that is too long the end counts: there the question is, and the answer's turn begins.
    renderer = ChatRenderer(lm.tokenizer, sys.maxsize)
    found: dict[str, tuple[np.ndarray, str]] = {}
    for example in examples:
        if len(example.messages) > 1:
            turns = example.messages[:-1] if example.messages[-1].role == "assistant" else example.messages
            found.setdefault(
                _prompt_hash(example),
                (with_room(lm, renderer.prompt(turns)[-max_tokens:], answer_tokens), turns[-1].content),
            )
    if not found:
        raise ConceptError("none of the held-out examples has a prompt for the model to answer; give conversations")
    return [ids for ids, _ in found.values()], [text for _, text in found.values()]


def rendered(sources: Sources, lm: LanguageModel, examples: Iterable[LabelledExample]) -> Rows:
    renderer = ChatRenderer(lm.tokenizer, sources.manifest.configuration["max_tokens"])
    made = [renderer.render(example.messages) for example in examples]
    return Rows([row.input_ids for row in made], [row.response for row in made])


def _topics(sources: Sources, options: ResolvedOptions) -> list[str] | None:
    topic = options.topic
    if topic is None:
        return None
    return [str(v) for v in sources.read(lambda cursor: metadata_values(cursor, topic))]


def tokens_of(sources: Sources) -> list[TokenizedExample]:
    tokens = sources.shards("tokens")
    return [row for number in tokens.numbers() for row in read_tokens(tokens, number)]


def fit_of(sources: Sources, concept: Concept) -> ProbeFit:
    """How the concept's probe was fitted; what probes are usually fitted with, for an SAE feature."""
    saved = {probe.name: probe.fit for probe in sources.read(workspace.probes)}
    return saved[concept.name] if concept.kind == "probe" else "logistic_regression"


def digest(arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
