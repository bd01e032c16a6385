"""The directory that an audit is built in: no one else's, and held by one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import filelock

from concept_audit.errors import StoreError
from concept_audit.files import as_store_error
from concept_audit.store.layout import Layout

HOLDER = "build.pid"
"""Names the process that holds the lock."""


def refuse_foreign(layout: Layout) -> None:
    """Raise StoreError for a directory that holds something else than an audit."""
    # A build that was killed at its very start has left its lock, and no manifest.
    ours = layout.manifest.exists() or layout.lock.exists()
    if not ours and layout.root.exists() and any(layout.root.iterdir()):
        raise StoreError(
            f"{layout.root}: not empty and not an audit (no manifest.json); choose another --out, or empty it"
        )


@contextmanager
def held(layout: Layout) -> Iterator[None]:
    """Keep other builds of this audit out.

    Raises:
        StoreError: another process is building it, or the place may not be written to.
    """
    lock = filelock.FileLock(layout.lock)
    holder = layout.root / HOLDER
    try:
        layout.root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        who = f" (PID {holder.read_text().strip()})" if holder.exists() else ""
        raise StoreError(
            f"{layout.root}: another process{who} is building this audit; wait for it, or choose another --out"
        ) from None
    except OSError as error:
        refused = as_store_error(layout.root, error)
        if refused is None:
            raise
        raise refused from error
    try:
        holder.write_text(str(os.getpid()))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
