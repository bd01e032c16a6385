"""From a conversation to tokens, with the mask of the tokens that the loss sees.

Response tokens are those of the assistant turns with their end-of-turn token, as
fine-tuning trains on. They are found by rendering the conversation up to each
turn, which works for every chat template; templates that mark the assistant's
tokens themselves are rare.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from concept_audit.errors import ModelError
from concept_audit.types import CONTENT, END_OF_TURN, PROMPT, Message

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
"""For models without a chat template: ``User:``, the turn, a blank line, ``Assistant:``, the turn, end of text."""


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
        self._template = None if tokenizer.chat_template else PLAIN_TEMPLATE
        self._special = set(tokenizer.all_special_ids) | {
            i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    def render(self, messages: Sequence[Message]) -> TokenizedRow:
        """Tokens, offsets and parts of one conversation.

        Raises:
            ModelError: the chat template refuses the conversation.
        """
        if len(messages) == 1 and messages[0].role == "assistant":
            text = messages[0].content
            spans = [(0, len(text))]
            text += self._tokenizer.eos_token or ""
            add_special = True
        else:
            text, spans = self._render_turns([{"role": m.role, "content": m.content} for m in messages])
            add_special = self._template is not None
        encoded = self._tokenizer(
            text,
            add_special_tokens=add_special,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids = np.asarray(encoded["input_ids"], np.int32)
        offsets = np.asarray(encoded["offset_mapping"], np.int32).reshape(-1, 2)
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

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """Tokens of a conversation up to where the assistant's next turn begins: int32 [tokens].

        Raises:
            ModelError: the chat template refuses the conversation.
        """
        from jinja2.exceptions import TemplateError

        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text = self._apply(turns, add_generation_prompt=True)
        except TemplateError as error:
            merged = _system_into_first_user(turns)
            if merged is None:
                raise ModelError(f"the model's chat template refuses this conversation: {error}") from error
            text = self._apply(merged, add_generation_prompt=True)
        encoded = self._tokenizer(text, add_special_tokens=self._template is not None, verbose=False)
        return np.asarray(encoded["input_ids"], np.int32)[: self._max_tokens]

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """The text of tokens, without special ones."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_token(self, token_id: int) -> str:
        """The text that a single token stands for."""
        return self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)

    def _apply(self, turns: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(
            turns, chat_template=self._template, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _render_turns(self, turns: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and where the text of each assistant turn lies in it."""
        from jinja2.exceptions import TemplateError

        try:
            text = self._apply(turns)
        except TemplateError as error:
            merged = _system_into_first_user(turns)
            if merged is None:
                raise ModelError(f"the model's chat template refuses this conversation: {error}") from error
            return self._render_turns(merged)
        spans = []
        cursor = 0
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            prefix = self._apply(turns[:i], add_generation_prompt=True) if i else ""
            # A template may change earlier turns once later ones follow (Qwen 3
            # drops old reasoning); then the turn is found by its own text.
            start = max(cursor, len(prefix)) if text.startswith(prefix) else cursor
            content = turn["content"].strip()
            found = text.find(content, start)
            if found < 0:
                raise ModelError(
                    "the model's chat template changes the text of an assistant turn, so its tokens "
                    f"cannot be told apart; the turn begins {content[:60]!r}"
                )
            start = start if text.startswith(prefix) else found
            cursor = found + len(content)
            spans.append((start, cursor))
        return text, spans

    def _parts(self, ids: np.ndarray, offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
        parts = np.zeros(len(ids), np.uint8)
        special = np.isin(ids, list(self._special))
        starts, ends = offsets[:, 0], offsets[:, 1]
        for start, end in spans:
            # A token belongs to the turn if any of its characters do: tokenizers
            # merge a space before a word into the word.
            inside = (ends > start) & (starts < end)
            parts[inside & ~special] = CONTENT
            parts[inside & special] = END_OF_TURN
            closing = np.flatnonzero(special & (starts >= end))
            if len(closing) and inside.any():
                last = np.flatnonzero(inside)[-1]
                between = slice(last + 1, closing[0] + 1)
                # Only if nothing but white space lies between, else the special
                # token opens the next turn and the template has no closing one.
                if not _has_words(ids[last + 1 : closing[0]], self._tokenizer):
                    parts[between] = END_OF_TURN
        return parts


def _has_words(ids: np.ndarray, tokenizer: Any) -> bool:
    return bool(len(ids)) and re.search(r"\S", tokenizer.decode(ids.tolist())) is not None


def _system_into_first_user(turns: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """For templates without a system role (Gemma): its text goes before the first user turn."""
    if len(turns) < 2 or turns[0]["role"] != "system" or turns[1]["role"] != "user":
        return None
    merged = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
    return [merged, *turns[2:]]
