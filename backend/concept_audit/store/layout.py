"""Where the files of an audit lie, and how they are written: whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from concept_audit.errors import StoreError

ROWS_PER_SHARD = 256
FULL_BYTES = 1 << 20
_REFUSED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
_TEMPORARY = ".partial"


@dataclass(frozen=True)
class Layout:
    """The files of one audit.

    Attributes:
        root: the audit's directory.
    """

    root: Path

    @property
    def manifest(self) -> Path:
        """Configuration, versions, fingerprints and the state of each stage."""
        return self.root / "manifest.json"

    @property
    def audit(self) -> Path:
        """What the pipeline found; read-only once built."""
        return self.root / "audit.duckdb"

    @property
    def workspace(self) -> Path:
        """What people did: probes, labels, flags, rankings made on demand."""
        return self.root / "workspace.duckdb"

    @property
    def lock(self) -> Path:
        """Held by the process that builds the audit."""
        return self.root / "build.lock"

    @property
    def sae(self) -> Path:
        """The sparse autoencoder, in SAELens' format."""
        return self.root / "sae"

    @property
    def sae_training(self) -> Path:
        """Checkpoint of an SAE training that is under way."""
        return self.root / "sae-training"

    def shards(self, kind: str) -> Path:
        """Directory of the shards of one kind: examples, activations, tokens, features, answers, ..."""
        return self.root / "shards" / kind

    def shard(self, kind: str, number: int) -> Path:
        """File of one shard; `number` counts from 0, `ROWS_PER_SHARD` rows each."""
        suffix = "parquet" if kind in ("examples", "features", "answers") else "safetensors"
        return self.shards(kind) / f"{number:06}.{suffix}"

    def shard_numbers(self, kind: str) -> list[int]:
        """The shards of one kind that are complete, in order."""
        directory = self.shards(kind)
        if not directory.is_dir():
            return []
        return sorted(int(p.stem) for p in directory.iterdir() if p.stem.isdigit())

    def remove_leftovers(self) -> None:
        """Delete what a killed process had not finished writing."""
        for path in list(self.root.rglob(f"*{_TEMPORARY}*")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def audit_names(cache: Path) -> list[str]:
    """Names of the audits in a cache, finished or not."""
    if not cache.is_dir():
        return []
    return sorted(path.parent.name for path in cache.glob("*/manifest.json"))


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` if the body succeeds.

    Raises:
        StoreError: the disk is full or may not be written to.
    """
    partial = path.with_name(f".{path.name}{_TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except Exception as error:
        with suppress(OSError):  # its directory may be no directory at all
            partial.unlink(missing_ok=True)
        refused = as_store_error(path, error)
        if refused is None:
            raise
        raise refused from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def as_store_error(path: Path, error: Exception) -> StoreError | None:
    """The reason why `path` cannot be written, if that is what `error` is about.

    Libraries wrap the system's error in types and words of their own, so what is left
    of the disk counts too.
    """
    code = getattr(error, "errno", None)
    if code == errno.ENOSPC or "no space left" in str(error).lower() or _is_full(path):
        return StoreError(
            f"{path}: the disk is full; free some space and run the same command again "
            "(it goes on where it was), or choose another place with --out or --cache"
        )
    if code in _REFUSED:
        return StoreError(f"{path}: may not be written ({error}); choose another place with --out or --cache")
    return None


def _is_full(path: Path) -> bool:
    there = next((place for place in (path, *path.parents) if place.exists()), Path("/"))
    return shutil.disk_usage(there).free < FULL_BYTES
