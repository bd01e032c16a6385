"""Read-only: what is there can be looked at, and nothing is computed or written, not even where it could be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from concept_audit import Audit, RowFilter, StoreError
from tests.backend.test_audit import of_rows

FILES_OF_PEOPLE = ("workspace.duckdb", "derived.duckdb")


def state(root: Path) -> dict[str, tuple[int, int]]:
    """Every file and directory with its length and time."""
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in [root, *root.rglob("*")]}


def looked_at(root: Path) -> None:
    """What a page looks at."""
    audit = Audit(root, read_only=True)
    assert audit.overview().n_rows == 300
    assert audit.rows.list(RowFilter(text="river", flag="any"), 5) is not None
    assert len(audit.rank("sae:3", top=5)) == 5 and len(audit.concepts.list())
    assert audit.rows.heatmaps("sae:3", [0, 1])
    assert audit.flags.log() is not None and audit.views.list() is not None and audit.evidence.list() is not None
    assert audit.index.describe() is None
    assert len(audit.query("SELECT * FROM scores WHERE rank <= 2"))


@pytest.fixture
def read_only_medium(audit_directory, tmp_path) -> Iterator[Path]:
    """An audit on a file system that is mounted read-only."""
    medium = tmp_path / "medium"
    medium.mkdir()
    mounted = subprocess.run(["mount", "--bind", audit_directory, medium], capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("nothing may be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", medium], check=True, capture_output=True)
        yield medium
    finally:
        subprocess.run(["umount", "--lazy", medium], check=True)  # this process has a file of it open


def test_nothing_is_written(audit_directory):
    Audit(audit_directory).train_probe("topic", of_rows(Audit(audit_directory)))
    before = state(audit_directory)
    looked_at(audit_directory)
    assert state(audit_directory) == before


def test_an_audit_that_nobody_has_worked_on_is_as_good_as_one_with_empty_files(audit_directory):
    for name in FILES_OF_PEOPLE:
        (audit_directory / name).unlink(missing_ok=True)
    before = state(audit_directory)
    looked_at(audit_directory)
    assert state(audit_directory) == before


def test_it_works_where_nothing_may_be_written(read_only_medium):
    with pytest.raises(OSError):
        (read_only_medium / "x").touch()
    looked_at(read_only_medium)


def test_what_a_killed_process_left_in_the_log_counts(audit_directory):
    code = (
        "import os, sys, duckdb\n"
        "con = duckdb.connect(sys.argv[1])\n"
        "con.execute(\"INSERT INTO base.saved_views VALUES ('mine', 'audit', 'q=1', 'Ada', now()::TIMESTAMP)\")\n"
        "os._exit(9)\n"
    )
    Audit(audit_directory).views.list()  # makes the workspace
    subprocess.run([sys.executable, "-c", code, str(audit_directory / "workspace.duckdb")])
    assert os.path.getsize(audit_directory / "workspace.duckdb.wal")
    before = state(audit_directory)
    assert Audit(audit_directory, read_only=True).views.list()["name"].tolist() == ["mine"]
    assert state(audit_directory) == before


def test_what_is_not_there_is_not_computed_and_the_way_out_is_told(audit_directory):
    Audit(audit_directory).train_probe("topic", of_rows(Audit(audit_directory)))
    audit = Audit(audit_directory, read_only=True)
    with pytest.raises(StoreError, match="topic by vector_filter: not computed yet.*without --read-only"):
        audit.rank("topic")
    with pytest.raises(StoreError, match="the model is not run"):
        audit.model()
    Audit(audit_directory).rank("topic")
    assert len(Audit(audit_directory, read_only=True).rank("topic", top=3)) == 3


def test_a_workspace_of_an_earlier_format_is_refused_in_words(audit_directory):
    import duckdb

    Audit(audit_directory).views.list()
    with duckdb.connect(str(audit_directory / "workspace.duckdb")) as con:
        con.execute("UPDATE base.meta SET value = '1' WHERE key = 'format'")
    with pytest.raises(StoreError, match="earlier version; open the audit once without --read-only"):
        Audit(audit_directory, read_only=True).views.list()
