"""Files that are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from concept_audit.errors import StoreError

FULL_BYTES = 1 << 20
_REFUSED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
_TEMPORARY = ".partial"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A name of its own to write to; what is there becomes `path`, at once, if the body succeeds.

    The file is on the disk before it has its name, so that not even a power cut leaves half of one.

    Raises:
        StoreError: the disk is full or may not be written to.
    """
    # Nobody else has this name: two that write one file never meet, and the later of them stays.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{_TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
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


def remove_leftovers(root: Path) -> None:
    """Delete what killed processes had not finished writing below a directory."""
    for path in list(root.rglob(f"*{_TEMPORARY}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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


def _flush(path: Path) -> None:
    """Have the operating system put a file, or the names in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_full(path: Path) -> bool:
    there = next((place for place in (path, *path.parents) if place.exists()), Path("/"))
    return shutil.disk_usage(there).free < FULL_BYTES
