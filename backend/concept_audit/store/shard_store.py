"""Shards: what stages make, in files that are complete or absent.

A file's name says what it is of: ``shards/<kind>/<key>/<number>``, where the key is a
hash of all that its content depends on. A straggler that still works for an earlier
configuration writes under the earlier key, and is never taken for the present one.
Each shard records how many rows it holds, so that a hole, a short or a damaged shard
is noticed and made again.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from concept_audit.errors import StoreError, first_line
from concept_audit.files import atomic_write, is_leftover
from concept_audit.store import checksum
from concept_audit.store.partition import Partition, RowPartition

TABLE, TENSORS = "parquet", "safetensors"
COMMITTED = {f".{TABLE}", f".{TENSORS}", ".json"}
"""Endings of the names of all files that are committed here."""
_SEALED = "sealed"
_SEAL = (checksum.NAME, _SEALED)


@dataclass(frozen=True)
class ShardStore:
    """The shards of an audit: the one place that commits their files.

    Attributes:
        root: their directory.
    """

    root: Path

    def path(self, kind: str, key: str, name: str) -> Path:
        """Where a file lies, or would lie."""
        return self.root / kind / key / name

    def list(self, kind: str, key: str) -> dict[int, int]:
        """The numbered shards that are complete: number → rows, in order."""
        directory = self.root / kind / key
        found = {}
        for path in directory.iterdir() if directory.is_dir() else ():
            if path.stem.isdigit() and (rows := _rows(path)) is not None:
                found[int(path.stem)] = rows
        return dict(sorted(found.items()))

    def write_tensors(
        self, path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any] | None = None
    ) -> None:
        """Commit named tensors, and a few JSON values about them."""
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_write(path) as partial:
            save_file(contiguous, partial, _metadata(about))
            checksum.seal(partial)

    def write_table(
        self,
        path: Path,
        parts: Iterable[pa.Table],
        schema: pa.Schema,
        about: Mapping[str, Any] | None = None,
        group: int | None = None,
    ) -> None:
        """Commit a table.

        Args:
            parts: its rows as they come; no more than one part is in memory.
            about: a few JSON values about it; may be filled while the parts are drawn.
            group: rows of a row group, which is what is read at a time; None for one a part.
        """
        with atomic_write(path) as partial:
            with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
                for part in parts:
                    writer.write_table(part, row_group_size=group)
                # Last, so that it may tell sums over the parts.
                writer.add_key_value_metadata(_metadata(about))
            checksum.seal(partial)

    def write_json(self, path: Path, values: Mapping[str, Any]) -> None:
        """Commit JSON values."""
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(dict(values), ensure_ascii=False) + "\n", "utf-8")

    def read_json(self, path: Path) -> dict[str, Any] | None:
        """What `write_json` wrote; None if there is no such file.

        Raises:
            StoreError: the file is damaged.
        """
        try:
            return json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error

    def claim(self, path: Path, made_of: Mapping[str, Any], what: str, purpose: str) -> None:
        """Say in a description beside files what they are of.

        Args:
            path: of the description.
            made_of: fingerprints of ``model`` and ``data``, and settings.
            what, purpose: of the files, for the error.

        Raises:
            StoreError: they are of something else; both are named.
        """
        wanted = json.loads(json.dumps(dict(made_of)))
        found = self.read_json(path)
        if found is None:
            self.write_json(path, wanted)
            return
        other = sorted(name for name in {**wanted, **found} if found.get(name) != wanted.get(name))
        if other:
            differences = "; ".join(f"{n} {found.get(n)}, but this audit has {wanted.get(n)}" for n in other)
            raise StoreError(
                f"{path.parent}: {what} of another model or data set ({differences}); delete that directory {purpose}"
            )

    def rename(self, kind: str, key: str, new: str) -> None:
        """Keep what lies under a key under another one, where nothing does yet."""
        place, wanted = self.root / kind / key, self.root / kind / new
        if place.is_dir() and not wanted.exists():
            place.rename(wanted)

    def remove(self, kind: str, key: str | None = None) -> None:
        """Delete the shards of a kind, under one key or all. Links are not followed, and other files stay."""
        directory = self.root / kind / key if key else self.root / kind
        if directory.resolve() != self.root.parent.resolve() / directory.relative_to(self.root.parent):
            return  # behind a link, and so not ours to delete; nothing reads what lies under an older key
        if directory.is_file() and directory.suffix in COMMITTED:
            directory.unlink()  # an earlier version had no keys
        for place, _, names in os.walk(directory, topdown=False):
            for name in names:
                if Path(name).suffix in COMMITTED or is_leftover(name):
                    Path(place, name).unlink(missing_ok=True)
            with suppress(OSError):  # not empty: something in it is not ours
                os.rmdir(place)

    def remove_all(self) -> None:
        """Delete the shards of every kind, as `remove`."""
        for directory in list(self.root.iterdir()) if self.root.is_dir() else ():
            self.remove(directory.name)

    def remove_others(self, kind: str, key: str) -> None:
        """Delete what is left of a kind under other keys, as `remove`."""
        directory = self.root / kind
        for path in directory.iterdir() if directory.is_dir() else ():
            if path.name != key:
                self.remove(kind, path.name)


@dataclass(frozen=True)
class ShardSet:
    """The shards of one kind under one key: what a stage makes and others read.

    Attributes:
        store: where they lie.
        kind: ``rows``, ``tokens``, ``activations``, ...
        key: a hash of all that they depend on.
        partition: how many there are to be, and the rows of each.
        suffix: their format.
    """

    store: ShardStore
    kind: str
    key: str
    partition: Partition
    suffix: str = TENSORS

    def path(self, number: int) -> Path:
        """The file of one shard."""
        return self.file(f"{number:06}.{self.suffix}")

    def file(self, name: str) -> Path:
        """A file beside the shards, which belongs to all of them."""
        return self.store.path(self.kind, self.key, name)

    def missing(self) -> list[int]:
        """Shards that are absent, damaged, or not of the size that they are to have."""
        there = self.store.list(self.kind, self.key)
        return [n for n in range(len(self.partition)) if there.get(n) != self.partition.size(n)]

    def numbers(self) -> range:
        """Every shard's number.

        Raises:
            StoreError: one is absent, damaged or short.
        """
        if missing := self.missing():
            raise self._lost(missing)
        return range(len(self.partition))

    def complete(self, number: int) -> Path:
        """The file of one shard.

        Raises:
            StoreError: it is absent, damaged or short.
        """
        path = self.path(number)
        if _rows(path) != self.partition.size(number):
            raise self._lost([number])
        return path

    def _lost(self, missing: Sequence[int]) -> StoreError:
        many = f", and so {len(missing)} of {len(self.partition)} shards" if len(missing) > 1 else ""
        return StoreError(
            f"{self.path(missing[0])}: absent or damaged{many}; "
            "run the command that made the audit again, it makes what is missing, or "
            f"`{check_command(self.store.root.parent)}`"
        )

    def write_tensors(
        self, number: int, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any] | None = None
    ) -> None:
        """Commit one shard of tensors."""
        self.store.write_tensors(self.path(number), tensors, {**(about or {}), "rows": self.partition.size(number)})

    def write_table(
        self,
        number: int,
        parts: Iterable[pa.Table],
        schema: pa.Schema,
        about: dict[str, Any] | None = None,
        group: int | None = None,
    ) -> None:
        """Commit one shard that is a table; see `ShardStore.write_table`."""
        about = {} if about is None else about
        about["rows"] = self.partition.size(number)
        self.store.write_table(self.path(number), parts, schema, about, group)


@dataclass(frozen=True)
class RowShards(ShardSet):
    """Shards of the data's rows, in the order of the data."""

    partition: RowPartition


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Named tensors of a file.

    Raises:
        StoreError: it is absent or damaged.
    """
    with _readable(path):
        return load_file(path, device=str(device))


@contextmanager
def open_tensors(path: Path, framework: str) -> Iterator[Any]:
    """A file of tensors, to read some of; raises as `read_tensors`.

    Args:
        framework: ``pt`` or ``numpy``.
    """
    with _readable(path), safe_open(path, framework) as file:
        yield file


def read_about(path: Path) -> dict[str, Any]:
    """The JSON values that were written with a file; raises as `read_tensors`."""
    return {name: value for name, value in _description(path).items() if name not in _SEAL}


def is_as_written(path: Path) -> bool:
    """Whether every byte of a file is the one that was written; true of files that have no checksum yet.

    Raises:
        StoreError: it is absent, or so damaged that it does not tell its checksum.
    """
    described = _description(path)
    written = described.get(checksum.NAME)
    # Two names say that there is a checksum: that one is damaged does not make it a file of an earlier version.
    return _SEALED not in described if written is None else checksum.matches(path, written)


def read_columns(path: Path, columns: Sequence[str], filters: Any = None) -> pa.Table:
    """Some columns of a table; raises as `read_tensors`."""
    with _readable(path):
        return pq.read_table(path, columns=list(columns), filters=filters)


def table_rows(path: Path) -> int:
    """How many rows a table has, whatever they are of; raises as `read_tensors`."""
    with _readable(path):
        return pq.read_metadata(path).num_rows


def intact(path: Path) -> bool:
    """Whether a file is there, of its full length, with a description that can be read."""
    try:
        read_about(path)
    except StoreError:
        return False
    return True


def check_command(root: Path) -> str:
    """The command that finds what is damaged in an audit, and has it made again."""
    return shlex.join(["concept-audit", "check", str(root), "--repair"])


def _description(path: Path) -> dict[str, Any]:
    with _readable(path):
        if path.suffix == f".{TABLE}":
            return json.loads(pq.read_metadata(path).metadata[b"about"])
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["about"])


def _metadata(about: Mapping[str, Any] | None) -> dict[str, str]:
    # A single entry: several come in another order in each process, and equal shards are equal byte by byte.
    return {"about": json.dumps({**(about or {}), checksum.NAME: checksum.ROOM, _SEALED: True})}


def _damaged(path: Path, error: Exception) -> StoreError:
    # shards/<kind>/<key>/<file>; some lie deeper.
    root = next((above.parent for above in path.parents if above.name == "shards"), path.parent)
    return StoreError(f"{path}: absent or damaged ({first_line(error)}); `{check_command(root)}` has it made again")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, SafetensorError) as error:
        raise _damaged(path, error) from error


def _rows(path: Path) -> int | None:
    """Rows that a shard records; None if it cannot be read."""
    try:
        return read_about(path).get("rows")
    except StoreError:
        return None
