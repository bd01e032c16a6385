"""The nouns of the project: messages, examples, concepts, labelled examples."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np

ROLES = ("system", "user", "assistant", "tool")
TOOLS = "tools"
"""The role of what stands before the turns where the model is offered tools: a JSON list of their descriptions."""

ConceptKind = Literal["sae_feature", "probe"]
ProbeFit = Literal["difference_of_means", "logistic_regression"]
"""How a probe's direction is found from labelled examples."""
Method = Literal[
    "feature_activation",
    "vector_filter",
    "projection_difference",
    "concept_influence",
    "influence_function",
    "gradient_dot",
    "activation_similarity",
    "bm25",
]
METHODS: tuple[Method, ...] = get_args(Method)
OF_FEATURES: tuple[Method, ...] = ("feature_activation",)
"""Methods that SAE features have and probes have not."""
NOT_OF_PAIRS: tuple[Method, ...] = ("feature_activation", "projection_difference")
"""Methods that preference pairs, which have two responses, do not have."""
REJECTED = "rejected"
"""The role of what stands between the two sides of a preference pair: the chosen conversation, and the rejected."""
SEPARATOR = -1
"""In place of a token between the sides of a pair: no model takes it, so that nobody reads both as one text."""
LARGEST = 1e100
"""A larger number is no reward: the variance of a group has to be a number, too."""
GRPO_ADVANTAGE, ROLLOUT_GROUP = "grpo_advantage", "rollout_group"
"""Metadata fields that a build adds to rollouts: the advantage made of their rewards, and the number of their group."""
DOCUMENT_NUMBER, WINDOW_NUMBER = "document_number", "window_number"
"""Metadata fields that a build adds to windows of documents that it splits; see `Window`."""
PROMPT, END_OF_TURN, CONTENT = 0, 1, 2
"""What a token is: before or between responses; a response's closing token; a response's own text."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        calls: the assistant's tool calls, as JSON: a list of objects with name, arguments (an object) and, where
            there is one, id; empty if there are none.
        reasoning: what the assistant thought before it spoke, where that is kept apart from what it said.
        name: the tool that a tool's turn is of, if that is told.
        call_id: the call that a tool's turn answers, if that is told.
        trained: whether an assistant turn is one that training is to see.
    """

    role: str
    content: str
    calls: str = ""
    reasoning: str = ""
    name: str = ""
    call_id: str = ""
    trained: bool = True

    @property
    def more(self) -> dict[str, Any]:
        """What there is besides role and content, in OpenAI's names and JSON types."""
        found: dict[str, Any] = {"reasoning_content": self.reasoning, "name": self.name, "tool_call_id": self.call_id}
        found = {name: value for name, value in found.items() if value}
        if self.calls:
            found["tool_calls"] = json.loads(self.calls)
        return found if self.trained else found | {"train": False}

    @property
    def text(self) -> str:
        """What the turn says, for people: its reasoning, its words, its calls."""
        calls = json.loads(self.calls) if self.calls else []
        called = [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls]
        return "\n\n".join(part for part in (self.reasoning, self.content, "\n".join(called)) if part)


def content_hash(messages: Sequence[Message]) -> str:
    """Identify a conversation by its turns alone, for good.

    Each role and content is framed by its byte length, so that no two different
    conversations share an input to the hash; what a turn has besides follows it as a turn
    of a role that there is none of. Metadata do not count: labels and
    flags stay with a text when its metadata change or the file is reordered.

    Returns:
        32 hexadecimal digits (BLAKE2b, 128 bits).
    """
    digest = hashlib.blake2b(digest_size=16)
    for message in messages:
        more = message.more
        for part in (message.role, message.content, *(("+", json.dumps(more, sort_keys=True)) if more else ())):
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()


def sides(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """The conversations of a row: one, or of a preference pair the chosen one and the rejected one."""
    places = [place for place, message in enumerate(messages) if message.role == REJECTED]
    edges = [-1, *places, len(messages)]
    return [tuple(messages[before + 1 : end]) for before, end in zip(edges, edges[1:], strict=False)]


def last_answer(messages: Sequence[Message]) -> int:
    """Index of the last assistant turn of a conversation."""
    return max(i for i, m in enumerate(messages) if m.role == "assistant")


@dataclass(frozen=True)
class Window:
    """Where a row lies in the document that it is a part of.

    Attributes:
        document: the document's number among the rows of the data, from 0.
        number: its own among the document's windows, from 1.
        of: how many windows the document has; 1 where it is a row as a whole.
        start, end: in the document's text, in characters; the end is the first one behind it.
    """

    document: int
    number: int
    of: int
    start: int
    end: int


@dataclass(frozen=True)
class Example:
    """One row of training data.

    Attributes:
        messages: the conversation, at least one assistant turn; of a preference pair both, see `sides`.
        source: where the row was read from (a file's name, a data set's name).
        source_row: 1-based line or row number in the source.
        metadata: every column that is not part of the conversation, JSON types only.
        window: where it lies in its document; None where documents are not split.
    """

    messages: tuple[Message, ...]
    source: str
    source_row: int
    metadata: Mapping[str, Any] = field(default_factory=dict)
    window: Window | None = None

    @property
    def content_hash(self) -> str:
        return content_hash(self.messages)

    @property
    def last_assistant(self) -> int:
        """Index of the last assistant turn; of a pair, of the chosen side's."""
        return last_answer(sides(self.messages)[0])

    @property
    def prompt(self) -> str:
        """What came before the last assistant turn; roles are named when there are several turns."""
        before = [m for m in self.messages[: self.last_assistant] if m.role != TOOLS]
        if len(before) == 1 and before[0].role == "user":
            return before[0].content
        return "\n\n".join(f"{m.role.capitalize()}: {m.text}" for m in before)

    @property
    def response(self) -> str:
        """The last assistant turn; of a pair those of both sides, named."""
        said = [side[last_answer(side)].text for side in sides(self.messages)]
        return said[0] if len(said) == 1 else f"Chosen: {said[0]}\n\nRejected: {said[1]}"


def before_answers(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The turns before the first answer that training sees: the prompt, of a trajectory its first one."""
    first = next((i for i, m in enumerate(messages) if m.role == "assistant" and m.trained), len(messages))
    return tuple(messages[:first])


@dataclass(frozen=True)
class Rollouts:
    """Which metadata say how much reinforcement learning weighs each row; see `concept_audit.influence.rollouts`.

    Attributes:
        advantage: the field with the advantage; None where it is made of the rewards.
        reward: the field with the reward, where the advantage is made of it.
        group: the field that tells the rollouts of one prompt; None where the same prompt does, or the row that they
            stood in.
        lists: of rows that held several responses each, the columns of the responses and of what each of them got.
    """

    advantage: str | None = None
    reward: str | None = None
    group: str | None = None
    lists: tuple[str, ...] | None = None

    @property
    def field(self) -> str:
        """The field that says what a row got: advantage or reward."""
        found = self.advantage or self.reward
        assert found is not None, "rollouts have one of them"
        return found

    @property
    def added(self) -> tuple[str, ...]:
        """The metadata fields that a build adds to those of the rows."""
        return (*((GRPO_ADVANTAGE,) if self.reward else ()), *((ROLLOUT_GROUP,) if self.group is None else ()))

    def group_key(self, messages: Sequence[Message], metadata: Mapping[str, Any], place: tuple[str, int]) -> str:
        """What tells a row's group from others: rows with the same are rollouts of one prompt.

        Args:
            place: source and row that it was read from.
        """
        if self.group is not None:
            return json.dumps(metadata.get(self.group), sort_keys=True)
        return json.dumps(place) if self.lists else content_hash(before_answers(messages))

    def as_json(self) -> dict[str, Any]:
        """What a manifest keeps of it."""
        return {**asdict(self), "lists": list(self.lists) if self.lists else None}

    @classmethod
    def from_json(cls, made: Mapping[str, Any]) -> Rollouts:
        """The inverse of `as_json`."""
        return cls(made["advantage"], made["reward"], made["group"], tuple(made["lists"]) if made["lists"] else None)

    def in_words(self) -> str:
        """How the advantage came about, without the name of the group's field."""
        return f"{self.advantage} as it is" if self.advantage else f"{self.reward}, normalised in each group (GRPO)"

    def parameters(self) -> dict[str, Any]:
        """What tells the rankings of rows that weigh so from those of rows that weigh alike, JSON values."""
        by = {"rollout_group": self.group} if self.group and self.reward else {}
        return {"advantage": self.in_words(), **by}


def as_number(value: Any) -> float | None:
    """A metadata value as a number, which tables without types keep as text; None if it is none, or not finite."""
    try:
        found = float(value) if isinstance(value, bool | int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return found if abs(found) <= LARGEST else None


@dataclass(frozen=True)
class SkippedRow:
    """A row of the data that was left out.

    Attributes:
        place: its number among all rows of the data, from 0.
        source, source_row: where it stands.
        reason: why, in words that name the place.
    """

    place: int
    source: str
    source_row: int
    reason: str


@dataclass(frozen=True)
class LabelledExample:
    """An example with the label that a person gave it: 1 shows the behaviour, 0 does not."""

    messages: tuple[Message, ...]
    label: int

    @property
    def content_hash(self) -> str:
        return content_hash(self.messages)


@dataclass(frozen=True)
class Concept:
    """A direction in the residual stream that stands for a behaviour.

    Attributes:
        concept_id: ``sae:<feature>`` or ``probe:<name>``.
        name: what people call it; unique among the concepts of an audit.
        kind: ``sae_feature`` or ``probe``.
        layer: how many blocks have run where the direction lives (``hidden_states[layer]``
            in Hugging Face's numbering).
        direction: float32 [d_model], of unit length.
        version: 1 for an SAE feature; counts the trainings of a probe.
    """

    concept_id: str
    name: str
    kind: ConceptKind
    layer: int
    direction: np.ndarray = field(repr=False)
    version: int = 1

    @property
    def feature_id(self) -> int | None:
        """The SAE feature's number, or None for a probe."""
        return int(self.concept_id.removeprefix("sae:")) if self.kind == "sae_feature" else None


PROBE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.\-]{0,63}")


def methods_of(kind: ConceptKind, pairs: bool = False) -> tuple[Method, ...]:
    """The methods that rank rows by a concept of a kind, or preference pairs."""
    besides = set(NOT_OF_PAIRS if pairs else ()) | set(() if kind == "sae_feature" else OF_FEATURES)
    return tuple(name for name in METHODS if name not in besides)


def usual_method(kind: ConceptKind, pairs: bool = False) -> Method:
    """What rows are ranked by unless something else is asked for; it needs no gradients and no queries."""
    return methods_of(kind, pairs)[0]
