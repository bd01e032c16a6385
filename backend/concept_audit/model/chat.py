"""From a conversation to tokens, with the mask of the tokens that the loss sees.

Response tokens are those of the assistant turns with their end-of-turn token, as
fine-tuning on the text as rendered trains on them: what a template cuts out of a
turn is not there to be learnt, what it adds after the header is. An empty turn's
end-of-turn token counts too; so do the assistant's tool calls, and what tools answer
never does. Turns that a row marks as not to be trained on are read like prompts. `concept_audit.model.turns` finds the turns, with any
chat template; templates that mark the assistant's tokens themselves are rare.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from concept_audit.errors import ModelError
from concept_audit.model.template import ChatTemplate
from concept_audit.model.template_turns import for_template, unknown_to
from concept_audit.model.turns import response_spans
from concept_audit.types import CONTENT, END_OF_TURN, PROMPT, SEPARATOR, Message, sides


@dataclass(frozen=True)
class TokenizedRow:
    """One conversation as the model reads it.

    Attributes:
        text: the rendered conversation.
        input_ids: int32 [tokens].
        starts, ends: int32 [tokens], where each token lies in `text`, in characters.
        parts: uint8 [tokens], each PROMPT, END_OF_TURN or CONTENT.
        truncated: whether tokens beyond the context were cut off.
    """

    text: str
    input_ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    parts: np.ndarray
    truncated: bool

    @property
    def response(self) -> np.ndarray:
        """bool [tokens]: the tokens that the loss sees."""
        return self.parts != PROMPT


class ChatRenderer:
    """Renders conversations for one tokenizer.

    A row with a single assistant turn and nothing before it is plain text: it is
    tokenized as it is, closed by the end-of-text token, and all of it is response.

    Args:
        max_tokens: longer rows are cut at this many tokens, as fine-tuning does.
    """

    def __init__(self, tokenizer: Any, max_tokens: int):
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._template = ChatTemplate(tokenizer)
        self._special = set(tokenizer.all_special_ids) | {
            i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    def render(self, messages: Sequence[Message]) -> TokenizedRow:
        """Tokens, offsets and parts of one conversation; of a preference pair, of both with a separator between them.

        Raises:
            ModelError: the chat template refuses the conversation, or it cannot be told which of its tokens
                are the assistant's.
        """
        first, *others = (self._render(side) for side in sides(messages))
        return _joined(first, others[0]) if others else first

    def _render(self, messages: Sequence[Message]) -> TokenizedRow:
        if len(messages) == 1 and messages[0].role == "assistant":
            text = messages[0].content
            spans = [(0, len(text), False)]
            text += self._tokenizer.eos_token or ""
            add_special = True
        else:
            text, spans = self._conversation(messages)
            add_special = self._template.plain
        ids, offsets = self._encode(text, add_special)
        parts = self._parts(ids, offsets, spans)
        keep = slice(0, self._max_tokens)
        return TokenizedRow(
            text=text,
            input_ids=ids[keep],
            starts=offsets[keep, 0],
            ends=offsets[keep, 1],
            parts=parts[keep],
            truncated=len(ids) > self._max_tokens,
        )

    @property
    def max_tokens(self) -> int:
        """The longest row."""
        return self._max_tokens

    def places(self, text: str) -> np.ndarray:
        """Where the tokens of plain text lie in it, as `render` reads it but for the cut: int32 [tokens, 2].

        Tokens that are put before the text lie nowhere, from 0 to 0; the closing one lies behind it.
        """
        return self._encode(text + (self._tokenizer.eos_token or ""), True)[1]

    def check(self, messages: Sequence[Message]) -> None:
        """Raise what `render` would, for less work."""
        for side in sides(messages):
            if len(side) > 1:
                self._conversation(side)

    def unknown(self, messages: Sequence[Message]) -> list[str]:
        """What a conversation has that the template does not know, and what becomes of it."""
        return list(unknown_to(self._template, messages))

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """Tokens of a conversation up to where the assistant's next turn begins: int32 [tokens].

        They are what `render` gives before that turn's response, where the template writes both alike; where
        it opens ``<think>`` before an answer, as R1's does, so do they.

        Raises:
            ModelError: the chat template refuses the conversation, or it is a preference pair.
        """
        if len(sides(messages)) > 1:
            raise ModelError("a preference pair has two answers, and no single prompt; give a conversation")
        template, turns = for_template(self._template, messages)
        _, text = template.accept(turns, generation=True)
        encoded = self._tokenizer(text, add_special_tokens=self._template.plain, verbose=False)
        return np.asarray(encoded["input_ids"], np.int32)[: self._max_tokens]

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """The text of tokens, without special ones."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_token(self, token_id: int) -> str:
        """The text that a single token stands for."""
        return self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)

    def _encode(self, text: str, add_special: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [tokens], and where they lie in the text, int32 [tokens, 2]."""
        encoded = self._tokenizer(
            text,
            add_special_tokens=add_special,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        offsets = np.asarray(encoded["offset_mapping"], np.int32).reshape(-1, 2)
        return np.asarray(encoded["input_ids"], np.int32), offsets

    def _conversation(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int, bool]]]:
        """The text of a conversation; where in it the turns lie that training is to see, and whether they end in calls."""
        template, turns = for_template(self._template, messages)
        turns, text = template.accept(turns)
        spans = response_spans(template, turns, text)
        called = [bool(turn.get("tool_calls")) for turn in turns if turn["role"] == "assistant"]
        trained = [message.trained for message in messages if message.role == "assistant"]
        return text, [(*span, calls) for span, calls, counts in zip(spans, called, trained, strict=True) if counts]

    def _parts(self, ids: np.ndarray, offsets: np.ndarray, spans: list[tuple[int, int, bool]]) -> np.ndarray:
        parts = np.zeros(len(ids), np.uint8)
        special = np.isin(ids, list(self._special))
        starts, ends = offsets[:, 0], offsets[:, 1]
        for start, end, ends_in_calls in spans:
            # A token belongs to the turn if any of its characters do: tokenizers
            # merge a space before a word into the word.
            inside = (ends > start) & (starts < end) & (end > start)
            parts[inside & ~special] = CONTENT
            parts[inside & special] = END_OF_TURN
            if ends_in_calls and inside.any() and special[np.flatnonzero(inside)[-1]]:
                continue  # such a turn reaches to behind its closing token
            after = starts >= end
            closing = np.flatnonzero(special & after & (ends > starts))
            if len(closing):
                between = slice(int(np.argmax(after)), closing[0] + 1)
                # Only if nothing but white space lies between, else the special
                # token opens the next turn and the template has no closing one.
                if not _has_words(ids[between][:-1], self._tokenizer):
                    parts[between] = END_OF_TURN
        return parts


def _joined(chosen: TokenizedRow, rejected: TokenizedRow) -> TokenizedRow:
    shift = len(chosen.text)

    def both(of_chosen: np.ndarray, between: int, of_rejected: np.ndarray) -> np.ndarray:
        return np.concatenate([of_chosen, np.array([between], of_chosen.dtype), of_rejected])

    return TokenizedRow(
        text=chosen.text + rejected.text,
        input_ids=both(chosen.input_ids, SEPARATOR, rejected.input_ids),
        starts=both(chosen.starts, shift, rejected.starts + shift),
        ends=both(chosen.ends, shift, rejected.ends + shift),
        parts=both(chosen.parts, PROMPT, rejected.parts),
        truncated=chosen.truncated or rejected.truncated,
    )


def _has_words(ids: np.ndarray, tokenizer: Any) -> bool:
    return bool(len(ids)) and re.search(r"\S", tokenizer.decode(ids.tolist())) is not None
