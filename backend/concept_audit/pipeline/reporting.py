"""What other processes can read of how far long work is, since people look at it from elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from concept_audit.progress import Progress, Stage
from concept_audit.store.shard_store import ShardStore
from concept_audit.store.under_way import report

SECONDS = 1.0


@contextmanager
def reporting(store: ShardStore, path: Path, progress: Progress) -> Iterator[Progress]:
    """A progress that also tells other processes, in a file, until the body ends."""
    try:
        yield _Reporting(lambda stage: report(store, path, stage), progress)
    finally:
        path.unlink(missing_ok=True)


class _Reporting(Progress):
    def __init__(self, report: Callable[[Stage], None], inner: Progress):
        self._report, self._inner = report, inner

    def say(self, text: str) -> None:
        self._inner.say(text)

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "rows") -> Iterator[Stage]:
        with self._inner.stage(name, total, unit) as stage:
            report, reported = self._report, time.monotonic()
            advance = stage.advance

            def advancing(units: int = 1, detail: str | None = None) -> None:
                nonlocal reported
                advance(units, detail)
                if time.monotonic() - reported >= SECONDS:
                    reported = time.monotonic()
                    report(stage)

            report(stage)
            stage.advance = advancing  # type: ignore[method-assign]
            yield stage
