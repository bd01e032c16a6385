"""The nouns of the project: messages, examples, concepts, labelled examples."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

ROLES = ("system", "user", "assistant", "tool")

ConceptKind = Literal["sae_feature", "probe"]
ProbeFit = Literal["difference_of_means", "logistic_regression"]
"""How a probe's direction is found from labelled examples."""
Method = Literal[
    "vector_filter",
    "projection_difference",
    "concept_influence",
    "influence_function",
    "gradient_dot",
    "activation_similarity",
    "bm25",
]
METHODS: tuple[Method, ...] = get_args(Method)
PROMPT, END_OF_TURN, CONTENT = 0, 1, 2
"""What a token is: before or between responses; a response's closing token; a response's own text."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


def content_hash(messages: Sequence[Message]) -> str:
    """Identify a conversation by its turns alone, for good.

    Each role and content is framed by its byte length, so that no two different
    conversations share an input to the hash. Metadata do not count: labels and
    flags stay with a text when its metadata change or the file is reordered.

    Returns:
        32 hexadecimal digits (BLAKE2b, 128 bits).
    """
    digest = hashlib.blake2b(digest_size=16)
    for message in messages:
        for part in (message.role, message.content):
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()


@dataclass(frozen=True)
class Example:
    """One row of training data.

    Attributes:
        messages: the conversation; at least one assistant turn.
        source: where the row was read from (a file's name, a data set's name).
        source_row: 1-based line or row number in the source.
        metadata: every column that is not part of the conversation, JSON types only.
    """

    messages: tuple[Message, ...]
    source: str
    source_row: int
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def content_hash(self) -> str:
        return content_hash(self.messages)

    @property
    def last_assistant(self) -> int:
        """Index of the last assistant turn."""
        return max(i for i, m in enumerate(self.messages) if m.role == "assistant")

    @property
    def prompt(self) -> str:
        """What came before the last assistant turn; roles are named when there are several turns."""
        before = self.messages[: self.last_assistant]
        if len(before) == 1 and before[0].role == "user":
            return before[0].content
        return "\n\n".join(f"{m.role.capitalize()}: {m.content}" for m in before)

    @property
    def response(self) -> str:
        """The last assistant turn."""
        return self.messages[self.last_assistant].content


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
