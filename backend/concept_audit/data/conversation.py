"""Conversations in rows: which columns hold them, and how their values become messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from concept_audit.data.formats import Row, kind, parse_json, quoted
from concept_audit.errors import DataError
from concept_audit.types import ROLES, Message

MESSAGES = ("messages", "conversations", "conversation")
PROMPT = ("prompt", "instruction", "question", "input", "query")
RESPONSE = ("response", "completion", "output", "answer", "chosen")
TEXT = ("text", "content")
ROLE_OF = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "developer": "system",
}
OPTIONS = "pass --messages-column, --prompt-column with --response-column, or --text-column"


@dataclass(frozen=True)
class Columns:
    """Which columns hold the conversation. None = found by name.

    A prompt column named here is taken alone: Alpaca's ``input`` joins only an
    ``instruction`` that was found by name.

    Attributes:
        messages: column with the list of turns.
        prompt: column with the prompt.
        response: column with the response.
        text: column with plain text, all of it to be learnt.
    """

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    text: str | None = None


BY_NAME = Columns()


@dataclass(frozen=True)
class Layout:
    """Where the conversation lies in every row of a source: all other columns are metadata."""

    read: Callable[..., tuple[Message, ...]]
    columns: tuple[str, ...]

    def messages(self, row: Row) -> tuple[Message, ...]:
        """The row's conversation; DataError if it has none to train on."""
        return self.read(row, *self.columns)

    def prompt(self, row: Row) -> tuple[Message, ...]:
        """The turns before the last answer, which the row may lack; DataError if there are none."""
        chat = self.read is _chat
        turns = _turns(row, *self.columns) if chat else self.messages(row)
        answered = bool(turns) and turns[-1].role == "assistant"
        prompt = turns[:-1] if answered else turns
        if not prompt:
            raise DataError(f"{row.place}: no prompt to answer; give it a user turn")
        return prompt


def find_layout(row: Row, columns: Columns) -> Layout:
    """Tell from a source's first row where its conversations lie.

    Columns that the user named decide; otherwise messages go before prompt and response,
    and these before plain text.

    Raises:
        DataError: a named column is not there, two layouts are named, or none fits.
    """
    pair = columns.prompt or columns.response
    named = [name for name in (columns.messages, pair, columns.text) if name]
    if len(named) > 1:
        raise DataError(f"{row.source}: {quoted(named)} exclude each other; {OPTIONS}")
    for name in (columns.messages, columns.prompt, columns.response, columns.text):
        if name and name not in row.values:
            raise DataError(f'{row.place}: no column "{name}"; name one of {quoted(row.values)}')

    if column := columns.messages or (None if named else _find(row, MESSAGES)):
        return Layout(_chat, (column,))
    if columns.text:
        return Layout(_plain_text, (columns.text,))
    prompt = columns.prompt or _find(row, PROMPT, besides=columns.response)
    response = columns.response or _find(row, RESPONSE, besides=prompt)
    if prompt and response:
        alpaca = prompt.lower() == "instruction" and not columns.prompt
        # The first row may lack its `input` where later rows have one.
        context = _find(row, ("input",)) or "input"
        joined = (context,) if alpaca and context != response else ()
        return Layout(_prompt_response, (prompt, response, *joined))
    if not named and (column := _find(row, TEXT)):
        return Layout(_plain_text, (column,))
    lacking = f'a prompt ("{prompt}") but no response' if prompt else "no conversation"
    raise DataError(f"{row.place}: {lacking} in the columns {quoted(row.values)}; {OPTIONS}")


def _find(row: Row, names: Sequence[str], besides: str | None = None) -> str | None:
    """The row's column for the earliest of `names`, whatever its case."""
    there = {column.lower(): column for column in row.values if column != besides}
    return next((there[name] for name in names if name in there), None)


def _chat(row: Row, column: str) -> tuple[Message, ...]:
    """A list of turns of which one at least is the assistant's."""
    messages = _turns(row, column)
    where = _where(row, column)
    responses = [m.content for m in messages if m.role == "assistant"]
    if not responses:
        raise DataError(f"{where} has no assistant turn; add one or pass --text-column")
    _require_text(responses[-1], where)
    return messages


def _turns(row: Row, column: str) -> tuple[Message, ...]:
    """A list of turns, or the JSON of one: OpenAI's role and content, ShareGPT's from and value."""
    where = _where(row, column)
    turns = _value(row, column)
    if isinstance(turns, str):
        turns = parse_json(turns, where)
    if not isinstance(turns, list):
        raise DataError(f"{where} is {kind(turns)}, not a list of turns; {OPTIONS}")
    return tuple(_turn(t, f"{where} turn {n}") for n, t in enumerate(turns, start=1))


def _prompt_response(row: Row, prompt: str, response: str, context: str | None = None) -> tuple[Message, ...]:
    """A prompt and its response; Alpaca's context, where there is one, follows the prompt."""
    asked = _content(_value(row, prompt), _where(row, prompt))
    if context and row.values.get(context):
        asked += "\n\n" + _content(row.values[context], _where(row, context))
    return (Message("user", asked), *_plain_text(row, response))


def _plain_text(row: Row, column: str) -> tuple[Message, ...]:
    """One assistant turn, since the whole of a plain text is what training sees."""
    where = _where(row, column)
    text = _content(_value(row, column), where)
    _require_text(text, where)
    return (Message("assistant", text),)


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f'{where} is {kind(turn)}; write {{"role": ..., "content": ...}}')
    # Parquet gives every turn every key, with null for those that it does not have.
    sharegpt = turn.get("role") is None and turn.get("from") is not None
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    role = turn.get(role_key)
    known = ROLE_OF.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        shown = f'"{role}"' if isinstance(role, str) else kind(role)
        raise DataError(f"{where}: unknown {role_key} {shown}; use one of {quoted(ROLE_OF)}")
    return Message(known, _content(turn.get(content_key), f'{where}: "{content_key}"'))


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"{where} is {kind(value)}; write a string or a list of text parts")
    return "".join(_part(part, where) for part in value)


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        shown = part.get("type") if isinstance(part, dict) else kind(part)
        raise DataError(
            f"{where} has a part that is not text ({shown}); keep parts like "
            '{"type": "text", "text": ...}, or pass --messages-column for a list of turns'
        )
    return text


def _require_text(response: str, where: str) -> None:
    if not response.strip():
        raise DataError(f"{where} has an empty assistant response; fill it or drop the row")


def _value(row: Row, column: str) -> Any:
    if column not in row.values:
        raise DataError(
            f'{row.place}: no "{column}", which the first row has, among {quoted(row.values)}; '
            "keep to one format in a file, or drop the row"
        )
    if row.values[column] is None:
        raise DataError(f"{_where(row, column)} is null; fill it or drop the row")
    return row.values[column]


def _where(row: Row, column: str) -> str:
    """``train.jsonl line 12: "messages"``"""
    return f'{row.place}: "{column}"'
