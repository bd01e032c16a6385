"""What a build takes the data for, said before anything is computed: a wrong guess is seen before the wait."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from typing import Any

from concept_audit.data.formats import quoted
from concept_audit.data.read import DataSet, Skip, open_data
from concept_audit.errors import DataError, ModelError
from concept_audit.model.chat import ChatRenderer, TokenizedRow
from concept_audit.model.load import load_tokenizer
from concept_audit.model.windows import Splitter
from concept_audit.pipeline.options import LONGEST_ROW, BuildOptions
from concept_audit.progress import Progress
from concept_audit.types import SEPARATOR, Example, Rollouts

LOOKED_AT = 20
"""Documents of which it is said how many are too long; fewer if these have many characters already."""
MOST_CHARACTERS = 2_000_000
SHOWN = 2
"""Rows that are shown as the model reads them."""
LONGEST_PIECE = 240
"""Characters of each part of a row that are shown."""
REWARDS = ("reward", "rewards", "advantage", "advantages")
"""Columns by which rows would weigh if they were rollouts, which is for the user to say."""
OPEN, CLOSE = "⟦", "⟧"
"""Around response tokens."""
COUNTED = {
    "mask": "all of the assistant's, but those that a row marks otherwise (--turns all, last)",
    "all": "all of the assistant's, whatever a row marks (--turns mask, last)",
    "last": "the assistant's last (--turns mask, all)",
}


def dry_run(options: BuildOptions, progress: Progress) -> None:
    """Say what a build would take the data for, and compute nothing.

    Raises:
        AuditError: data or tokenizer are not there, or the first rows cannot be used and none may be skipped.
    """
    data = described(options, progress)
    tokenizer = load_tokenizer(options.model, options.cache, progress)
    # The model's own limit is not known before it is loaded, and is the tokenizer's as a rule.
    show_rows(data, options, tokenizer, progress, min(LONGEST_ROW, tokenizer.model_max_length))


def described(options: BuildOptions, progress: Progress) -> DataSet:
    """The data set of a build, once it has been said what it is taken for.

    Raises:
        DataError: as `open_data`, or preference pairs are to have an SAE or a β that is not above 0.
    """
    data = open_data(
        options.data,
        columns=options.columns,
        split=options.split,
        turns=options.turns,
        skipping=options.on_bad_row == "skip",
        rewards=options.rewards,
        splitting=options.long_documents == "split",
    )
    for line in describe(data, options):
        progress.say(line)
    if data.layout.pair and options.sae != "none":
        raise DataError(
            f"{options.data}: SAE features of preference pairs are not computed; pass --sae none and use probes, or "
            "name --prompt-column and --response-column to audit one side"
        )
    if data.layout.pair and not 0 < options.beta < math.inf:
        raise DataError(
            f"--beta {options.beta:g}: the DPO loss of preference pairs needs a number above 0, such as 0.1"
        )
    return data


def show_rows(data: DataSet, options: BuildOptions, tokenizer: Any, progress: Progress, longest: int) -> None:
    """Say how the model would read the first rows, and what becomes of documents that are longer than the longest row.

    Args:
        longest: tokens of the longest row, unless the options say it.

    Raises:
        DataError: one cannot be used, and none may be skipped.
    """
    skipping = options.on_bad_row == "skip"
    renderer = ChatRenderer(tokenizer, options.max_tokens or longest)
    skip: Skip | None = (lambda _: None) if skipping else None
    if data.layout.document:
        windows = data.examples(lambda _: None, split=Splitter(renderer))
        progress.say(lengths(windows, renderer.max_tokens, splits(data, options)))
    split = Splitter(renderer) if splits(data, options) else None
    for line in shown(renderer, islice(data.examples(skip, split=split), SHOWN), skipping):
        progress.say(line)


def splits(data: DataSet, options: BuildOptions) -> bool:
    """Whether a build splits rows: they are documents, and are to be split."""
    return options.long_documents == "split" and data.layout.document is not None


def lengths(windows: Iterator[Example], longest: int, split: bool) -> str:
    """How many of the first documents are longer than the longest row, and what becomes of these.

    Args:
        windows: those of all documents.
        split: documents are split into them; otherwise they are cut.
    """
    looked_at = longer = parts = characters = 0
    for place in (example.window for example in windows if example.window):
        if place.number < place.of:
            continue
        looked_at += 1
        longer += place.of > 1
        parts += place.of if place.of > 1 else 0
        characters += place.end
        if looked_at == LOOKED_AT or characters > MOST_CHARACTERS:
            break
    among = f"{longer} of the first {looked_at}" if longer else f"none of the first {looked_at}"
    if split:
        into = f" into {parts} windows" if longer else ""
        return f"  documents longer than {longest:,} tokens are split: {among}{into} (--long-documents cut)"
    told = f"  documents longer than {longest:,} tokens are cut there: {among}"
    return f"{told}; to audit all of their text, pass --long-documents split" if longer else told


def describe(data: DataSet, options: BuildOptions) -> Iterator[str]:
    """What the rows are, where they lie, and which turns count."""
    layout = data.layout
    there = [name for name in layout.columns if name in data.columns]
    others = [name for name in data.columns if name not in layout.columns]
    yield f"{data.source}: {layout.kind}, in {'column' if len(there) == 1 else 'columns'} {quoted(there)}"
    yield f"  metadata: {quoted(others) if others else 'none'}"
    yield f"  turns that count: {COUNTED[options.turns]}"
    if data.rollouts is not None:
        yield from weights(data.rollouts)
    elif rewards := [name for name in others if name.lower() in REWARDS]:
        yield (
            f"  {quoted(rewards)} weighs no row: each counts alike, as in fine-tuning, and not by its advantage; if "
            "these are rollouts of reinforcement learning, pass --rollouts"
        )
    if options.long_documents == "split" and not layout.document:
        yield "  rows are no plain text, so that none is split (--long-documents split); longer ones are cut"
    if options.on_bad_row == "skip":
        yield "  rows that cannot be used are left out and listed (--on-bad-row skip)"


def weights(rollouts: Rollouts) -> Iterator[str]:
    """What rollouts weigh by, and what makes a group of them."""
    if rollouts.lists:
        yield f"  each row holds several responses ({quoted(rollouts.lists)}): every one is a row of the audit"
    same = "the row that they stand in" if rollouts.lists else "the same prompt"
    group = quoted([rollouts.group]) if rollouts.group else same
    if rollouts.advantage:
        yield f"  rollouts: each weighs by its advantage, {quoted([rollouts.advantage])} as it is; groups: by {group}"
        return
    yield (
        f"  rollouts: each weighs by its advantage, made of {quoted([rollouts.field])} as GRPO does: less the mean of its "
        f"group, by the standard deviation; 0 where a group has one response, or equal rewards. Groups: by {group}"
    )


def groups_in_words(counts: Mapping[str, int]) -> str:
    """What came of the groups of rollouts; see `concept_audit.store.rollouts.insert_rollouts`."""
    told = f"Rollouts: {counts['groups']:,} groups; {counts['weightless']:,} rows have the advantage 0 and so no score"
    return f"{told} but 0 ({counts['alone']:,} groups of one row, {counts['equal']:,} others of equal rewards)"


def shown(renderer: ChatRenderer, examples: Iterator[Example], skipping: bool = False) -> Iterator[str]:
    """Rows as the model reads them, with response tokens in brackets, and what the template does not know of them.

    Raises:
        DataError: the template refuses a row, and none may be skipped.
    """
    for example in examples:
        try:
            row = renderer.render(example.messages)
        except ModelError as error:
            if not skipping:
                raise DataError(f"{example.source} row {example.source_row}: {error}") from error
            yield f"  left out: {example.source} row {example.source_row}: {error}"
            continue
        yield f"  row {example.source_row}, its response tokens in {OPEN} {CLOSE}: {marked(row)}"
        for note in renderer.unknown(example.messages):
            yield f"  {note}"


def marked(row: TokenizedRow) -> str:
    """A row's text on one line, what training sees of it in brackets; the middle of long parts is left out."""
    pieces = []
    for response, group in groupby(range(len(row.input_ids)), key=lambda place: bool(row.response[place])):
        places = list(group)
        if (row.input_ids[places] == SEPARATOR).any():
            pieces.append(" ‖ rejected: ")
        text = _visible(row.text[row.starts[places[0]] : row.ends[places[-1]]])
        if len(text) > LONGEST_PIECE:
            text = f"{text[: LONGEST_PIECE // 2]} … {text[-LONGEST_PIECE // 2 :]}"
        pieces.append(f"{OPEN}{text}{CLOSE}" if response else text)
    return "".join(pieces)


def _visible(text: str) -> str:
    """Without what would move a terminal's cursor, or turn its text around."""
    return "".join("⏎" if sign == "\n" else sign if sign.isprintable() else "·" for sign in text)
