"""A row with another response: which of its turns is answered anew, and the conversation that comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from concept_audit.errors import AuditError
from concept_audit.evidence.endpoint import Endpoint, printable
from concept_audit.model.chat import ChatRenderer
from concept_audit.types import CONTENT, Message

OF_ENDPOINTS = ("system", "user", "assistant")
"""Roles of the turns that an endpoint is sent; tools and their answers are not among them."""


@dataclass(frozen=True)
class Answer:
    """What stands in place of a response.

    Attributes:
        text: the answer.
        ended: whether it came to its own end; where it was cut, no row teaches to end there.
    """

    text: str
    ended: bool = True


def answered_turn(messages: Sequence[Message], response: np.ndarray) -> int:
    """The assistant turn that a row's last response is of.

    Args:
        messages: a conversation, no preference pair.
        response: bool [tokens], of the row as it was cut: turns of which nothing is left are not among them.

    Returns:
        its place among the messages; 0 is a row without a prompt.
    """
    counted = [place for place, turn in enumerate(messages) if turn.role == "assistant" and turn.trained]
    runs = int((np.diff(response.astype(np.int8), prepend=0) == 1).sum())
    return counted[min(max(runs, 1), len(counted)) - 1]


def rewritten(
    renderer: ChatRenderer, messages: Sequence[Message], response: np.ndarray, answer: Answer
) -> tuple[np.ndarray, np.ndarray]:
    """A row as fine-tuning reads it once its last response is another: int32 and bool [tokens].

    All that stands before the response stays, earlier turns that count among it; what stands behind it, and has no
    loss, is left out. The token that ends the turn is learnt as in any row, unless the answer was cut.

    Args:
        response: bool [tokens], which of the row's tokens the loss sees.
    """
    turn = answered_turn(messages, response)
    row = renderer.render((*messages[:turn], Message("assistant", answer.text)))
    counts = row.response.copy()
    words = np.flatnonzero(row.parts == CONTENT)
    if not answer.ended and len(words):
        counts[words[-1] + 1 :] = False
    return row.input_ids, counts


def endpoint_answer(endpoint: Endpoint, messages: Sequence[Message], longest: int) -> Answer:
    """What another model answers to a conversation.

    Args:
        messages: up to where the answer begins.
        longest: tokens of the answer.

    Raises:
        AuditError: a turn is one that endpoints are not sent, the endpoint cannot be used, or it replies nothing.
    """
    strange = sorted({turn.role for turn in messages if turn.role not in OF_ENDPOINTS or turn.calls})
    if strange:
        raise AuditError(
            f"{endpoint.url_option} {endpoint.url}: a row has turns with tools ({', '.join(strange)}), which endpoints "
            f"are not sent; leave {endpoint.url_option} out, and the audited model answers"
        )
    text, ended = endpoint.reply([{"role": turn.role, "content": turn.content} for turn in messages], longest)
    if not text.strip():
        raise AuditError(
            f"{endpoint.model_option} {endpoint.model}: replied nothing to {printable(messages[-1].content[:80])!r}; "
            "choose another model"
        )
    # Halves of characters, which JSON may hold and no file can.
    return Answer(text.encode("utf-8", "replace").decode("utf-8"), ended)
