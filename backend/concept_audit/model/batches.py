"""Batches: rows of like length, padded on the right, under a token budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from concept_audit.errors import ModelError
from concept_audit.model.memory import give_back

Result = TypeVar("Result")
FULL = ("can't allocate memory", "MPS backend out of memory", "Invalid buffer size")
"""What PyTorch says where it has no error of its own for want of memory."""


@dataclass(frozen=True)
class Batch:
    """Rows as the model takes them.

    Attributes:
        rows: the place of each row in the sequence that the batch was made from.
        ids: int64 [rows, tokens], padded on the right with 0. In a causal model no real token
            sees what stands to its right, so the padding needs no mask.
        response: bool [rows, tokens]; False in the padding.
        real: bool [rows, tokens]; False in the padding.
    """

    rows: list[int]
    ids: torch.Tensor
    response: torch.Tensor
    real: torch.Tensor


def batches_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group rows of like length so that rows × longest ≤ `budget`; a longer row goes alone.

    Returns:
        lists of indices into `lengths`, longest rows first (memory peaks at once, not at the end).
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * longest > budget:
            batches.append([])
            longest = max(lengths[index], 1)
        batches[-1].append(index)
    return batches


def padded(
    rows: Sequence[int],
    ids: Sequence[np.ndarray] | Mapping[int, np.ndarray],
    response: Sequence[np.ndarray] | Mapping[int, np.ndarray],
    device: torch.device,
    multiple: int = 1,
    most: int | None = None,
) -> Batch:
    """The chosen rows as one batch.

    Args:
        ids: one int array [tokens] a row, by its place.
        response: one bool array [tokens] a row.
        multiple: the padded length is one of this. Matrix libraries prepare, and keep, a kernel for
            each shape that they meet; fewer shapes are faster and take less memory.
        most: padding ends at this many tokens: a model with a table of positions has none beyond.
    """
    longest = max(len(ids[i]) for i in rows)
    rounded = -(-longest // multiple) * multiple
    longest = max(longest, min(rounded, most or rounded))
    tokens = np.zeros((len(rows), longest), np.int64)
    supervised = np.zeros((len(rows), longest), bool)
    real = np.zeros((len(rows), longest), bool)
    for place, i in enumerate(rows):
        tokens[place, : len(ids[i])] = ids[i]
        supervised[place, : len(ids[i])] = response[i]
        real[place, : len(ids[i])] = True
    return Batch(list(rows), *(torch.from_numpy(array).to(device) for array in (tokens, supervised, real)))


def halving(
    rows: Sequence[int], run: Callable[[Sequence[int]], Result], say: Callable[[str], None], device: torch.device
) -> Iterator[Result]:
    """Run a batch; out of memory, run its halves, and theirs.

    Args:
        run: does the work for the rows that it is given, and leaves nothing behind if it fails.
        say: told each time that a batch is halved.
        device: where it runs.

    Yields:
        the result of each part.

    Raises:
        ModelError: a single row does not fit.
    """
    try:
        yield run(rows)
        return
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        if len(rows) == 1:
            raise ModelError(
                "out of memory on a batch of one row; shorten the rows with --max-tokens, or use a machine "
                "with more memory"
            ) from error
    # Out of the handler, the traceback no longer holds the tensors of the failed attempt.
    give_back(device)
    say(f"Out of memory on a batch of {len(rows)} rows: going on with half of it at a time")
    middle = len(rows) // 2
    for half in (rows[:middle], rows[middle:]):
        yield from halving(half, run, say, device)


def _out_of_memory(error: BaseException) -> bool:
    # On the CPU and on MPS, PyTorch raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in FULL)
