"""Turns as people write them: OpenAI's, ShareGPT's, Alpaca's history, HH-RLHF's transcripts; with tools and their calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from concept_audit.data.formats import kind, parse_json, quoted
from concept_audit.errors import DataError
from concept_audit.types import ROLES, TOOLS, Message

ROLE_OF = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "developer": "system",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
CALL = "function_call"
"""The role, or the key of a turn, under which a single call lies."""
REASONING = ("reasoning_content", "reasoning", "thinking")
MARKS = ("weight", "train", "training")
"""Keys that say whether a turn is to be trained on: OpenAI's and Mistral's, Axolotl's two."""
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):", re.ASCII)


def read_turns(value: Any, where: str, options: str) -> tuple[Message, ...]:
    """A list of turns, or the JSON of one.

    Args:
        options: what to do if it is none.

    Raises:
        DataError: it is no list of turns, or one of them cannot be read.
    """
    if isinstance(value, str):
        value = parse_json(value, where)
    if not isinstance(value, list):
        raise DataError(f"{where} is {kind(value)}, not a list of turns; {options}")
    return tuple(_turn(t, f"{where} turn {n}") for n, t in enumerate(value, start=1))


def is_turns(value: Any) -> bool:
    """Whether a value is a list of turns, and not text in parts."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], Mapping)
        and bool({"role", "from"} & set(value[0]))
    )


def read_text(value: Any, where: str) -> str:
    """A string, or a list of text parts; DataError if it is neither."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"{where} is {kind(value)}; write a string or a list of text parts")
    return "".join(_part(part, where) for part in value)


def read_tools(value: Any, where: str) -> tuple[Message, ...]:
    """The tools that the model is offered, as what stands before the turns; none if the value is empty.

    Raises:
        DataError: it is no list of descriptions of tools, nor the JSON of one.
    """
    if isinstance(value, str) and value.strip():
        value = parse_json(value, where)
    if not value:
        return ()
    if not isinstance(value, list):
        raise DataError(f"{where} is {kind(value)}; write a list of tools, each with a name")
    tools = [_tool(tool, f"{where} tool {n}") for n, tool in enumerate(value, start=1)]
    return (Message(TOOLS, json.dumps(tools, ensure_ascii=False)),)


def read_history(value: Any, where: str) -> tuple[Message, ...]:
    """The earlier turns of an Alpaca row: pairs of a question and its answer, or the JSON of them.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, str) and value.strip():
        value = parse_json(value, where)
    if not value:
        return ()
    pairs: list[Any] = value if isinstance(value, list) else [None]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise DataError(f"{where} is no list of pairs; write [[question, answer], ...]")
    roles = ("user", "assistant")
    return tuple(Message(roles[place], read_text(text, where)) for pair in pairs for place, text in enumerate(pair))


def is_transcript(value: Any) -> bool:
    """Whether a text is a conversation in HH-RLHF's form: ``Human: …`` and ``Assistant: …``, with blank lines between."""
    if not isinstance(value, str):
        return False
    speakers = [match[1] for match in _SPEAKER.finditer(value)]
    return speakers[:1] == ["Human"] and "Assistant" in speakers and value.lstrip().startswith("Human:")


def read_transcript(value: Any, where: str) -> tuple[Message, ...]:
    """The turns of a conversation in HH-RLHF's form; DataError if it is none."""
    if not is_transcript(value):
        raise DataError(f'{where} is no transcript, which the first row is; begin it with "Human:", or drop the row')
    _, *parts = _SPEAKER.split(value)
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True))


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f'{where} is {kind(turn)}; write {{"role": ..., "content": ...}}')
    # Parquet gives every turn every key, with null for those that it does not have.
    sharegpt = turn.get("role") is None and turn.get("from") is not None
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    named = turn.get(role_key)
    role = ROLE_OF.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        shown = f'"{named}"' if isinstance(named, str) else kind(named)
        raise DataError(f"{where}: unknown {role_key} {shown}; use one of {quoted(ROLE_OF)}")
    content = turn.get(content_key)
    if role == "tool":
        name, call_id = (turn.get(key) for key in ("name", "tool_call_id"))
        return Message(
            role,
            read_text(content, f'{where}: "{content_key}"'),
            name=name if isinstance(name, str) else "",
            call_id=call_id if isinstance(call_id, str) else "",
        )
    if role != "assistant":
        return Message(role, read_text(content, f'{where}: "{content_key}"'))
    calls = turn.get("tool_calls") or ([turn[CALL]] if turn.get(CALL) else [])
    if isinstance(named, str) and named.lower() == CALL:
        calls, content = _as_list(parse_json(read_text(content, where), where)), None
    elif isinstance(calls, str):
        calls = _as_list(parse_json(calls, f'{where}: "tool_calls"'))
    reasoning = next((turn[name] for name in REASONING if isinstance(turn.get(name), str)), "")
    # What the assistant has thought or called is a turn even if it has said nothing.
    silent = content is None and bool(calls or reasoning)
    return Message(
        role,
        "" if silent else read_text(content, f'{where}: "{content_key}"'),
        _calls(calls, where),
        reasoning,
        trained=_trained(turn, where),
    )


def _calls(calls: Any, where: str) -> str:
    if not calls:
        return ""
    if not isinstance(calls, list):
        raise DataError(f'{where}: "tool_calls" is {kind(calls)}; write a list of calls')
    return json.dumps([_call(call, f"{where} call {n}") for n, call in enumerate(calls, start=1)], ensure_ascii=False)


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call with its name, arguments as an object, and its id if it has one: OpenAI's, or without its envelope."""
    said = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        raise DataError(f'{where} has no name; write {{"function": {{"name": ..., "arguments": ...}}}}')
    arguments = said.get("arguments", said.get("parameters"))
    if isinstance(arguments, str) and arguments.strip():
        arguments = parse_json(arguments, f'{where}: "arguments"')
    if not isinstance(arguments or {}, dict):
        raise DataError(f'{where}: "arguments" is {kind(arguments)}; write an object, or the JSON of one')
    told = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return told | {"name": said["name"], "arguments": _without_null(arguments or {})}


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = parse_json(tool, where)
    described = tool.get("function") or tool if isinstance(tool, dict) else None
    if not isinstance(described, dict) or not isinstance(described.get("name"), str):
        raise DataError(f'{where} has no name; write {{"type": "function", "function": {{"name": ...}}}}')
    return _without_null(tool if described is not tool else {"type": "function", "function": tool})


def _without_null(value: Any) -> Any:
    """Without keys that are null: Parquet and `datasets` give every object the keys of all others."""
    if isinstance(value, dict):
        return {name: _without_null(item) for name, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _trained(turn: Mapping[str, Any], where: str) -> bool:
    marks = {name: turn[name] for name in MARKS if turn.get(name) is not None}
    for name, mark in marks.items():
        if mark not in (0, 1):
            raise DataError(f'{where}: "{name}" is {mark!r:.40}; write 0 or 1, since a turn counts or does not')
    return all(marks.values())


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        shown = part.get("type") if isinstance(part, dict) else kind(part)
        raise DataError(
            f"{where} has a part that is not text ({shown}); keep parts like "
            '{"type": "text", "text": ...}, or pass --messages-column for a list of turns'
        )
    return text


def assistant_turns(messages: Sequence[Message]) -> list[int]:
    """Places of the assistant's turns."""
    return [place for place, message in enumerate(messages) if message.role == "assistant"]
