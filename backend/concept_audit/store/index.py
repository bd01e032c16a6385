"""Files of the gradient index: how gradients are projected, and every row's projected gradient.

All are complete or absent::

    shards/index/index.json                 what the index is of, and how faithful it was found
                /sides.safetensors          two-sided bases of every layer
                /projection-0007.safetensors   what projects the gradients of block 7
                /000003.safetensors         the numbers of shard 3's rows: 8-bit codes, scales, norms
                /progress.json              how far the building is; gone when it is done
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from concept_audit.errors import StoreError
from concept_audit.store.layout import Layout, whole

FINER = 254
"""A query's second 8 bits count a step of the first in so many parts."""
ROWS_AT_ONCE = 32
"""Rows whose codes are widened at one time: few enough to stay in the processor's cache."""


@dataclass(frozen=True)
class IndexFiles:
    """The files of an audit's index.

    Attributes:
        root: their directory.
    """

    root: Path

    @property
    def description(self) -> Path:
        """What the index is of, as JSON."""
        return self.root / "index.json"

    @property
    def sides(self) -> Path:
        """Two-sided bases of every layer."""
        return self.root / "sides.safetensors"

    @property
    def progress(self) -> Path:
        """How far the building is."""
        return self.root / "progress.json"

    def projection(self, block: int) -> Path:
        """What projects the gradients of a block's layers."""
        return self.root / f"projection-{block:04}.safetensors"

    def shard(self, number: int) -> Path:
        """The numbers of one shard's rows."""
        return self.root / f"{number:06}.safetensors"

    def shard_numbers(self) -> list[int]:
        """The shards that are complete, in order."""
        return sorted(int(p.stem) for p in self.root.glob("*.safetensors") if p.stem.isdigit())

    def describe(self) -> dict[str, Any] | None:
        """What was written as the description; None if there is no index.

        Raises:
            StoreError: it is damaged.
        """
        try:
            return json.loads(self.description.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{self.description}: damaged ({error}); delete {self.root}, then build the index again"
            ) from error

    def write_description(self, about: Mapping[str, Any]) -> None:
        """Replace the description in one step."""
        with whole(self.description) as partial:
            partial.write_text(json.dumps(dict(about), indent=2) + "\n", "utf-8")

    def report(self, stage: str, share: float, left: float | None) -> None:
        """Say how far the building is, for other processes to read."""
        with whole(self.progress) as partial:
            state = {"stage": stage, "share": share, "seconds_left": left, "at": time.time()}
            partial.write_text(json.dumps(state), "utf-8")

    def reported(self) -> dict[str, Any] | None:
        """What the last report said; None if nothing is being built."""
        try:
            return json.loads(self.progress.read_text("utf-8"))
        except (OSError, ValueError):
            return None


def index_files(layout: Layout) -> IndexFiles:
    """The audit's index, whether or not it has been built."""
    return IndexFiles(layout.shards("index"))


def read_norms(files: IndexFiles) -> np.ndarray:
    """‖∇θL(z)‖ of every row over the index's layers: float32 [rows]; NaN where a row has no loss."""
    return np.concatenate([_read(files.shard(number), "norms") for number in files.shard_numbers()])


def sweep(files: IndexFiles, queries: np.ndarray, ends: int) -> Iterator[np.ndarray]:
    """Scores of every row for several queries, a shard at a time.

    Memory does not grow with the rows: a shard's codes are mapped from disk, and multiplied as they are, or
    widened `ROWS_AT_ONCE` rows at a time where the processor has no instructions for 8-bit integers.

    Args:
        queries: float32 [numbers, queries], multiplied with the spread of each number already.
        ends: the first so many numbers count; the rest belong to deeper blocks.

    Yields:
        float64 [rows of the shard, queries]; NaN where a row has no loss.
    """
    integer, floating = _integer_product(queries, ends), _float_product(queries, ends)
    for number in files.shard_numbers():
        with safe_open(files.shard(number), "pt") as file:
            codes = file.get_tensor("codes")
            scales = file.get_tensor("scales").double().numpy()
        multiply = integer if integer is not None and codes.dtype == torch.int8 else floating
        yield multiply(codes).numpy() * scales[:, None]


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


def _read(path: Path, name: str) -> np.ndarray:
    with safe_open(path, "numpy") as file:
        return file.get_tensor(name)
