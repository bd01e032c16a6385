"""Who works on what: one lock for each thing that is made, held by one process at a time.

A lock is the operating system's, on an open file: it ends with the process that holds it,
however that ends. Beside it lies a note of who holds it, for those that come second.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import filelock

from concept_audit.errors import StoreError
from concept_audit.files import as_store_error

POLL_SECONDS = 0.2


@contextmanager
def held(lock: Path, refusal: str) -> Iterator[None]:
    """Hold a lock, or say who does.

    Args:
        lock: its file.
        refusal: the error, in which ``{who}`` stands for the process that holds it.

    Raises:
        StoreError: another process holds it, or its file may not be written.
    """
    taken = _FileLock(lock)
    if not taken.acquire():
        raise StoreError(refusal.format(who=taken.holder()))
    with taken:
        yield


@contextmanager
def awaited(lock: Path, doing: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock, after waiting for whoever does.

    Args:
        doing: what the other one does, to be said: ``fits the same curvature``.
        say: told that there is something to wait for.

    Raises:
        StoreError: its file may not be written.
    """
    taken = _FileLock(lock)
    if not taken.acquire():
        say(f"Waiting: {taken.holder()} {doing}")
        taken.acquire(patient=True)
    with taken:
        yield


@contextmanager
def all_held(directory: Path, refusal: str) -> Iterator[None]:
    """Hold every lock that has ever been taken in a directory; raises as `held`."""
    with ExitStack() as stack:
        for lock in sorted(directory.glob("*.lock")):
            stack.enter_context(held(lock, refusal))
        yield


class _FileLock:
    def __init__(self, path: Path):
        self._path, self._note = path, path.with_suffix(".pid")
        self._lock = filelock.FileLock(path)

    def acquire(self, patient: bool = False) -> bool:
        """Whether the lock is ours now."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=-1 if patient else 0, poll_interval=POLL_SECONDS)
        except filelock.Timeout:
            return False
        except OSError as error:
            refused = as_store_error(self._path, error)
            if refused is None:
                raise
            raise refused from error
        return True

    def holder(self) -> str:
        """Who holds it, for people."""
        try:
            note = json.loads(self._note.read_text("utf-8"))
        except (OSError, ValueError):
            return "another process"
        # Earlier versions noted the process alone.
        told = f"PID {note}" if isinstance(note, int) else f"PID {note['pid']} on {note['host']}, since {note['since']}"
        return f"another process ({told})"

    def __enter__(self) -> None:
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        try:
            self._note.write_text(json.dumps(note), "utf-8")
        except Exception as error:
            self._lock.release()
            raise as_store_error(self._note, error) or error from error

    def __exit__(self, *error: object) -> None:
        self._note.unlink(missing_ok=True)
        self._lock.release()
