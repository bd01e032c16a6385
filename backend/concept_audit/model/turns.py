"""Where the assistant's turns lie in a rendered conversation.

A conversation is rendered a second time with marks put into its turns: characters of
Unicode's private use area that occur nowhere in it. If that text less the marks is the
first text, then the template treats the turns with marks as it treats those without, and
the marks tell where each turn went: whatever the template trims, renames, merges or moves,
and wherever else a turn's words occur. No text is searched for a turn's words.

Templates look for tags in a turn (Qwen 3's and R1's cut what lies before ``</think>``), so
besides the ends of a turn the ends of its text between the tags that the template knows are
marked: what is cut takes its marks with it, and the first and the last left bound the rest.

Of tool calls the functions' names are marked. What the template writes after the last name is
arguments and what closes the turn: as much as there is when the conversation ends with that turn.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, groupby
from typing import Any

from concept_audit.errors import ModelError
from concept_audit.model.template import ChatTemplate, Turns
from concept_audit.model.template_turns import REASONING

CALLED = "c"
"""In a mark behind the name of a function that is called."""
_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


def response_spans(template: ChatTemplate, turns: Turns, text: str) -> list[tuple[int, int]]:
    """Where each assistant turn lies in a conversation's text: [start, end) in characters.

    A turn begins where the model's own answer would, after what the template writes before an
    answer: so what the template itself puts at the beginning of a turn, such as the empty
    ``<think>`` block of Qwen 3's last turn, belongs to the turn. Where the text does not go on
    as it would before an answer (R1's generation prompt opens ``<think>``, its turns do not),
    the turn begins after the header that both share, or with its own first character. It ends
    with the last character that the template leaves of it, white space apart.

    Args:
        text: ``template.render(turns)``.

    Raises:
        ModelError: the template leaves a turn out, writes it twice, or changes with its words in
            a way that hides where it went.
    """
    conversation = _Conversation(template, turns, text)
    assistant = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    runs = conversation.runs(range(len(turns)))
    gaps_known = runs is not None
    if runs is None:
        # A mark in another turn may be what changes the text (a tool's answer told by its tags).
        runs = conversation.runs(assistant)
    spans: list[tuple[int, int]] = []
    for number in assistant:
        least = spans[-1][1] if spans else 0
        if runs is None:
            span = conversation.span_by_what_surrounds(number)
        else:
            own = [run for run in runs if run.turn == number]
            if len(own) != 1:
                raise conversation.refusal(number, "leaves out an assistant turn, or writes it twice")
            floor = max((run.end for run in runs if run.end <= own[0].start and run.turn != number), default=0)
            span = conversation.beginning(number, own[0].start, floor if gaps_known else None), own[0].end
        if span is not None and turns[number].get("tool_calls"):
            span = span[0], conversation.closed(number, span[1])
        if span is None or span[0] < least:
            raise conversation.refusal(number, "changes the text of an assistant turn")
        spans.append((span[0], max(span)))
    return spans


@dataclass(frozen=True)
class _Run:
    """Marks of one turn that follow one another: of which turn, and where the first and the last lie in the text."""

    turn: int
    start: int
    end: int


class _Conversation:
    """A conversation, its text, and the same with marks in it."""

    def __init__(self, template: ChatTemplate, turns: Turns, text: str):
        self._template, self._turns, self._text = template, turns, text
        said = [text, *(json.dumps(dict(turn), ensure_ascii=False) for turn in turns)]
        private = map(chr, chain(range(0xE000, 0xF900), range(0xF0000, 0x10FFFE)))
        self._mark = next(mark for mark in private if not any(mark in part for part in said))
        self._marks = re.compile(f"{self._mark}(\\d+):(\\d+)({CALLED}?){self._mark}")

    def runs(self, numbers: Collection[int]) -> list[_Run] | None:
        """Where the marks of these turns lie; None if marks change more of the text than that they are there."""
        found = self._with_marks(numbers)
        if found is None or found[0] != self._text:
            return None
        runs = []
        for turn, group in groupby(found[1], key=lambda mark: mark[0]):
            _, orders, places = zip(*group, strict=True)
            # Marks in another order: the turn was written twice.
            parts = [places] if list(orders) == sorted(set(orders)) else [places, places]
            runs += [_Run(turn, part[0], part[-1]) for part in parts]
        return runs

    def span_by_what_surrounds(self, number: int) -> tuple[int, int] | None:
        """Where a turn lies whose marks change its own rendering, but nothing after it; None if that is not so.

        For templates that write an empty turn otherwise than one with words.
        """
        start, found = self._answer_begins(number), self._with_marks([number])
        if start is None or found is None or not found[1]:
            return None
        after = found[0][found[1][-1][2] :]
        end = len(self._text) - len(after)
        return (start, end) if self._text.endswith(after) and start <= end else None

    def beginning(self, number: int, first: int, floor: int | None) -> int:
        """Where a turn begins whose own first character is known.

        Args:
            floor: where the text of the turns before it ends; None if that is not known.
        """
        asked = self._turns[:number]
        if (prompt := self._rendered(asked, True)) is not None:
            shared = _shared(prompt, self._text)
            if shared == len(prompt) and not self._text[shared:first].strip():
                return shared
            opened = _shared(prompt, self._rendered(asked, False) or "")
            if header := _header(prompt[opened:], shared - opened):
                return opened + header if shared == len(prompt) else min(opened + header, first)
        if self._turns[number].get("tool_calls"):
            # Its own first mark is within a call, and the call begins before it.
            return self._after_the_turn_before(number, floor)
        if floor is None:
            return first
        # Text before the turns differs: Mistral's takes the system turn into the last user turn.
        prompt, gap = self._generation_prompt(asked or self._turns), self._text[floor:first]
        length = next((n for n in range(len(prompt), 0, -1) if prompt[:n] in gap), 0)
        header = _header(prompt, length)
        return floor + gap.rindex(prompt[:length]) + header if header else first

    def closed(self, number: int, last: int) -> int:
        """Where a turn ends that ends in calls: behind its closing token, if the template writes one.

        Args:
            last: where its last mark lies.

        Raises:
            ModelError: the template ends such a turn otherwise where nothing follows it.
        """
        rest = self._after_marks(number)
        if rest is None and number == len(self._turns) - 1:
            rest = self._text[last:]
        if rest is None or not self._text.startswith(rest.rstrip(), last):
            raise self.refusal(number, "writes what follows a tool call otherwise where the conversation goes on")
        return last + len(rest.rstrip())

    def _after_the_turn_before(self, number: int, floor: int | None) -> int:
        """Where a turn begins that the template opens by nothing but the end of the one before."""
        rest = self._after_marks(number - 1) if number and floor is not None else None
        if rest is None or floor is None or not self._text.startswith(rest.rstrip(), floor):
            raise self.refusal(number, "hides where a turn with tool calls begins")
        return floor + len(rest.rstrip())

    def _after_marks(self, number: int) -> str | None:
        """What the template writes after the last mark of a turn with which the conversation ends."""
        found = self._with_marks([number], number + 1)
        return found[0][found[1][-1][2] :] if found is not None and found[1] else None

    def refusal(self, number: int, why: str) -> ModelError:
        return ModelError(
            f"the model's chat template {why}, so its tokens cannot be told apart; "
            f"the turn begins {self._turns[number]['content'].strip()[:60]!r}"
        )

    def _answer_begins(self, number: int) -> int | None:
        """Where the model would begin its own answer in place of a turn; None if the text is another before that."""
        prompt = self._rendered(self._turns[:number], True)
        return len(prompt) if prompt is not None and self._text.startswith(prompt) else None

    def _generation_prompt(self, turns: Turns) -> str:
        """What the template adds before an answer; empty if it refuses these turns."""
        without, prompt = self._rendered(turns, False), self._rendered(turns, True)
        return "" if without is None or prompt is None else prompt[_shared(prompt, without) :]

    def _rendered(self, turns: Turns, generation: bool) -> str | None:
        try:
            return self._template.render(turns, generation) if turns else None
        except ModelError:
            return None

    def _with_marks(
        self, numbers: Collection[int], until: int | None = None
    ) -> tuple[str, list[tuple[int, int, int]]] | None:
        """The text less its marks, and of each mark its turn, its order there, and its place in that text.

        Args:
            until: leave out this turn and those after it.
        """
        turns = [self._marked(number) if number in numbers else turn for number, turn in enumerate(self._turns[:until])]
        rendered = self._rendered(turns, False)
        if rendered is None:
            return None
        marks, taken = [], 0
        named: set[tuple[int, int]] = set()
        for found in self._marks.finditer(rendered):
            number, order = int(found[1]), int(found[2])
            # What a tool answers may be headed by the name in the call (GPT-OSS).
            if (number, order) not in named:
                marks.append((number, order, found.start() - taken))
            if found[3]:
                named.add((number, order))
            taken += len(found[0])
        return self._marks.sub("", rendered), marks

    def _marked(self, number: int) -> dict[str, Any]:
        """A turn with marks, in the order in which templates write its parts: what was thought, said, and called."""
        turn, orders = dict(self._turns[number]), count()
        content, assistant = turn["content"], turn["role"] == "assistant"
        if thought := next((turn[name] for name in REASONING if turn.get(name)), ""):
            marked = self._put(thought, sorted(set(_ends(thought))), number, orders)
            turn |= {name: marked for name in REASONING if name in turn}
        start, end = _ends(content)
        if start >= end:
            # Templates write a turn of calls alone otherwise than one with words.
            places = [len(content)] if assistant and not turn.get("tool_calls") else []
        elif assistant:
            places = sorted({start, end, *self._text_between_tags(content, start, end)})
        else:
            places = [end]
        turn["content"] = self._put(content, places, number, orders)
        if turn.get("tool_calls"):
            turn["tool_calls"] = [self._marked_call(call, number, orders) for call in turn["tool_calls"]]
        return turn

    def _marked_call(self, call: Mapping[str, Any], number: int, orders: Iterator[int]) -> dict[str, Any]:
        name = f"{call['function']['name']}{self._mark}{number}:{next(orders)}{CALLED}{self._mark}"
        return {**call, "function": {**call["function"], "name": name}}

    def _put(self, text: str, places: Sequence[int], number: int, orders: Iterator[int]) -> str:
        pieces, before = [], 0
        for place in places:
            pieces += [text[before:place], f"{self._mark}{number}:{next(orders)}{self._mark}"]
            before = place
        return "".join([*pieces, text[before:]])

    def _text_between_tags(self, content: str, start: int, end: int) -> list[int]:
        places, before = [], start
        known = [tag for tag in _TAG.finditer(content, start, end) if tag[0] in self._template.source]
        for until, after in [*((tag.start(), tag.end()) for tag in known), (end, end)]:
            piece = content[before:until]
            if piece.strip():
                places += [before + len(piece) - len(piece.lstrip()), before + len(piece.rstrip())]
            before = after
        return places


def _ends(text: str) -> tuple[int, int]:
    """Where a text begins and ends but for the white space around it, which templates trim."""
    return len(text) - len(text.lstrip()), len(text.rstrip())


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return len(os.path.commonprefix([one, other]))


def _header(prompt: str, shared: int) -> int:
    """How long the header is, of whose generation prompt a turn shares so many characters.

    All of it, or up to the last whole tag or line, since a turn may happen to begin as the rest does.
    """
    if shared >= len(prompt):
        return len(prompt)
    whole = re.match(r".*[>\]\n]", prompt[:shared], re.DOTALL) if shared > 0 else None
    return whole.end() if whole else 0
