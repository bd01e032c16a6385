"""How many files a stage leaves, and how fast a hole among them is found.

python tests/benchmarks/files.py [--rows 1000000]

First by calculation; then with shards of a byte a row, of which one is damaged, one is cut off, one is of fewer
rows and one is deleted: exactly these must be found missing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import torch

from concept_audit.store.manifest import STAGE_OF
from concept_audit.store.partition import UNIT_ROWS, RowPartition
from concept_audit.store.shard_store import TABLE, TENSORS, RowShards, ShardStore

SCHEMA = pa.schema([("value", pa.uint8())])
BUILT = [kind for kind in STAGE_OF if "answer" not in kind]
"""Kinds that a build leaves; the model's own answers are made on demand."""


def count(rows: int) -> None:
    """The files of one kind, by calculation."""
    partition = RowPartition(rows)
    units = -(-rows // UNIT_ROWS)
    print(
        f"{rows:10,} rows: {len(partition):5,} files a kind, {len(partition) * len(BUILT):6,} of a whole build "
        f"(one a unit of {UNIT_ROWS} rows: {units:,} a kind); largest shard {max(partition.sizes().values()):,} rows"
    )


def write(shards: RowShards, number: int) -> None:
    """A shard of a byte a row."""
    size = shards.partition.size(number)
    if shards.suffix == TABLE:
        shards.write_table(number, [pa.table({"value": [0] * size}, SCHEMA)], SCHEMA)
    else:
        shards.write_tensors(number, {"value": torch.zeros(size, dtype=torch.uint8)})


def timed(what: str, run: Callable):
    started = time.perf_counter()
    found = run()
    print(f"    {what}: {time.perf_counter() - started:.3f} s")
    return found


def spoil(shards: RowShards) -> list[int]:
    """Damage a shard, cut one off, replace one by one of fewer rows, delete one."""
    last = len(shards.partition) - 1
    damaged, cut, short, deleted = chosen = [last // 5, last // 3, last // 2, last]
    content = bytearray(shards.path(damaged).read_bytes())
    place = slice(-24, None) if shards.suffix == TABLE else slice(0, 24)
    content[place] = b"\xff" * 24
    shards.path(damaged).write_bytes(content)
    content = shards.path(cut).read_bytes()
    shards.path(cut).write_bytes(content[: len(content) - 40])
    write(replace(shards, partition=RowPartition(shards.partition.span(short).stop - 1)), short)
    shards.path(deleted).unlink()
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    for rows in sorted({439, 16_384, 100_000, 1_000_000, 10_000_000, options.rows}):
        count(rows)
    partition, wrong = RowPartition(options.rows), False
    with tempfile.TemporaryDirectory() as scratch:
        for suffix in (TENSORS, TABLE):
            shards = RowShards(ShardStore(Path(scratch)), suffix, "key", partition, suffix)
            print(f"{suffix}, {options.rows:,} rows in {len(partition):,} files")
            timed("write, each flushed to the disk", lambda s=shards: [write(s, n) for n in range(len(partition))])
            listed = timed("list()", lambda s=shards: s.store.list(s.kind, s.key))
            assert listed == partition.sizes(), "every shard is listed with its rows"
            assert timed("missing()", shards.missing) == []
            chosen = spoil(shards)
            found = shards.missing()
            wrong |= found != chosen
            print(f"    damaged, cut off, short, deleted: {chosen}; found missing: {found}")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
