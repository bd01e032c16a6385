"""Which rows go into which shard, and which of them are batched together.

Rows are numbered in the order of the data. A **unit** of `UNIT_ROWS` rows is what is
batched together: batches never reach from one unit into the next, so scores depend on
neither the machine nor the number of workers. A **shard** is a file of one or more
units. The first 64 shards hold one unit each, the next 64 two, and so on up to
`LARGEST_UNITS`: a stage of a small data set loses minutes when it is killed, and one
of a million rows leaves a few hundred files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

UNIT_ROWS = 256
SHARDS_OF_A_SIZE = 64
LARGEST_UNITS = 16


class Partition(Protocol):
    """Numbered shards, each of a known size."""

    def __len__(self) -> int:
        """How many shards there are, numbered from 0."""

    def size(self, number: int) -> int:
        """Rows of a shard."""


@dataclass(frozen=True)
class RowPartition:
    """The shards of a data set's rows.

    Attributes:
        rows: how many rows the data set has.
    """

    rows: int

    def __len__(self) -> int:
        return shard_of(self.rows - 1) + 1 if self.rows else 0

    def size(self, number: int) -> int:
        return len(self.span(number))

    def sizes(self) -> dict[int, int]:
        """Shard → its rows."""
        return {number: self.size(number) for number in range(len(self))}

    def span(self, number: int) -> range:
        """The example ids of a shard."""
        return range(min(first_row(number), self.rows), min(first_row(number + 1), self.rows))

    def units(self, number: int) -> Iterator[slice]:
        """The units of a shard, as places within the shard."""
        size = self.size(number)
        for start in range(0, size, UNIT_ROWS):
            yield slice(start, min(start + UNIT_ROWS, size))


@dataclass(frozen=True)
class ListedPartition:
    """Shards whose sizes are listed.

    Attributes:
        sizes: rows of each.
    """

    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.sizes)

    def size(self, number: int) -> int:
        return self.sizes[number]


def first_row(number: int) -> int:
    """The example id that a shard begins with."""
    units, step = 0, 1
    while number > SHARDS_OF_A_SIZE and step < LARGEST_UNITS:
        units += SHARDS_OF_A_SIZE * step
        number -= SHARDS_OF_A_SIZE
        step *= 2
    return UNIT_ROWS * (units + number * step)


def shard_of(example_id: int) -> int:
    """The shard that an example is in."""
    unit, shards, step = example_id // UNIT_ROWS, 0, 1
    while unit >= SHARDS_OF_A_SIZE * step and step < LARGEST_UNITS:
        unit -= SHARDS_OF_A_SIZE * step
        shards += SHARDS_OF_A_SIZE
        step *= 2
    return shards + unit // step


def by_shard(example_ids: Sequence[int]) -> dict[int, list[int]]:
    """Shard → those of the examples that are in it, in order of shards."""
    found: dict[int, list[int]] = {}
    for example_id in example_ids:
        found.setdefault(shard_of(example_id), []).append(example_id)
    return dict(sorted(found.items()))
