"""Conversations in rows: which columns hold them, and how their values become messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from concept_audit.data.formats import Row, quoted
from concept_audit.data.turns import (
    assistant_turns,
    is_transcript,
    is_turns,
    read_history,
    read_text,
    read_tools,
    read_transcript,
    read_turns,
)
from concept_audit.errors import DataError
from concept_audit.types import REJECTED, Message

Given = tuple[tuple[Message, ...], int]
"""A row's turns, and how many of them are given before what is to be learnt."""
TurnChoice = Literal["mask", "all", "last"]
"""Which assistant turns count: all but those that the rows mark otherwise, all, or the last."""
TURN_CHOICES: tuple[TurnChoice, ...] = get_args(TurnChoice)

MESSAGES = ("messages", "conversations", "conversation")
PROMPT = ("prompt", "instruction", "question", "input", "query")
RESPONSE = ("response", "completion", "output", "answer", "chosen")
TEXT = ("text", "content")
PAIR = ("chosen", "rejected")
ALPACA = (("history", read_history), ("system", read_text))
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
    """Where the conversation lies in every row of a source: all other columns are metadata.

    Attributes:
        read: a row and the columns → its turns, and how many of them are given before what is to be learnt.
        kind: what the rows are taken for, in words.
        columns: those that the conversation is read from; a row may lack what is not its text.
        turns: which assistant turns count.
        pair: the columns of the chosen and of the rejected side, if rows are preference pairs.
    """

    read: Callable[..., Given | tuple[Given, Given]]
    kind: str
    columns: tuple[str, ...]
    turns: TurnChoice = "mask"
    pair: tuple[str, str] | None = None

    @property
    def document(self) -> str | None:
        """The column of the text, where rows are plain text, all of it to be learnt; else None."""
        return self.columns[0] if self.read is _plain_text else None

    def messages(self, row: Row) -> tuple[Message, ...]:
        """The row's conversation, of a pair both; DataError if it has none to train on."""
        if self.pair is None:
            return self._counted(row, *self._read(row), self.columns[0])
        if row.problem:
            raise DataError(row.problem)
        sides = cast("tuple[Given, Given]", self.read(row, *self.columns))
        chosen, rejected = (self._counted(row, *side, name) for side, name in zip(sides, self.pair, strict=True))
        return (*chosen, Message(REJECTED, ""), *rejected)

    def _counted(self, row: Row, messages: tuple[Message, ...], given: int, column: str) -> tuple[Message, ...]:
        """A conversation in which those turns are to be trained on that count."""
        answers = assistant_turns(messages)
        where = _where(row, column)
        if not answers:
            raise DataError(f"{where} has no assistant turn; add one or pass --text-column")
        _require_text(messages[answers[-1]].text, where)
        learnt = [place for place in answers if place >= given]
        if self.turns == "last":
            learnt = learnt[-1:]
        elif self.turns == "mask":
            learnt = [place for place in learnt if messages[place].trained]
        if not learnt:
            raise DataError(
                f"{where}: no assistant turn is to be trained on, as they are marked; drop the row, or pass --turns all"
            )
        return tuple(
            replace(message, trained=place in learnt or place not in answers) for place, message in enumerate(messages)
        )

    def prompt(self, row: Row) -> tuple[Message, ...]:
        """The turns before the last answer, which the row may lack; DataError if there are none."""
        if self.pair is not None:
            raise DataError(f"{row.place}: a preference pair, where a prompt is expected; give conversations")
        turns, _ = self._read(row)
        answered = bool(turns) and turns[-1].role == "assistant"
        prompt = turns[:-1] if answered else turns
        if not prompt:
            raise DataError(f"{row.place}: no prompt to answer; give it a user turn")
        return prompt

    def _read(self, row: Row) -> Given:
        if row.problem:
            raise DataError(row.problem)
        return cast("Given", self.read(row, *self.columns))


def find_layout(row: Row, columns: Columns, turns: TurnChoice = "mask") -> Layout:
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

    if not named and (pair_layout := _pair_layout(row, turns)):
        return pair_layout
    if column := columns.messages or (None if named else _find(row, MESSAGES)):
        sharegpt = column.lower() != "messages" and not columns.messages
        system = (_beside(row, "system", read_text),) if sharegpt else ()
        return Layout(_chat, "chats", (column, _beside(row, "tools", read_tools), *system), turns)
    if columns.text:
        return _text_layout(row, columns.text, turns)
    prompt = columns.prompt or _find(row, PROMPT, besides=columns.response)
    response = columns.response or _find(row, RESPONSE, besides=prompt)
    if prompt and response:
        if is_turns(row.values[prompt]) or is_turns(row.values[response]):
            tools = _beside(row, "tools", read_tools)
            return Layout(_prompt_completion, "prompts and completions", (prompt, response, tools), turns)
        alpaca = prompt.lower() == "instruction" and not columns.prompt
        if not alpaca:
            return Layout(_prompt_response, "prompts and responses", (prompt, response), turns)
        # The first row may lack its `input` where later rows have one.
        context = _find(row, ("input",)) or "input"
        joined = (context if context != response else "", *(_beside(row, *other) for other in ALPACA))
        return Layout(_prompt_response, "instructions and outputs (Alpaca)", (prompt, response, *joined), turns)
    if not named and (column := _find(row, TEXT)):
        return _text_layout(row, column, turns)
    if not named and response and is_transcript(row.values[response]):
        return _text_layout(row, response, turns)
    lacking = f'a prompt ("{prompt}") but no response' if prompt else "no conversation"
    raise DataError(f"{row.place}: {lacking} in the columns {quoted(row.values)}; {OPTIONS}")


def _pair_layout(row: Row, turns: TurnChoice) -> Layout | None:
    chosen, rejected = (_find(row, (name,)) for name in PAIR)
    if chosen is None or rejected is None or row.values[rejected] is None:
        return None
    prompt = _find(row, PROMPT) or "prompt"
    columns = (chosen, rejected, prompt, _beside(row, "tools", read_tools))
    return Layout(_pair, "preference pairs", columns, turns, (chosen, rejected))


def _text_layout(row: Row, column: str, turns: TurnChoice) -> Layout:
    if is_transcript(row.values[column]):
        return Layout(_transcript, "transcripts (HH-RLHF)", (column,), turns)
    return Layout(_plain_text, "plain text", (column,), turns)


def _beside(row: Row, name: str, read: Callable[[Any, str], object]) -> str:
    """The column of what belongs to a conversation besides its turns; empty if what it holds is something else.

    A first row may lack what later rows have.
    """
    column = _find(row, (name,)) or name
    try:
        if row.values.get(column):
            read(row.values[column], column)
    except DataError:
        return ""
    return column


def _find(row: Row, names: Sequence[str], besides: str | None = None) -> str | None:
    """The row's column for the earliest of `names`, whatever its case."""
    there = {column.lower(): column for column in row.values if column != besides}
    return next((there[name] for name in names if name in there), None)


def _chat(row: Row, column: str, tools: str, system: str | None = None) -> Given:
    """A list of turns, or the JSON of one: OpenAI's role and content, ShareGPT's from and value."""
    messages = read_turns(_value(row, column), _where(row, column), OPTIONS)
    if system and not any(message.role == "system" for message in messages):
        messages = _system(row, system) + messages
    return _tools(row, tools) + messages, 0


def _prompt_completion(row: Row, prompt: str, response: str, tools: str) -> Given:
    """TRL's conversational rows: the loss sees the completion's turns, and no answer within the prompt."""
    sides = []
    for column, role in ((prompt, "user"), (response, "assistant")):
        value, where = _value(row, column), _where(row, column)
        said = is_turns(value) or value == []
        sides.append(read_turns(value, where, OPTIONS) if said else (Message(role, read_text(value, where)),))
    given = _tools(row, tools) + sides[0]
    if not assistant_turns(sides[1]):
        raise DataError(f"{_where(row, response)} has no assistant turn; add one or drop the row")
    return given + sides[1], len(given)


def _prompt_response(
    row: Row, prompt: str, response: str, context: str = "", history: str = "", system: str = ""
) -> Given:
    """A prompt and its response; Alpaca's context, where there is one, follows the prompt, its history goes before."""
    asked = read_text(_value(row, prompt), _where(row, prompt))
    if context and row.values.get(context):
        asked += "\n\n" + read_text(row.values[context], _where(row, context))
    before = _system(row, system) if system else ()
    if history:
        before += read_history(row.values.get(history), _where(row, history))
    answer, _ = _plain_text(row, response)
    return (*before, Message("user", asked), *answer), 0


def _plain_text(row: Row, column: str) -> Given:
    """One assistant turn, since the whole of a plain text is what training sees."""
    where = _where(row, column)
    text = read_text(_value(row, column), where)
    _require_text(text, where)
    return (Message("assistant", text),), 0


def _pair(row: Row, chosen: str, rejected: str, prompt: str, tools: str) -> tuple[Given, Given]:
    """Both sides, each with the prompt; what both begin with alike is given, and the loss does not see it."""
    before = _asked(row, prompt) if row.values.get(prompt) else ()
    both = [_side(row, column, before) for column in (chosen, rejected)]
    least = min(map(len, both)) - 1
    alike = next((n for n in range(max(least, 0)) if both[0][n] != both[1][n]), max(least, 0))
    offered = _tools(row, tools)
    first, second = ((offered + side, len(offered) + alike) for side in both)
    return first, second


def _asked(row: Row, column: str) -> tuple[Message, ...]:
    value, where = row.values[column], _where(row, column)
    if is_turns(value):
        return read_turns(value, where, OPTIONS)
    if is_transcript(value):
        turns = read_transcript(value, where)
        # HH-RLHF's prompts end with the name of who is to speak.
        return turns[:-1] if turns[-1] == Message("assistant", "") else turns
    return (Message("user", read_text(value, where)),)


def _side(row: Row, column: str, before: tuple[Message, ...]) -> tuple[Message, ...]:
    value, where = _value(row, column), _where(row, column)
    if is_turns(value):
        turns = read_turns(value, where, OPTIONS)
        # Whole conversations repeat the prompt; some have a system turn before it.
        whole = before and any(m.role == "user" for m in turns[:2]) and turns[-1].role == "assistant"
        return turns if whole else before + turns
    if is_transcript(value):
        return read_transcript(value, where)
    return (*before, Message("assistant", read_text(value, where)))


def _transcript(row: Row, column: str) -> Given:
    return read_transcript(_value(row, column), _where(row, column)), 0


def _system(row: Row, column: str) -> tuple[Message, ...]:
    text = row.values.get(column)
    return (Message("system", read_text(text, _where(row, column))),) if text else ()


def _tools(row: Row, column: str) -> tuple[Message, ...]:
    return read_tools(row.values.get(column), _where(row, column))


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
