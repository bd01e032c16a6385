"""Files of the gradient index: how gradients are projected, and every row's projected gradient.

shards/index/<key>/index.json                 what the index is of, and how faithful it was found
                  /sides.safetensors          two-sided bases of every layer
                  /projection-0007.safetensors   what projects the gradients of block 7
                  /000003.safetensors         the codes of shard 3's rows: 8, 4 or 2 bits a number, scales, squared norms
                  /progress.json              how far the building is; gone when it is done
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from concept_audit.errors import StoreError
from concept_audit.store import under_way
from concept_audit.store.layout import Layout
from concept_audit.store.packing import Packing
from concept_audit.store.partition import RowPartition, by_shard, first_row
from concept_audit.store.shard_store import RowShards, check_command, intact, open_tensors

INDEX = "index"
"""Kind of the shards."""
CPU = torch.device("cpu")
FINER = 254
"""A query's second 8 bits count a step of the first in so many parts."""
ROWS_AT_ONCE = 32
"""Rows whose codes are widened at one time: few enough to stay in the processor's cache."""
ROWS_AT_ONCE_INTEGERS = 256
"""The same where codes are multiplied as integers: each product has a price of its own, whatever its rows."""
ROWS_AT_ONCE_ACCELERATOR = 1024


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

    def reported(self) -> dict[str, Any] | None:
        """What the last report said, as `concept_audit.store.under_way.report`; None if nothing is being built."""
        return under_way.reported(self.rows.store, self.progress)

    def norms(self, blocks: int) -> np.ndarray:
        """‖∇θL(z)‖ of every row over the layers of the first so many blocks: float64 [rows].

        NaN where a row has no loss, and of preference pairs.
        """
        found = []
        for path in self.paths():
            with open_tensors(path, "numpy") as file:
                found.append(file.get_tensor("squares")[:, :blocks].sum(1, dtype=np.float64))
        return np.sqrt(np.concatenate(found))

    def remove_rows(self) -> None:
        """Delete the codes of all rows."""
        self.rows.store.delete(self.rows.there())

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


def sweep(
    paths: Sequence[Path],
    queries: np.ndarray,
    packing: Packing,
    offsets: np.ndarray | float = 0.0,
    device: torch.device = CPU,
) -> Iterator[np.ndarray]:
    """Scores of every row for several queries, a shard at a time.

    Memory does not grow with the rows: a shard's codes are mapped from disk, and multiplied as they are where all
    have 8 bits and the processor has instructions for such integers, or widened some rows at a time.

    Args:
        paths: of the rows' codes, a shard each.
        queries: float32 [numbers, queries], in the order of the packing: what a value counts.
        packing: of the rows' numbers.
        offsets: float64 [queries], added to the sum over a row's numbers.
        device: where codes are multiplied.

    Yields:
        float64 [rows of the shard, queries], multiplied with the rows' scales; NaN where a row has no loss.
    """
    multiply = (device == CPU and _integer_product(queries, packing)) or _float_product(queries, packing, device)
    for path in paths:
        with open_tensors(path, "pt") as file:
            codes = file.get_tensor("codes")
            scales = file.get_tensor("scales").double().numpy()
        yield (multiply(codes).numpy() + offsets) * scales[:, None]


def products(
    files: IndexFiles,
    example_ids: Sequence[int],
    queries: np.ndarray,
    packing: Packing,
    offsets: np.ndarray | float = 0.0,
) -> np.ndarray:
    """As `sweep`, of chosen rows alone: float64 [rows, queries]."""
    found = np.empty((len(example_ids), queries.shape[1]))
    places = {example_id: place for place, example_id in enumerate(example_ids)}
    wide = queries.astype(np.float64)
    room = torch.empty(1, packing.numbers, dtype=torch.float64)
    for number, ids in by_shard(example_ids).items():
        with open_tensors(files.rows.complete(number), "pt") as file:
            codes, scales = file.get_slice("codes"), file.get_slice("scales")
            for example_id in ids:
                row = example_id - first_row(number)
                mine = packing.unpack(codes[row : row + 1], room).numpy()[0]
                found[places[example_id]] = (mine @ wide + offsets) * float(scales[row : row + 1][0])
    return found


Product = Callable[[torch.Tensor], torch.Tensor]
"""Codes int8 [rows, bytes] → float64 [rows, queries]."""


def _integer_product(queries: np.ndarray, packing: Packing) -> Product | None:
    """Products of the values as integers with queries in 16 bits, two times 8: exact sums.

    A plane of the packing at a time. Its bits stay where they are in their byte, where they count for 2^shift times as
    much, and the sums are divided; only the highest are brought down, which their sign would be in the way of.

    None where the processor has no such instructions, or sums would not fit into 32 bits.
    """
    if not torch.cpu._is_vnni_supported() or any(_largest_sum(*plane) >= 2**31 for plane in packing.planes()):
        return None
    step = np.abs(queries).max(0) / 127
    step = np.where(step > 0, step, 1.0)
    high = np.rint(queries / step)
    low = np.rint((queries / step - high) * FINER)
    both = torch.from_numpy(np.concatenate([high, low], axis=1).astype(np.int8))
    count, scale = queries.shape[1], torch.from_numpy(step.astype(np.float64))
    planes = [(width, shift, in_bytes, both[numbers]) for width, shift, in_bytes, numbers in packing.planes()]
    widest = max((in_bytes.stop - in_bytes.start for _, _, in_bytes, _ in planes), default=0)
    room = torch.empty(ROWS_AT_ONCE_INTEGERS * widest, dtype=torch.int8)

    def some(codes: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(len(codes), both.shape[1], dtype=torch.int64)
        for width, shift, in_bytes, counted in planes:
            plane = codes[:, in_bytes]
            values = room[: plane.numel()].view(plane.shape)
            if width == 8:
                sums += torch._int_mm(plane, counted)
            elif shift + width == 8:
                torch.bitwise_right_shift(plane.view(torch.uint8), shift, out=values.view(torch.uint8))
                sums += torch._int_mm(values, counted)
            else:
                torch.bitwise_and(plane, (2**width - 1) << shift, out=values)
                sums += torch._int_mm(values, counted) >> shift
        found = sums.double()
        return (found[:, :count] + found[:, count:] / FINER) * scale

    return lambda codes: torch.cat([some(part) for part in codes.split(ROWS_AT_ONCE_INTEGERS)])


def _largest_sum(width: int, shift: int, _in_bytes: slice, numbers: slice) -> int:
    """How large the product of a plane with a query of 8 bits may become."""
    value = 127 if width == 8 else 2**width - 1 << shift
    return (numbers.stop - numbers.start) * value * 127


def _float_product(queries: np.ndarray, packing: Packing, device: torch.device) -> Product:
    """Products in float32 on a device, a plane of the packing at a time.

    Bits stay where they are in their byte: there they count for 2^shift times as much, and the queries for less.
    """
    parts = []
    for width, shift, in_bytes, numbers in packing.planes():
        # Query by query: a product of few columns takes several times as long where they lie side by side.
        counted = torch.from_numpy((queries[numbers] / 2**shift).astype(np.float32).T.copy()).to(device).T
        parts.append((None if width == 8 else (2**width - 1) << shift, in_bytes, counted))
    at_once = ROWS_AT_ONCE if device == CPU else ROWS_AT_ONCE_ACCELERATOR
    room = torch.empty(at_once * max((len(counted) for _, _, counted in parts), default=0), device=device)
    # Memory that CUDA reads by itself: several times as fast as from a file's pages.
    staging = (
        torch.empty(at_once, packing.row_bytes, dtype=torch.int8, pin_memory=True) if device.type == "cuda" else None
    )

    def some(codes: torch.Tensor) -> torch.Tensor:
        codes = (codes if staging is None else staging[: len(codes)].copy_(codes)).to(device)
        total = torch.zeros(len(codes), queries.shape[1], device=device)
        for mask, in_bytes, counted in parts:
            plane = codes[:, in_bytes] if mask is None else codes.view(torch.uint8)[:, in_bytes] & mask
            total.addmm_(room[: plane.numel()].view(plane.shape).copy_(plane), counted)
        return total

    return lambda codes: torch.cat([some(part) for part in codes.split(at_once)]).cpu().double()
