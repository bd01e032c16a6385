"""Prompts that nothing was trained on: held-out prompts are kept apart from training rows and from what ranks.

A prompt that is answered in training is known to the model whatever its held-out answer is, so
whole conversations being different does not keep them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from concept_audit.pipeline.sources import Sources
from concept_audit.store.examples import read_conversations
from concept_audit.types import LabelledExample, Message, sides

COMMON_SHARE, COMMON_LEAST = 0.01, 10
"""A prompt of more rows than this is no held-out prompt; rows of a rarer one are not trained on."""


@dataclass(frozen=True)
class KeptApart:
    """Held-out examples, and rows, none of which have a prompt in common.

    Attributes:
        held: the examples to measure on.
        left_out: how many were left out, since what ranks or too many rows have their prompt.
        rows: ids of the rows with a held-out prompt, which no run may train on.
    """

    held: list[LabelledExample]
    left_out: int
    rows: frozenset[int]


def prompt_of(messages: Sequence[Message]) -> str:
    """What the turns say, whatever the case and the spaces; empty if there are none."""
    return "\0".join(" ".join(message.content.casefold().split()) for message in messages)


def asked(example: LabelledExample) -> str:
    """The prompt that a labelled example is an answer to; empty if it has none."""
    answered = example.messages[-1].role == "assistant"
    return prompt_of(example.messages[:-1] if answered else example.messages)


def keep_apart(sources: Sources, held: Sequence[LabelledExample], ranking: Iterable[LabelledExample]) -> KeptApart:
    """Leave out what held-out examples have in common with training rows and with what ranks them.

    Args:
        ranking: the labelled examples and rows that rankings are made from.
    """
    prompts = {asked(example) for example in held} - {""}
    known = {asked(example) for example in ranking}
    rows: dict[str, set[int]] = {prompt: set() for prompt in prompts}
    shards, count = sources.shards("rows"), 0
    for number in shards.numbers():
        for row, _, _, messages in read_conversations(shards, number):
            count += 1
            for prompt in prompts.intersection(_answered(messages)):
                rows[prompt].add(row)
    most = max(COMMON_LEAST, COMMON_SHARE * count)
    excluded = {prompt for prompt in prompts if prompt in known or len(rows[prompt]) > most}
    kept = [example for example in held if asked(example) not in excluded]
    shared = frozenset(row for prompt in prompts - excluded for row in rows[prompt])
    return KeptApart(kept, len(held) - len(kept), shared)


def _answered(messages: Sequence[Message]) -> Iterator[str]:
    """The prompt of every answer in a conversation, or in both of a preference pair."""
    for side in sides(messages):
        for place, message in enumerate(side):
            if message.role == "assistant" and place:
                yield prompt_of(side[:place])
