"""What is remembered of an audit until one of its files changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

MOST_REMEMBERED = 400
Stamp = tuple[tuple[int, int, int] | None, ...]
"""The state of each file: inode, time and size, or None where it is missing."""


@dataclass(frozen=True)
class _Results:
    """Results by key, all of one state of the files."""

    stamp: Stamp | None = None
    by_key: dict[Hashable, Any] = field(default_factory=dict)


class Memory:
    """Results that are remembered while some files stay as they are, whoever writes to them.

    Safe to share between threads. A key is a name, or a name and what the result depends on: ``"probes"``,
    ``("features", "river", "density")``.

    Args:
        files: of which the results are; asked for at each use.
    """

    def __init__(self, files: Callable[[], Iterable[Path]]):
        self._files = files
        self._results = _Results()

    def get(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What is remembered under a key, or else what `compute` gives, which is remembered."""
        # A result goes to the state that it was asked in: another thread may begin a new one meanwhile.
        results, stamp = self._results, self._stamp()
        if stamp != results.stamp or len(results.by_key) >= MOST_REMEMBERED:
            results = self._results = _Results(stamp)
        if key not in results.by_key:
            results.by_key[key] = compute()
        found = results.by_key[key]
        # The columns of a frame may be changed by who asked; what is remembered stays as it was.
        return found.copy(deep=False) if isinstance(found, pd.DataFrame) else found

    def valid(self, names: frozenset[str]) -> dict[Hashable, Any]:
        """The results under these names; none if a file has changed since."""
        results = self._results
        if results.stamp != self._stamp():
            return {}
        return {key: found for key, found in results.by_key.items() if _name(key) in names}

    def restart(self, results: Mapping[Hashable, Any]) -> None:
        """Remember these results, which are true of the files as they are now, and no others."""
        self._results = _Results(self._stamp(), dict(results))

    def forget(self) -> None:
        """Remember nothing."""
        self._results = _Results()

    def _stamp(self) -> Stamp:
        return tuple(_state(path) for path in self._files())


def _name(key: Hashable) -> Hashable:
    return key[0] if isinstance(key, tuple) else key


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
