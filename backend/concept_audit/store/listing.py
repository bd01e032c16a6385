"""Which audits there are."""

from __future__ import annotations

from pathlib import Path


def audit_names(cache: Path) -> list[str]:
    """Names of the audits in a cache, finished or not."""
    if not cache.is_dir():
        return []
    return sorted(path.parent.name for path in cache.glob("*/manifest.json"))
