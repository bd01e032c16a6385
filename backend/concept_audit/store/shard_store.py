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
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from concept_audit.errors import StoreError
from concept_audit.files import atomic_write, is_leftover
from concept_audit.store import checksum
from concept_audit.store.objects import Objects
from concept_audit.store.partition import Partition, RowPartition
from concept_audit.store.shard_files import (
    COMMITTED,
    TABLE,
    TENSORS,
    check_command,
    damaged,
    described,
    intact,
    is_as_written,
    is_there,
    open_tensors,
    read_about,
    read_columns,
    read_tensors,
    rows_of,
    table_rows,
)

__all__ = [
    "COMMITTED",
    "TABLE",
    "TENSORS",
    "RowShards",
    "ShardSet",
    "ShardStore",
    "check_command",
    "intact",
    "is_as_written",
    "is_there",
    "open_tensors",
    "read_about",
    "read_columns",
    "read_tensors",
    "table_rows",
]


@dataclass(frozen=True)
class ShardStore:
    """The shards of an audit: the one place that commits their files.

    Attributes:
        root: their directory.
        objects: object storage that they lie in; the directory then keeps those used last. None for the directory alone.
    """

    root: Path
    objects: Objects | None = None

    def path(self, kind: str, key: str, name: str) -> Path:
        """Where a file lies, or would lie."""
        return self.root / kind / key / name

    def list(self, kind: str, key: str) -> dict[int, int]:
        """The numbered shards that are complete: number → rows, in order."""
        found = {}
        for path in self.glob(kind, key, "*"):
            if path.stem.isdigit() and (rows := rows_of(path)) is not None:
                found[int(path.stem)] = rows
        return dict(sorted(found.items()))

    def glob(self, kind: str, key: str, pattern: str) -> Sequence[Path]:
        """The files of a kind under a key whose names, below it, match a pattern such as ``[0-9]*.safetensors``.

        Those that are in object storage alone are named, and fetched when they are read.
        """
        directory = self.root / kind / key
        found = {path for path in directory.glob(pattern) if path.is_file()}
        if self.objects is not None:
            deep = pattern.count("/") + 1
            names = [Path(name) for name in self.objects.names(directory)]
            found |= {directory / name for name in names if len(name.parts) == deep and name.match(pattern)}
        return sorted(path for path in found if not is_leftover(path.name))

    def delete(self, paths: Iterable[Path]) -> None:
        """Delete files of these shards, wherever they lie."""
        if self.objects is not None:
            self.objects.delete(paths)
            return
        for path in paths:
            path.unlink(missing_ok=True)

    def write_tensors(
        self, path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any] | None = None
    ) -> None:
        """Commit named tensors, and a few JSON values about them."""
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_write(path) as partial:
            save_file(contiguous, partial, described(about))
            checksum.seal(partial)
            self._put(partial, path, once=path.stem.isdigit())
        self._make_room(path)

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
                writer.add_key_value_metadata(described(about))
            checksum.seal(partial)
            self._put(partial, path, once=path.stem.isdigit())
        self._make_room(path)

    def write_json(self, path: Path, values: Mapping[str, Any], passing: bool = False) -> None:
        """Commit JSON values.

        Args:
            passing: of this machine and this moment, and so not for object storage.
        """
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(dict(values), ensure_ascii=False) + "\n", "utf-8")
            if not passing:
                self._put(partial, path, once=False)

    def read_json(self, path: Path, passing: bool = False) -> dict[str, Any] | None:
        """What `write_json` wrote; None if there is no such file.

        Raises:
            StoreError: the file is damaged.
        """
        if self.objects is not None and not passing and not path.exists():
            self.objects.fetch(path)
        try:
            return json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise damaged(path, error) from error

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
        if self.objects is not None and not self.objects.names(wanted):
            for name in self.objects.names(place):
                self.objects.remote.copy(self.objects.name(place / name), self.objects.name(wanted / name))
            self.objects.delete(place / name for name in self.objects.names(place))
        if place.is_dir() and not wanted.exists():
            place.rename(wanted)

    def remove(self, kind: str, key: str | None = None) -> None:
        """Delete the shards of a kind, under one key or all. Links are not followed, and other files stay."""
        directory = self.root / kind / key if key else self.root / kind
        if self.objects is not None:
            self.objects.delete(directory / name for name in self.objects.names(directory))
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
        for kind in self._names(self.root):
            self.remove(kind)

    def remove_others(self, kind: str, key: str) -> None:
        """Delete what is left of a kind under other keys, as `remove`."""
        for other in self._names(self.root / kind):
            if other != key:
                self.remove(kind, other)

    def _names(self, directory: Path) -> set[str]:
        """What a directory holds, wherever it lies."""
        away = self.objects.names(directory) if self.objects is not None else ()
        here = directory.iterdir() if directory.is_dir() else ()
        return {path.name for path in here} | {name.partition("/")[0] for name in away}

    def _put(self, partial: Path, path: Path, once: bool) -> None:
        if self.objects is not None:
            self.objects.put(partial, path, once)

    def _make_room(self, new: Path) -> None:
        if self.objects is not None:
            self.objects.make_room(new)


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
        """Shards that are absent, damaged, or not of the size that they are to have.

        What is in object storage is whole, for it is put so, and under a key there is but one partition.
        """
        if self.store.objects is not None:
            away = {int(path.stem) for path in self.there()}
            return [n for n in range(len(self.partition)) if n not in away]
        there = self.store.list(self.kind, self.key)
        return [n for n in range(len(self.partition)) if there.get(n) != self.partition.size(n)]

    def there(self) -> Sequence[Path]:
        """The shards of which there is a file, in order, whatever it holds."""
        return [path for path in self.store.glob(self.kind, self.key, f"[0-9]*.{self.suffix}") if path.stem.isdigit()]

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
        if rows_of(path) != self.partition.size(number):
            raise self._lost([number])
        return path

    def confirm(self, number: int) -> None:
        """Raise as `complete`; what is in object storage is not fetched for it."""
        if self.store.objects is None or self.path(number).exists():
            self.complete(number)
        elif not self.store.objects.there(self.path(number)):
            raise self._lost([number])

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
