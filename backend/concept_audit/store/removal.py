"""Deleting an audit: all of it, and nothing that is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import filelock

from concept_audit.errors import StoreError
from concept_audit.store.layout import Layout


def remove_audit(root: Path) -> None:
    """Delete an audit's directory. The manifest goes last, so that a deletion that was cut short can be repeated.

    Raises:
        StoreError: it is no audit, it is being built, or it may not be deleted.
    """
    layout = Layout(root)
    if not _is_audit(layout):
        raise StoreError(f"{root}: no audit there that could be deleted (its manifest.json is not one of an audit)")
    if root.is_symlink():
        raise StoreError(f"{root}: a link to another place; delete {root.resolve()} itself")
    try:
        with filelock.FileLock(layout.lock, timeout=0):
            for path in root.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path not in (layout.manifest, layout.lock):
                    path.unlink()
            layout.manifest.unlink()
        layout.lock.unlink(missing_ok=True)
        root.rmdir()
    except filelock.Timeout:
        raise StoreError(f"{root}: another process is building it; stop that first") from None
    except OSError as error:
        raise StoreError(f"{root}: not all of it could be deleted ({error}); run the same command again") from error


def _is_audit(layout: Layout) -> bool:
    """Whether a directory's manifest is one of an audit, of whichever version."""
    try:
        return {"configuration", "fingerprints", "stages", "format"} <= json.loads(layout.manifest.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False
