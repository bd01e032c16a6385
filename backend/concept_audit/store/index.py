"""Files of the gradient index: how gradients are projected, and every row's projected gradient.

shards/index/<key>/index.json                 what the index is of, and how faithful it was found
                  /sides.safetensors          two-sided bases of every layer
                  /projection-0007.safetensors   what projects the gradients of block 7
                  /000003.safetensors         the codes of shard 3's rows: 8 bits a number, scales, squared norms
                  /progress.json              how far the building is; gone when it is done
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from concept_audit.errors import StoreError
from concept_audit.store.layout import Layout
from concept_audit.store.partition import RowPartition, by_shard, first_row
from concept_audit.store.shard_store import RowShards, check_command, intact, open_tensors

INDEX = "index"
"""Kind of the shards."""
FINER = 254
"""A query's second 8 bits count a step of the first in so many parts."""
ROWS_AT_ONCE = 32
"""Rows whose codes are widened at one time: few enough to stay in the processor's cache."""


@dataclass(frozen=True)
class IndexFiles:
    """The files of an index.

    Attributes:
        rows: the codes of every row.
    """

    rows: RowShards

    @property
    def root(self) -> Path:
        """Their directory."""
        return self.rows.file("")

    @property
    def description(self) -> Path:
        """What the index is of, as JSON."""
        return self.rows.file("index.json")

    @property
    def sides(self) -> Path:
        """Two-sided bases of every layer."""
        return self.rows.file("sides.safetensors")

    @property
    def progress(self) -> Path:
        """How far the building is."""
        return self.rows.file("progress.json")

    def projection(self, block: int) -> Path:
        """What projects the gradients of a block's layers."""
        return self.rows.file(f"projection-{block:04}.safetensors")

    def describe(self) -> dict[str, Any] | None:
        """What was written as the description; None if there is no index.

        Raises:
            StoreError: it is damaged.
        """
        return self.rows.store.read_json(self.description)

    def write_description(self, about: Mapping[str, Any]) -> None:
        """Replace the description in one step."""
        self.rows.store.write_json(self.description, about)

    def report(self, stage: str, share: float, left: float | None) -> None:
        """Say how far the building is, for other processes to read."""
        state = {"stage": stage, "share": share, "seconds_left": left, "at": time.time()}
        self.rows.store.write_json(self.progress, state)

    def reported(self) -> dict[str, Any] | None:
        """What the last report said; None if nothing is being built."""
        try:
            return self.rows.store.read_json(self.progress)
        except StoreError:
            return None

    def norms(self, blocks: int) -> np.ndarray:
        """‖∇θL(z)‖ of every row over the layers of the first so many blocks: float64 [rows].

        NaN where a row has no loss.
        """
        found = []
        for path in self.paths():
            with open_tensors(path, "numpy") as file:
                found.append(file.get_tensor("squares")[:, :blocks].sum(1, dtype=np.float64))
        return np.sqrt(np.concatenate(found))

    def remove_rows(self) -> None:
        """Delete the codes of all rows."""
        for number in range(len(self.rows.partition)):
            self.rows.path(number).unlink(missing_ok=True)

    def complete(self, blocks: Sequence[int]) -> bool:
        """Whether the projection of these blocks and all rows' codes are there."""
        projections = (self.projection(block) for block in blocks)
        return all(intact(path) for path in (self.sides, *projections)) and not self.rows.missing()

    def paths(self) -> list[Path]:
        """The files of all rows' codes, in order.

        Raises:
            StoreError: one is missing or short.
        """
        if missing := self.rows.missing():
            raise StoreError(
                f"{self.rows.path(missing[0])}: absent or damaged, and so {len(missing)} of "
                f"{len(self.rows.partition)} shards of the gradient index; `concept-audit index "
                f"{self.rows.store.root.parent}` with the same options makes what is missing, and so does "
                f"`{check_command(self.rows.store.root.parent)}`"
            )
        return [self.rows.path(number) for number in range(len(self.rows.partition))]


def index_files(layout: Layout, key: str, partition: RowPartition) -> IndexFiles:
    """The index under a key, whether or not it has been built."""
    return IndexFiles(RowShards(layout.shards, INDEX, key, partition))


def present_index(layout: Layout, partition: RowPartition) -> IndexFiles | None:
    """The index that an audit has, finished or not: the one that was worked on last; None if there is none."""
    found = present_indexes(layout, partition)
    return found[-1] if found else None


def present_indexes(layout: Layout, partition: RowPartition) -> list[IndexFiles]:
    """Every index that an audit has, finished or not, in the order in which they were worked on."""
    described = (layout.shards.root / INDEX).glob("*/index.json")
    ordered = sorted((path.stat().st_mtime_ns, path.parent.name) for path in described)
    return [index_files(layout, key, partition) for _, key in ordered]


def sweep(paths: Sequence[Path], queries: np.ndarray, ends: int) -> Iterator[np.ndarray]:
    """Scores of every row for several queries, a shard at a time.

    Memory does not grow with the rows: a shard's codes are mapped from disk, and multiplied as they are, or
    widened `ROWS_AT_ONCE` rows at a time where the processor has no instructions for 8-bit integers.

    Args:
        paths: of the rows' codes, a shard each.
        queries: float32 [numbers, queries], multiplied with the spread of each number already.
        ends: the first so many numbers count; the rest belong to deeper blocks.

    Yields:
        float64 [rows of the shard, queries]; NaN where a row has no loss.
    """
    integer, floating = _integer_product(queries, ends), _float_product(queries, ends)
    for path in paths:
        with open_tensors(path, "pt") as file:
            codes = file.get_tensor("codes")
            scales = file.get_tensor("scales").double().numpy()
        multiply = integer if integer is not None and codes.dtype == torch.int8 else floating
        yield multiply(codes).numpy() * scales[:, None]


def products(files: IndexFiles, example_ids: Sequence[int], queries: np.ndarray) -> np.ndarray:
    """As `sweep`, of chosen rows alone: float64 [rows, queries].

    Args:
        queries: float32 [numbers, queries]; numbers beyond them count nothing.
    """
    found = np.empty((len(example_ids), queries.shape[1]))
    places = {example_id: place for place, example_id in enumerate(example_ids)}
    wide = queries.astype(np.float64)
    for number, ids in by_shard(example_ids).items():
        with open_tensors(files.rows.complete(number), "numpy") as file:
            codes, scales = file.get_slice("codes"), file.get_slice("scales")
            for example_id in ids:
                row = example_id - first_row(number)
                mine = codes[row : row + 1][0, : len(wide)].astype(np.float64)
                found[places[example_id]] = (mine @ wide) * float(scales[row : row + 1][0])
    return found


Product = Callable[[torch.Tensor], torch.Tensor]
"""Codes int8 [rows, numbers] → float64 [rows, queries]."""


def _integer_product(queries: np.ndarray, ends: int) -> Product | None:
    """Products of the codes as they are with queries in 16 bits, two times 8: exact sums, and nothing is widened.

    None where the processor has no such instructions, or sums would not fit into 32 bits.
    """
    if not torch.cpu._is_vnni_supported() or ends * 127**2 >= 2**31:
        return None
    kept = queries[:ends]
    step = np.abs(kept).max(0) / 127
    step = np.where(step > 0, step, 1.0)
    high = np.rint(kept / step)
    low = np.rint((kept / step - high) * FINER)
    both = torch.from_numpy(np.concatenate([high, low], axis=1).astype(np.int8))
    count, scale = queries.shape[1], torch.from_numpy(step.astype(np.float64))

    def multiply(codes: torch.Tensor) -> torch.Tensor:
        # Numbers of deeper blocks count nothing. Sliced they would be copied: zeros are quicker.
        beyond = codes.shape[1] - len(both)
        whole = torch.nn.functional.pad(both, (0, 0, 0, beyond)) if beyond else both
        found = torch._int_mm(codes, whole).double()
        return (found[:, :count] + found[:, count:] / FINER) * scale

    return multiply


def _float_product(queries: np.ndarray, ends: int) -> Product:
    wide = torch.from_numpy(np.ascontiguousarray(queries[:ends], dtype=np.float32))
    room = torch.empty(ROWS_AT_ONCE, ends)

    def multiply(codes: torch.Tensor) -> torch.Tensor:
        parts = []
        for start in range(0, len(codes), ROWS_AT_ONCE):
            part = codes[start : start + ROWS_AT_ONCE, :ends]
            parts.append(torch.mm(room[: len(part)].copy_(part), wide).double())
        return torch.cat(parts)

    return multiply
