"""A model's chat template: rendering with it, the same text on any day, and what tells two apart."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from concept_audit.errors import ModelError

Turns = Sequence[Mapping[str, Any]]
"""Each with role and content, and some with ``tool_calls``, reasoning, ``name`` and ``tool_call_id``."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
"""For models without a chat template: ``User:``, the turn, a blank line, ``Assistant:``, the turn, end of text."""

DATE = "2024-07-26"
"""The day that every template is told it is: the one that Llama 3's template takes where there is no clock."""
_DIRECTIVES = {
    **{"%Y": "2024", "%y": "24", "%m": "07", "%-m": "7", "%d": "26", "%-d": "26", "%e": "26", "%j": "208"},
    **{"%B": "July", "%b": "Jul", "%h": "Jul", "%A": "Friday", "%a": "Fri", "%w": "5", "%u": "5"},
    **{"%F": DATE, "%D": "07/26/24", "%x": "07/26/24", "%c": "Fri Jul 26 00:00:00 2024"},
    **{"%H": "00", "%-H": "0", "%I": "12", "%-I": "12", "%M": "00", "%S": "00", "%f": "000000", "%p": "AM"},
    **{"%T": "00:00:00", "%X": "00:00:00", "%R": "00:00", "%G": "2024", "%V": "30", "%U": "29", "%W": "30"},
    **{"%s": "1721952000", "%z": "", "%Z": "", "%n": "\n", "%t": "\t", "%%": "%"},
}


class ChatTemplate:
    """Renders conversations as text with the template of one tokenizer.

    Attributes:
        source: the template, in Jinja.
        plain: whether the tokenizer has none, so that `PLAIN_TEMPLATE` is used.
        date: the day that the template is told it is, ISO 8601; None if it does not ask.

    Raises:
        ModelError: the tokenizer has several templates and none of them is the default.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.plain = not tokenizer.chat_template
        try:
            self.source = PLAIN_TEMPLATE if self.plain else tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(f"the tokenizer has several chat templates and no default one: {error}") from error
        self.date = DATE if re.search(r"\bstrftime_now\b", self.source) else None
        self._dated = (_clock() if self.date else "") + self.source
        self._tools: Sequence[Mapping[str, Any]] | None = None

    def offering(self, tools: Sequence[Mapping[str, Any]]) -> ChatTemplate:
        """The same template, told that the model is offered these tools."""
        told = copy.copy(self)
        told._tools = tools
        return told

    def render(self, turns: Turns, generation: bool = False) -> str:
        """The text of a conversation.

        Args:
            generation: end with what the template writes before the assistant's next turn.

        Raises:
            ModelError: the template refuses the conversation.
        """
        from jinja2.exceptions import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                [dict(turn) for turn in turns],
                tools=self._tools,
                chat_template=self._dated,
                tokenize=False,
                add_generation_prompt=generation,
            )
        except (TemplateError, TypeError) as error:
            raise ModelError(f"the model's chat template refuses this conversation: {error}") from error

    def accept(self, turns: Turns, generation: bool = False) -> tuple[Turns, str]:
        """The turns as the template takes them, and their text.

        A template without a system role (Gemma's) gets that turn's text before the first user turn, and one that
        takes the arguments of calls as text (DeepSeek's) gets their JSON.

        Raises:
            ModelError: the template refuses the conversation any way.
        """
        try:
            return turns, self.render(turns, generation)
        except ModelError:
            others = [other for other in (_arguments_as_text(turns), _system_into_first_user(turns)) if other]
            for other in others[:-1]:
                with suppress(ModelError):
                    return other, self.render(other, generation)
            if not others:
                raise
            return others[-1], self.render(others[-1], generation)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of what turns conversations into tokens: vocabulary, rules, special tokens, chat template, its date.

    Returns:
        16 hexadecimal digits.

    Raises:
        ModelError: see `ChatTemplate`.
    """
    template = ChatTemplate(tokenizer)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left over from the last call; no part of what a row becomes.
    rules.pop("truncation", None)
    rules.pop("padding", None)
    special = [str(tokenizer.bos_token), str(tokenizer.eos_token), sorted(tokenizer.all_special_ids)]
    content = json.dumps([rules, special, template.source, template.date], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _clock() -> str:
    """Defines ``strftime_now`` for a template, in place of Transformers' own, to tell of `DATE`.

    Only what is JSON can be handed to a template, hence a macro and no function.
    """
    replaced = "".join(f" | replace({json.dumps(name)}, {json.dumps(value)})" for name, value in _DIRECTIVES.items())
    # The line break belongs to the tag, so the template itself begins at the start of a line, as before.
    return "{%- macro strftime_now(format) -%}{{- format" + replaced + " -}}{%- endmacro %}\n"


def _arguments_as_text(turns: Turns) -> Turns | None:
    if not any("tool_calls" in turn for turn in turns):
        return None

    def told(call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        said = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": {**function, "arguments": said}}

    return [
        {**turn, "tool_calls": [told(c) for c in turn["tool_calls"]]} if "tool_calls" in turn else turn
        for turn in turns
    ]


def _system_into_first_user(turns: Turns) -> Turns | None:
    if len(turns) < 2 or turns[0]["role"] != "system" or turns[1]["role"] != "user":
        return None
    merged = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
    return [merged, *turns[2:]]
