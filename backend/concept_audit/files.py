"""Files that are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from concept_audit.errors import StoreError, first_line

FULL_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)
_BROKEN = (errno.EIO, errno.EFBIG, errno.ESTALE)
_FULL_WORDS, _BROKEN_WORDS = (
    ("no space left", "quota exceeded"),
    ("input/output error", "fsync failed", "file too large"),
)
_REFUSED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
_TEMPORARY = ".partial"
_LEFTOVER = re.compile(r"\.(?P<of>.+?)(\.[0-9a-f]{12})?\.partial(\..+)?")
"""Names that are written to, those of earlier versions too, and what DuckDB puts beside them."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A name of its own to write to; what is there becomes `path`, at once, if the body succeeds.

    The file is on the disk before it has its name, so that not even a power cut leaves half of one.

    Raises:
        StoreError: the disk is full, fails, or may not be written to.
    """
    partial = partial_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
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


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """As `atomic_write`, for a directory of files that is not there yet.

    Raises:
        StoreError: the disk is full, fails, or may not be written to.
    """
    partial = partial_name(path)
    try:
        partial.mkdir(parents=True)
        yield partial
        flush_files(partial)
        os.rename(partial, path)
        flush(path.parent)
    except Exception as error:
        refused = as_store_error(path, error)
        if refused is None:
            raise
        raise refused from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def move_files(made: Path, place: Path) -> None:
    """Move every file of a directory to another, where it takes the place of one of its name; others there stay.

    Each is on the disk before it has its name; the directory that is empty then goes.
    """
    flush_files(made)
    place.mkdir(parents=True, exist_ok=True)
    for path in sorted(made.iterdir()):
        os.replace(path, place / path.name)
    flush(place)
    made.rmdir()


def partial_name(path: Path) -> Path:
    """A name beside `path` to write to. Nobody else has it: two that write one file never meet, the later one stays."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{_TEMPORARY}")


def is_leftover(name: str, of: str | None = None) -> bool:
    """Whether a name is one that is written to before a file has its own.

    Args:
        of: the file's own name; None for any.
    """
    found = _LEFTOVER.fullmatch(name)
    return found is not None and of in (None, found["of"])


def remove_leftovers(directory: Path) -> None:
    """Delete what killed processes had not finished writing below a directory.

    Links are not followed. Nobody else may be writing there: hold the lock of what lies in it.
    """
    for place, directories, names in os.walk(directory):
        for name in [name for name in directories if is_leftover(name)]:
            directories.remove(name)
            remove(Path(place, name))
        for name in filter(is_leftover, names):
            remove(Path(place, name))


def remove_leftovers_of(path: Path) -> None:
    """Delete what killed processes had not finished writing of one file or directory; as `remove_leftovers`."""
    for other in path.parent.iterdir() if path.parent.is_dir() else ():
        if is_leftover(other.name, path.name):
            remove(other)


def remove(path: Path) -> None:
    """Delete a file, or a directory with all that is in it; a link itself, and not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def as_store_error(path: Path, error: Exception) -> StoreError | None:
    """The reason why `path` cannot be written, if that is what `error` is about.

    Libraries wrap the system's error in types and words of their own, so what is left
    of the disk counts too.
    """
    code, said = getattr(error, "errno", None), str(error).lower()
    if code in _FULL or any(words in said for words in _FULL_WORDS) or _is_full(path):
        return StoreError(
            f"{path}: the disk is full; free some space and run the same command again "
            "(it goes on where it was), or choose another place with --out or --cache"
        )
    if code in _REFUSED:
        return StoreError(f"{path}: may not be written ({error}); choose another place with --out or --cache")
    if code in _BROKEN or any(words in said for words in _BROKEN_WORDS):
        return StoreError(
            f"{path}: the disk failed ({first_line(error)}); see that it is well and run the same command again "
            "(it goes on where it was), or choose another place with --out or --cache"
        )
    return None


def digest(path: Path) -> str:
    """BLAKE2b of a file: 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def flush(path: Path) -> None:
    """Have the operating system put a file, or the names in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_files(directory: Path) -> None:
    """As `flush`, for every file of a directory, and their names."""
    for path in directory.iterdir():
        flush(path)
    flush(directory)


def _is_full(path: Path) -> bool:
    there = next((place for place in (path, *path.parents) if place.exists()), Path("/"))
    return shutil.disk_usage(there).free < FULL_BYTES
