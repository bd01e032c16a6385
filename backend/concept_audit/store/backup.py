"""Copies of what people did: one file each, which holds all that was committed when it was made."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import duckdb

from concept_audit.errors import StoreError, first_line
from concept_audit.files import as_store_error, flush, partial_name
from concept_audit.store import schema
from concept_audit.store.cursor import only_row
from concept_audit.store.database import database
from concept_audit.store.database_files import backup_path, log_of, newer
from concept_audit.store.layout import Layout

PEOPLES = ("probes", "probe_examples", "flags")
"""Tables that every workspace has had."""


def back_up(layout: Layout, target: Path | None = None) -> Path:
    """Copy the workspace, whichever version wrote it, whether the audit is finished or not.

    Args:
        target: the file; None for one of its own in the audit's ``backups``.

    Returns:
        the file.

    Raises:
        StoreError: there is no workspace, the file is there already, it may not be written, or the workspace cannot be
            opened.
    """
    if not layout.workspace.exists():
        raise StoreError(f"{layout.root}: nobody has done anything there yet that could be lost (no workspace.duckdb)")
    chosen = backup_path(layout, "copy") if target is None else target
    if chosen.exists():
        raise StoreError(f"{chosen}: is there already; choose another name, or move it away")
    with database(layout).holding() as files:
        files.copy("workspace", chosen)
    return chosen


def restore(layout: Layout, source: Path) -> Path | None:
    """Put a copy in the place of the workspace; what is there now is copied first.

    The copy is whole before it takes the place, while nobody else can open the workspace. An older one is brought to
    the present format when the audit is opened next.

    Returns:
        where the state before is kept; None if there was none.

    Raises:
        StoreError: the file is no copy of a workspace, or a newer version's, or the workspace is in use.
    """
    check_backup(source)
    if not layout.manifest.exists():
        raise StoreError(f"{layout.root}: no audit there (no manifest.json) that a copy could be put back into")
    # Read before the workspace is held: others wait for as long as that is.
    kept = partial_name(layout.root / "restored")
    try:
        shutil.copyfile(source, kept)
        flush(kept)
        check_backup(kept)
        if not layout.workspace.exists():
            log_of(layout.workspace).unlink(missing_ok=True)
            os.link(kept, layout.workspace)
            return None
        before = backup_path(layout, "before-restore")
        with database(layout).holding() as files:
            files.copy("workspace", before)
            files.replace("workspace", kept)
        return before
    except OSError as error:
        raise as_store_error(layout.workspace, error) or StoreError(f"{source}: cannot be copied ({error})") from error
    finally:
        kept.unlink(missing_ok=True)


def check_backup(path: Path) -> int:
    """The format of a copy of a workspace, if it is one that this version can read.

    Raises:
        StoreError: it is not.
    """
    if not path.is_file():
        raise StoreError(f"{path}: there is no such file")
    if log_of(path).exists():
        raise StoreError(
            f"{path}: is in use, or its program was killed ({log_of(path).name} lies beside it); open it once"
        )
    try:
        with duckdb.connect(str(path), read_only=True) as con:
            tables = {
                name
                for (name,) in con.execute(
                    "SELECT table_name FROM duckdb_tables() WHERE schema_name = 'base'"
                ).fetchall()
            }
            if not {*PEOPLES, "meta"} <= tables:
                raise StoreError(
                    f"{path}: is a database, but no copy of a workspace; choose a file of `concept-audit backup`"
                )
            found = con.execute("SELECT value FROM base.meta WHERE key = 'format'").fetchone()
            for table in PEOPLES:
                only_row(con.execute(f"SELECT count(*) FROM base.{table}"))
    except duckdb.Error as error:
        raise StoreError(
            f"{path}: cannot be read ({first_line(error)}); choose a file of `concept-audit backup`"
        ) from error
    number = int(found[0]) if found else 1
    if number > schema.WORKSPACE_FORMAT:
        raise StoreError(f"{path}: {newer(number, schema.WORKSPACE_FORMAT)}")
    return number
