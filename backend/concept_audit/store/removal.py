"""Deleting: what is an audit's own, and nothing else."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path

from concept_audit.errors import StoreError
from concept_audit.files import is_leftover
from concept_audit.store.layout import Layout
from concept_audit.store.locks import all_held, held
from concept_audit.store.shard_store import COMMITTED

BACKUP = re.compile(r"workspace-.+\.duckdb")
DIRECTORIES = {
    "shards": lambda name: Path(name).suffix in {*COMMITTED, ".lock"},
    "sae": lambda name: Path(name).suffix in {".json", ".safetensors"},
    "sae-training": lambda name: Path(name).suffix in {".json", ".safetensors", ".pt"},
    "locks": lambda name: Path(name).suffix in {".lock", ".pid"},
    "tmp.partial": lambda name: True,
    "backups": lambda name: BACKUP.fullmatch(name) is not None,
}
"""The directories of an audit → whether a file in it, by its name, is one of those that are written there."""
FILES = re.compile(r"manifest(\.copy)?\.json|build\.(lock|pid|json)|turn\.lock|index\.log|objects\.json")
"""The files beside these directories and the databases."""


def remove_audit(root: Path) -> list[Path]:
    """Delete an audit's files. The manifest goes last, so that a deletion that was cut short can be repeated.

    Returns:
        what stays, since it is not the audit's; empty if the directory is gone.

    Raises:
        StoreError: it is no audit, somebody works on it, or it may not be deleted.
    """
    layout = Layout(root)
    if not _is_audit(layout):
        raise StoreError(f"{root}: no audit there that could be deleted (its manifest.json is not one of an audit)")
    if root.is_symlink():
        raise StoreError(f"{root}: a link to another place; delete {root.resolve()} itself")
    busy = str(root).replace("{", "{{").replace("}", "}}") + ": {who} is at work on it; stop that first"
    last = (layout.manifest_copy, layout.manifest, layout.lock)
    try:
        with held(layout.lock, busy), all_held(layout.locks, busy):
            for path in (*(path for path in own_files(layout) if path not in last), *last):
                path.unlink(missing_ok=True)
        _remove_empty(layout)
        if not any(root.iterdir()):
            root.rmdir()
    except OSError as error:
        raise StoreError(f"{root}: not all of it could be deleted ({error}); run the same command again") from error
    return sorted(root.iterdir()) if root.exists() else []


def own_files(layout: Layout) -> list[Path]:
    """The files of an audit, by their names; links are an audit's own if their names are, and never followed."""
    found = []
    for path in layout.root.iterdir() if layout.root.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            ours = DIRECTORIES.get(path.name, lambda name: False)
            for place, _, names in os.walk(path):
                inside = is_leftover(Path(place).name) or is_leftover(path.name)
                found += [Path(place, name) for name in names if inside or ours(name) or is_leftover(name)]
        elif _is_file(layout, path.name) or (path.is_symlink() and path.name in DIRECTORIES):
            found.append(path)
    return found


def is_own(layout: Layout, name: str) -> bool:
    """Whether a file is an audit's own, by its name below the audit's directory: ``shards/rows/…``."""
    directory, _, rest = name.partition("/")
    if not rest:
        return _is_file(layout, name)
    return directory in DIRECTORIES and DIRECTORIES[directory](Path(rest).name)


def strangers(layout: Layout) -> list[Path]:
    """What lies in a directory and is no file or directory of an audit."""
    return sorted(
        path for path in layout.root.iterdir() if path.name not in DIRECTORIES and not _is_file(layout, path.name)
    )


def remove_made(layout: Layout, before: frozenset[Path] | None) -> None:
    """Delete what a build has made that came to nothing, and never what people did.

    Args:
        before: the files that were there when it began; they stay. None if not even the directory was.
    """
    for path in own_files(layout):
        if path not in (before or ()) and not path.name.startswith(layout.workspace.name):
            with suppress(OSError):
                path.unlink()
    _remove_empty(layout)
    if before is None:
        with suppress(OSError):  # somebody has put something there meanwhile
            layout.root.rmdir()


def _is_file(layout: Layout, name: str) -> bool:
    databases = {path.name + ending for path in layout.databases for ending in ("", ".wal", ".tmp")}
    return name in databases or FILES.fullmatch(name) is not None or is_leftover(name)


def _remove_empty(layout: Layout) -> None:
    """Delete an audit's directories that hold nothing."""
    for directory in [path for path in layout.root.iterdir() if path.name in DIRECTORIES or is_leftover(path.name)]:
        for place, _, _ in os.walk(directory, topdown=False):
            with suppress(OSError):
                os.rmdir(place)


def _is_audit(layout: Layout) -> bool:
    """Whether a directory's manifest is one of an audit, of whichever version."""
    try:
        return {"configuration", "fingerprints", "stages", "format"} <= json.loads(layout.manifest.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False
