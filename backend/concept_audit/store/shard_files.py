"""The files of shards, once they are committed: what is in them, and whether it is what was written.

One that lies in object storage is fetched when it is read.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from concept_audit.errors import StoreError, first_line
from concept_audit.store import checksum
from concept_audit.store.objects import objects_for

TABLE, TENSORS = "parquet", "safetensors"
COMMITTED = {f".{TABLE}", f".{TENSORS}", ".json"}
"""Endings of the names of all files that are committed."""
_SEALED = "sealed"
_SEAL = (checksum.NAME, _SEALED)


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


def is_there(path: Path) -> bool:
    """Whether there is a file; one in object storage is fetched."""
    return path.exists() or _fetched(path)


def lies_in_storage(path: Path) -> bool:
    """Whether object storage has a file, whatever it holds."""
    objects = objects_for(path)
    return objects is not None and objects.there(path)


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


def described(about: Mapping[str, Any] | None) -> dict[str, str]:
    """What a file tells of itself, with room for its checksum."""
    # A single entry: several come in another order in each process, and equal shards are equal byte by byte.
    return {"about": json.dumps({**(about or {}), checksum.NAME: checksum.ROOM, _SEALED: True})}


def damaged(path: Path, error: Exception) -> StoreError:
    """That a file cannot be read, and what makes it anew."""
    # shards/<kind>/<key>/<file>; some lie deeper.
    root = next((above.parent for above in path.parents if above.name == "shards"), path.parent)
    return StoreError(f"{path}: absent or damaged ({first_line(error)}); `{check_command(root)}` has it made again")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        if not path.exists():
            _fetched(path)
        elif (objects := objects_for(path)) is not None:
            objects.used(path)
        yield
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, SafetensorError) as error:
        raise damaged(path, error) from error


def _fetched(path: Path) -> bool:
    """Bring a file from object storage, if it lies there.

    Raises:
        StoreError: it is not what was put; or storage does not answer.
    """
    objects = objects_for(path)
    if objects is None or path.suffix not in COMMITTED or not objects.fetch(path):
        return False
    if path.suffix != ".json" and not is_as_written(path):
        path.unlink(missing_ok=True)
        raise StoreError(
            f"{objects.url}: {objects.name(path)} is not what was put there; `{check_command(objects.root)}`"
        )
    return True


def rows_of(path: Path) -> int | None:
    """Rows that a shard records; None if it cannot be read."""
    try:
        return read_about(path).get("rows")
    except StoreError:
        return None
