"""A conversation in the form that chat templates take: dictionaries with tool calls and reasoning under their names.

What a template does not know is lost in it without a word. Calls are what an agent's rows teach, so where a template
knows none they are written into the turn in the form that Hermes' and Qwen's templates give them. Reasoning and tools
are left out where the template leaves them out, as fine-tuning on the text as rendered does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from concept_audit.model.template import ChatTemplate, Turns
from concept_audit.types import TOOLS, Message

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which templates look for what the assistant thought."""


def for_template(template: ChatTemplate, messages: Sequence[Message]) -> tuple[ChatTemplate, Turns]:
    """The template, told of the tools that are offered, and the turns as it takes them."""
    tools = [tool for message in messages if message.role == TOOLS for tool in json.loads(message.content)]
    turns = [_turn(template, message) for message in messages if message.role != TOOLS]
    return (template.offering(tools) if tools and knows(template, "tools") else template), turns


def knows(template: ChatTemplate, name: str) -> bool:
    """Whether a template asks for something by this name."""
    return re.search(rf"(?<![A-Za-z_]){name}\b", template.source) is not None


def unknown_to(template: ChatTemplate, messages: Sequence[Message]) -> Iterator[str]:
    """What a conversation has that the template does not know, and what becomes of it."""
    if any(m.role == TOOLS for m in messages) and not knows(template, "tools"):
        yield "the model's template knows no tools: their descriptions are left out"
    if any(m.calls for m in messages) and not knows(template, "tool_calls"):
        yield "the model's template knows no tool calls: they are written into the turn as <tool_call>…</tool_call>"
    if any(m.reasoning for m in messages) and not any(knows(template, name) for name in REASONING):
        yield "the model's template knows no reasoning apart from the answer: it is left out"


def _turn(template: ChatTemplate, message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        turn |= {name: message.reasoning for name in REASONING if knows(template, name)}
    if message.calls:
        calls = json.loads(message.calls)
        if knows(template, "tool_calls"):
            turn["tool_calls"] = [_call(call) for call in calls]
        else:
            turn["content"] = "\n".join(part for part in (message.content, *map(_as_text, calls)) if part)
    named = {"name": message.name, "tool_call_id": message.call_id}
    return turn | {name: value for name, value in named.items() if value}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    identity = {"id": call["id"]} if "id" in call else {}
    return identity | {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}


def _as_text(call: dict[str, Any]) -> str:
    said = json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False)
    return f"<tool_call>\n{said}\n</tool_call>"
