"""A progress that other processes can read, since an index is often built behind a running app."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from concept_audit.progress import Progress, Stage
from concept_audit.store.index import IndexFiles

SECONDS = 1.0


@contextmanager
def reporting(files: IndexFiles, progress: Progress) -> Iterator[Progress]:
    """A progress that also tells other processes, until the body ends."""
    try:
        yield _Reporting(files, progress)
    finally:
        files.progress.unlink(missing_ok=True)


class _Reporting(Progress):
    def __init__(self, files: IndexFiles, inner: Progress):
        self._files, self._inner = files, inner

    def say(self, text: str) -> None:
        self._inner.say(text)

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "rows") -> Iterator[Stage]:
        with self._inner.stage(name, total, unit) as stage:
            files, reported = self._files, time.monotonic()
            advance = stage.advance

            def advancing(units: int = 1, detail: str | None = None) -> None:
                nonlocal reported
                advance(units, detail)
                if time.monotonic() - reported >= SECONDS:
                    reported = time.monotonic()
                    files.report(name, stage.done / stage.total if stage.total else 0.0, stage.seconds_left)

            files.report(name, 0.0, None)
            stage.advance = advancing  # type: ignore[method-assign]
            yield stage
