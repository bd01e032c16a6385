"""Activations of labelled examples: from the audit where they are its rows, else from the model, and kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from concept_audit.errors import ConceptError, ModelError
from concept_audit.model.activations import response_activations
from concept_audit.model.chat import ChatRenderer
from concept_audit.model.load import LanguageModel
from concept_audit.model.pairs import sequences
from concept_audit.pipeline.sources import Sources
from concept_audit.progress import Progress
from concept_audit.store import derived, queries
from concept_audit.store.activations import means_of
from concept_audit.types import LabelledExample


def example_activations(
    sources: Sources, examples: Sequence[LabelledExample], layers: Sequence[int], progress: Progress
) -> dict[int, np.ndarray]:
    """Mean response activations: layer → float32 [examples, d_model].

    Raises:
        ConceptError: an example has no response tokens within the audit's length of a row.
    """
    reader = sources.manifest.reader
    max_tokens = sources.manifest.configuration["max_tokens"]
    hashes = [example.content_hash for example in examples]
    rows = sources.read(lambda cursor: queries.find_rows(cursor, hashes))
    kept = sources.read(
        lambda cursor: {layer: derived.cached_activations(cursor, reader, layer, hashes) for layer in layers}
    )
    outside = [e for e in examples if e.content_hash not in rows and any(e.content_hash not in kept[k] for k in layers)]
    if outside:
        fresh = _run(sources.model(), outside, layers, max_tokens, progress)
        sources.cache(lambda cursor: derived.cache_activations(cursor, reader, fresh))
        for layer in layers:
            kept[layer] |= {content_hash: means[layer] for content_hash, means in fresh.items()}
    found = {}
    for layer in layers:
        shards = sources.shards("activations")
        from_rows = dict(zip(rows, means_of(shards, layer, list(rows.values())), strict=True)) if rows else {}
        found[layer] = np.stack([from_rows[h] if h in from_rows else kept[layer][h] for h in hashes])
    empty = np.flatnonzero(np.isnan(found[layers[0]]).any(1))
    if len(empty):
        text = examples[empty[0]].messages[-1].content[:60]
        raise ConceptError(
            f"example {empty[0] + 1} has no response within the first {max_tokens:,} tokens, so there is "
            f"nothing to learn from it; shorten its prompt or leave it out. It ends with {text!r}"
        )
    return found


def _run(
    lm: LanguageModel, examples: Sequence[LabelledExample], layers: Sequence[int], max_tokens: int, progress: Progress
) -> dict[str, dict[int, np.ndarray]]:
    renderer = ChatRenderer(lm.tokenizer, max_tokens)
    rows = []
    for number, example in enumerate(examples, start=1):
        try:
            rows.append(renderer.render(example.messages))
        except ModelError as error:
            raise ConceptError(f"example {number}: {error}") from error
    parts = sequences([r.input_ids for r in rows], [r.response for r in rows])
    found: dict[tuple[int, int], dict[int, np.ndarray]] = {}
    with progress.stage("Running the model on the examples", len(parts.ids), "examples") as stage:
        for batch in response_activations(lm, parts.ids, parts.response, layers):
            for row in batch:
                found[int(parts.owner[row.index]), int(parts.sign[row.index])] = row.mean
            stage.advance(len(batch))
    means = {}
    for number, example in enumerate(examples):
        chosen, rejected = found[number, 1], found.get((number, -1))
        # Of a pair the difference of its sides, as of rows.
        means[example.content_hash] = {k: m if rejected is None else m - rejected[k] for k, m in chosen.items()}
    return means
