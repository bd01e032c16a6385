"""How far work on an audit is, for other processes to read: a small file that goes when the work ends."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from concept_audit.errors import StoreError
from concept_audit.progress import Stage
from concept_audit.store.shard_store import ShardStore

STALE_SECONDS = 120.0
"""A process that was killed leaves its last report behind."""


def report(store: ShardStore, path: Path, stage: Stage) -> None:
    """Write down how far a stage is; what cannot be written is left out, for nothing hangs on it.

    The file holds ``stage`` (its name), ``state`` (its count, time left and detail in words), ``detail`` (pace, workers and
    failures, where an engine tells them), ``share`` from 0 to 1, ``seconds_left`` or null, and ``at``, seconds since 1970.
    """
    state = {
        "stage": stage.name,
        "state": stage.describe(),
        "detail": stage.detail,
        "share": stage.done / stage.total if stage.total else 0.0,
        "seconds_left": stage.seconds_left,
        "at": time.time(),
    }
    with suppress(StoreError, OSError):
        store.write_json(path, state, passing=True)


def reported(store: ShardStore, path: Path) -> dict[str, Any] | None:
    """What the last report said, where it is of now; None if nothing is at work."""
    try:
        found = store.read_json(path, passing=True)
    except StoreError:
        return None
    return found if found and time.time() - found["at"] < STALE_SECONDS else None
