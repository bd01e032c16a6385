"""Rollouts with rewards in rows: which columns say what a response got, and rows that hold several responses.

That rows are rollouts changes their scores, so a column's name alone does not make them any: the user says so. A row
with a list of responses and a list of as many numbers can be read in no other way, and needs no word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from concept_audit.data.conversation import Columns, Layout
from concept_audit.data.formats import Row, quoted
from concept_audit.errors import DataError
from concept_audit.types import Rollouts, as_number

ADVANTAGE = ("advantage",)
REWARD = ("reward",)
GROUP = ("group", "group_id", "prompt_id")
RESPONSES = ("completions", "responses", "rollouts")
"""Columns with a list of responses to one prompt."""
GOT = {"advantages": "advantage", "rewards": "reward"}
"""Columns with a list of what each of them got → the field of a row that is one of them."""
RESPONSE = "completion"
SHOWN = 60
"""Characters of a value that is no number."""


@dataclass(frozen=True)
class RewardColumns:
    """What rows that are rollouts weigh by. All left out: every row weighs alike.

    Attributes:
        rollouts: rows are responses that reinforcement learning weighs by their advantage; columns that are not named
            are found by name.
        advantage: column with the advantage, a number, taken as it is.
        reward: column with the reward, of which the advantage is made within each group of rows, as GRPO does.
        group: column that tells which rows are responses to one prompt; None for rows with the same prompt.
    """

    rollouts: bool = False
    advantage: str | None = None
    reward: str | None = None
    group: str | None = None

    @property
    def asked(self) -> bool:
        """Whether the user says that rows are rollouts."""
        return bool(self.rollouts or self.advantage or self.reward or self.group)


ALIKE = RewardColumns()


def find_rollouts(row: Row, layout: Layout, wanted: RewardColumns, lists: tuple[str, ...] | None) -> Rollouts | None:
    """Which columns say what rows weigh by; None where all weigh alike.

    Args:
        row: the first one; one of its own responses, if it held several.
        lists: the columns that it held them in.

    Raises:
        DataError: a named column is not there or of no use, or none says what a response got.
    """
    if not wanted.asked and lists is None:
        return None
    if lists:
        wanted = of_one(wanted, lists)
    if layout.pair:
        raise DataError(
            f"{row.source}: preference pairs (columns {quoted(layout.pair)}) are not rollouts; leave --rollouts and "
            "its columns out, or name --prompt-column and --response-column"
        )
    if wanted.advantage and wanted.reward:
        raise DataError("--advantage-column and --reward-column exclude each other: the one is made of the other")
    for name in (wanted.advantage, wanted.reward, wanted.group):
        if name and name not in row.values:
            raise DataError(f'{row.place}: no column "{name}"; name one of {quoted(row.values)}')
    others = [name for name in row.values if name not in layout.columns]
    for name in (wanted.advantage, wanted.reward):
        if name and name not in others:
            raise DataError(f'{row.place}: "{name}" holds the conversation, and not what it got; name another column')
    advantage = wanted.advantage or (None if wanted.reward else _find(others, ADVANTAGE))
    reward = None if advantage else wanted.reward or _find(others, REWARD)
    if advantage is None and reward is None:
        raise DataError(
            f"{row.place}: no column of advantages or rewards among {quoted(others) or 'the others'}; name it with "
            "--advantage-column or --reward-column"
        )
    group = wanted.group or (None if lists else _find(others, GROUP))
    found = Rollouts(advantage, reward, group if group in others else None, lists)
    for name in found.added:
        if name in row.values:
            raise DataError(
                f'{row.place}: the column "{name}" has the name of what this build adds, as the export of an audit '
                "has it; rename it, or pass --advantage-column grpo_advantage --group-column rollout_group"
            )
    return found


def check_weight(rollouts: Rollouts, metadata: Mapping[str, Any], place: str) -> None:
    """Raise DataError for a row that does not say what it got, or which group it is of."""
    name = rollouts.field
    if as_number(metadata.get(name)) is None:
        shown = f"{repr(metadata[name])[:SHOWN]} is no number" if name in metadata else "is not there"
        raise DataError(f'{place}: "{name}" {shown}, so the rollout has no weight; give it one, or drop the row')
    if rollouts.group and metadata.get(rollouts.group) is None:
        raise DataError(
            f'{place}: "{rollouts.group}" is null or not there, so the rollout has no group; fill it, drop the row, or '
            "name the prompt's column with --group-column for groups of the same prompt"
        )


def find_lists(row: Row, columns: Columns, wanted: RewardColumns) -> tuple[str, ...] | None:
    """The columns of a row that hold several responses to its prompt, and what each of them got; None if none do."""
    if columns.messages or columns.response or columns.text or RESPONSE in row.values:
        return None
    lists = {name: value for name, value in row.values.items() if isinstance(value, list)}
    responses = _find(list(lists), RESPONSES)
    got = [name for name in lists if name.lower() in GOT or name in (wanted.advantage, wanted.reward)]
    if responses is None or not any(as_number(each) is not None for name in got for each in lists[name]):
        return None
    return responses, *got


def singular(column: str) -> str:
    """The field of a row that is one response, for a column with a list of what each of them got."""
    return GOT.get(column.lower(), column)


def of_one(wanted: RewardColumns, lists: tuple[str, ...]) -> RewardColumns:
    """The user's columns as the rows that are one response have them."""
    advantage, reward = (singular(name) if name in lists else name for name in (wanted.advantage, wanted.reward))
    return replace(wanted, advantage=advantage, reward=reward)


def unrolled(row: Row, lists: tuple[str, ...]) -> Iterator[Row]:
    """A row's responses, each as a row of its own that stands where the row stands.

    Lists of different lengths, or none, give one row with a problem.
    """
    if row.problem:
        yield row
        return
    if sizes := unequal(row.values, lists):
        yield replace(
            row,
            problem=f"{row.place}: {quoted(lists)} have to be lists of the same length, 1 at least, and have {sizes}; "
            "mend or drop the row",
        )
        return
    others = {name: value for name, value in row.values.items() if name not in lists}
    responses, *got = lists
    for n, response in enumerate(row.values[responses]):
        yield replace(
            row, values={**others, RESPONSE: response, **{singular(name): row.values[name][n] for name in got}}
        )


def unequal(values: Mapping[str, Any], lists: tuple[str, ...]) -> str:
    """The lengths of a row's lists, if they are not the same and 1 at least, so that it is no rollouts; else empty."""
    sizes = [len(values[name]) if isinstance(values.get(name), list) else None for name in lists]
    if sizes[0] and len(set(sizes)) == 1:
        return ""
    return " and ".join("none" if size is None else str(size) for size in sizes)


def _find(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column for the earliest of `names`, whatever its case."""
    there = {column.lower(): column for column in columns}
    return next((there[name] for name in names if name in there), None)
