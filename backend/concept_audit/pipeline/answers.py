"""Stage: the model's own answer to every row's prompt, generated once and kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from concept_audit.influence.queries import Rows
from concept_audit.model.activations import response_activations
from concept_audit.model.chat import PROMPT, ChatRenderer
from concept_audit.model.generate import answers
from concept_audit.model.load import LanguageModel
from concept_audit.progress import Progress
from concept_audit.store.layout import Layout
from concept_audit.store.shards import TokenizedExample, TokenizedText, read_tokens, write_answers
from concept_audit.types import LabelledExample

ANSWER_TOKENS = 128
"""Answers are cut at this many tokens."""


def answer_stage(layout: Layout, lm: LanguageModel, layers: Sequence[int], progress: Progress) -> None:
    """Generate the answers that are missing, with the mean response activations of the rows that have them.

    A prompt is what a row's tokens are up to its last response; rows without one, such as plain
    text, get no answer.
    """
    renderer = ChatRenderer(lm.tokenizer, lm.context)
    numbers = layout.shard_numbers("examples")
    total = sum(len(read_tokens(layout, number)) for number in numbers)
    with progress.stage("The model's own answers", total, "rows") as stage:
        for number in numbers:
            rows = read_tokens(layout, number)
            if layout.shard("answer_activations", number).exists():
                stage.skip(len(rows))
                continue
            starts = [last_response(row) for row in rows]
            asked = [i for i, start in enumerate(starts) if start]
            stage.advance(len(rows) - len(asked))
            made: dict[int, np.ndarray] = {}
            for batch in answers(lm, [rows[i].input_ids[: starts[i]] for i in asked], ANSWER_TOKENS):
                made |= {asked[place]: tokens for place, tokens in batch.items()}
                stage.advance(len(batch))
            ids = [np.concatenate([rows[i].input_ids[: starts[i]], made[i]]) for i in asked]
            response = [
                np.concatenate([rows[i].parts[: starts[i]] != PROMPT, np.ones(len(made[i]), bool)]) for i in asked
            ]
            means = {layer: np.full((len(rows), lm.d_model), np.nan, np.float32) for layer in layers}
            for found in response_activations(lm, ids, response, layers) if asked else ():
                for row in found:
                    for layer, mean in row.mean.items():
                        means[layer][asked[row.index]] = mean
            texts = {rows[i].example_id: (renderer.decode(made[i]), len(made[i])) for i in asked}
            write_answers(layout, number, texts, means)


def answered(lm: LanguageModel, prompts: Sequence[LabelledExample], max_tokens: int, progress: Progress) -> Rows:
    """Prompts with the answers that the model itself gives, as tokens.

    Args:
        prompts: conversations; an assistant turn at the end is left out.
    """
    renderer = ChatRenderer(lm.tokenizer, max_tokens)
    turns = [
        example.messages[:-1] if example.messages[-1].role == "assistant" else example.messages for example in prompts
    ]
    asked = [renderer.prompt(messages) for messages in turns]
    made: dict[int, np.ndarray] = {}
    with progress.stage("The model's own answers to the queries", len(asked), "queries") as stage:
        for batch in answers(lm, asked, ANSWER_TOKENS):
            made |= batch
            stage.advance(len(batch))
    ids = [np.concatenate([prompt, made[i]]) for i, prompt in enumerate(asked)]
    response = [np.arange(len(ids[i])) >= len(prompt) for i, prompt in enumerate(asked)]
    return Rows(ids, response)


def own_answer(lm: LanguageModel, row: TokenizedText) -> str | None:
    """What the model itself would say in place of a row's last response; None if nothing stands before it."""
    start = last_response(row)
    if not start:
        return None
    (made,) = answers(lm, [row.input_ids[:start]], ANSWER_TOKENS)
    return ChatRenderer(lm.tokenizer, lm.context).decode(made[0])


def last_response(row: TokenizedExample | TokenizedText) -> int | None:
    """Where the last run of response tokens begins; None if there is none, or nothing before it."""
    response = np.flatnonzero(row.parts != PROMPT)
    if not len(response):
        return None
    breaks = np.flatnonzero(np.diff(response) > 1)
    start = int(response[breaks[-1] + 1] if len(breaks) else response[0])
    return start or None
