"""Stage: the model's own answer to every row's prompt, generated once and kept."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from concept_audit.influence.queries import Rows
from concept_audit.model.activations import response_activations
from concept_audit.model.chat import ChatRenderer
from concept_audit.model.generate import answers, room_after, with_room
from concept_audit.model.load import LanguageModel
from concept_audit.model.options import ModelSource
from concept_audit.model.pairs import separator
from concept_audit.pipeline.engine import Worker
from concept_audit.pipeline.sources import Sources
from concept_audit.progress import Progress
from concept_audit.store.activations import write_answers, write_means
from concept_audit.store.examples import TokenizedExample, TokenizedText, read_tokens
from concept_audit.store.shard_store import RowShards
from concept_audit.types import PROMPT, LabelledExample

ANSWER_TOKENS = 128
"""Answers are cut at this many tokens."""


@dataclass(frozen=True)
class Answering:
    """The model's own answers, with the mean response activations of the rows that have them instead.

    A prompt is what a row's tokens are up to its last response; rows without one, such as plain
    text, get no answer.

    Attributes:
        tokens: the rows as the model reads them.
        answers, means: to be made.
        layers: whose activations are kept.
    """

    tokens: RowShards
    answers: RowShards
    means: RowShards
    model: ModelSource
    layers: tuple[int, ...]

    @property
    def outputs(self) -> tuple[RowShards, ...]:
        return self.answers, self.means

    def open(self, worker: Worker) -> tuple[LanguageModel, ChatRenderer, Worker]:
        lm = worker.model(self.model)
        return lm, ChatRenderer(lm.tokenizer, lm.context), worker

    def run(self, opened: tuple[LanguageModel, ChatRenderer, Worker], number: int) -> None:
        lm, renderer, worker = opened
        rows = read_tokens(self.tokens, number)
        texts: dict[int, tuple[str, int]] = {}
        means = {layer: np.full((len(rows), lm.d_model), np.nan, np.float32) for layer in self.layers}
        short = 0
        for unit in self.tokens.partition.units(number):
            asked = {place: start for place in range(unit.start, unit.stop) if (start := last_response(rows[place]))}
            worker.advance(unit.stop - unit.start - len(asked))
            made: dict[int, np.ndarray] = {}
            places = list(asked)
            for batch in answers(lm, [rows[place].input_ids[:start] for place, start in asked.items()], ANSWER_TOKENS):
                made |= {places[index]: tokens for index, tokens in batch.items()}
                worker.advance(len(batch))
            short += sum(
                room_after(lm, rows[place].input_ids[:start]) < ANSWER_TOKENS for place, start in asked.items()
            )
            ids = [np.concatenate([rows[place].input_ids[:start], made[place]]) for place, start in asked.items()]
            response = [
                np.concatenate([rows[place].parts[:start] != PROMPT, np.ones(len(made[place]), bool)])
                for place, start in asked.items()
            ]
            for found in response_activations(lm, ids, response, self.layers) if asked else ():
                for row in found:
                    for layer, mean in row.mean.items():
                        means[layer][places[row.index]] = mean
            texts |= {rows[place].example_id: (renderer.decode(made[place]), len(made[place])) for place in places}
        if short:
            worker.say(
                f"{short} prompts leave less than {ANSWER_TOKENS} of the model's {lm.positions:,} positions: "
                "their own answers end there"
            )
        write_answers(self.answers, number, texts)
        write_means(self.means, number, means)


def answered(lm: LanguageModel, prompts: Sequence[LabelledExample], max_tokens: int, progress: Progress) -> Rows:
    """Prompts with the answers that the model itself gives, as tokens.

    Args:
        prompts: conversations; an assistant turn at the end is left out.
    """
    # Of a prompt that is too long the end counts: there the question is, and the answer's turn begins.
    renderer = ChatRenderer(lm.tokenizer, sys.maxsize)
    turns = [
        example.messages[:-1] if example.messages[-1].role == "assistant" else example.messages for example in prompts
    ]
    asked = [with_room(lm, renderer.prompt(messages)[-max_tokens:], ANSWER_TOKENS) for messages in turns]
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
    """Where the last run of response tokens begins, of a pair's chosen side; None if nothing stands before it."""
    response = np.flatnonzero(row.parts[: separator(row.input_ids)] != PROMPT)
    if not len(response):
        return None
    breaks = np.flatnonzero(np.diff(response) > 1)
    start = int(response[breaks[-1] + 1] if len(breaks) else response[0])
    return start or None


def own_answers(sources: Sources, progress: Progress) -> RowShards:
    """Mean response activations of the rows with the model's own answers, which are generated where they are missing."""
    work = Answering(
        sources.shards("tokens"),
        sources.shards("answers"),
        sources.shards("answer_activations"),
        sources.model_source,
        sources.layers,
    )
    if any(output.missing() for output in work.outputs):
        sources.driver(progress).finish(work, "The model's own answers", work.tokens.partition.sizes())
    return work.means
