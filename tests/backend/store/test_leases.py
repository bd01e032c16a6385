"""Leases end whatever happens in them, and nobody's work is lost to somebody else's."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import duckdb
import pytest

from concept_audit import StoreError
from concept_audit.store import attaching, migrations
from concept_audit.store.database import database
from tests.backend.store.common import write_audit

FLAGGING = Path(__file__).parents[2] / "benchmarks" / "flagging.py"


@pytest.fixture
def layout(tmp_path):
    return write_audit(tmp_path / "audit")


def count(opened) -> int:
    with opened.reading() as cursor:
        return cursor.execute("SELECT count(*) FROM base.flags").fetchone()[0]


def test_an_error_while_a_workspace_is_made_ready_passes_by(layout, monkeypatch):
    opened = database(layout)
    with monkeypatch.context() as patched:
        patched.setattr(migrations, "make", lambda cursor: cursor.execute("SELECT * FROM nowhere"))
        for lease in (opened.reading, opened.writing):
            with pytest.raises(duckdb.Error, match="nowhere"), lease():
                pass
    assert count(opened) == 0


def test_an_error_while_files_are_attached_passes_by(layout, monkeypatch):
    opened = database(layout)
    assert count(opened) == 0
    with monkeypatch.context() as patched:
        patched.setattr(attaching.Attachments, "_format", lambda *rest: 1 / 0)
        for lease in (opened.reading, opened.writing, opened.deriving):
            with pytest.raises(ZeroDivisionError), lease():
                pass
    assert count(opened) == 0


def test_a_database_whose_making_the_disk_cut_off_is_made_when_the_disk_is_well(layout):
    opened = database(layout)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, before[1]))  # less than a database's headers
    try:
        with pytest.raises(StoreError, match="disk failed"), opened.writing():
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with opened.writing() as cursor:
        cursor.execute("INSERT INTO base.flags VALUES ('h1', 'remove', '', 'me', now()::TIMESTAMP)")
    assert count(opened) == 1


@pytest.mark.parametrize(
    ("error", "told"), [("No space left on device", "the disk is full"), ("Input/output error", "the disk failed")]
)
def test_a_disk_that_fails_while_files_are_attached_is_told_in_words(layout, monkeypatch, error, told):
    opened = database(layout)
    with monkeypatch.context() as patched:
        failure = duckdb.IOException(f"Detached database, but CHECKPOINT during DETACH failed: {error}")
        patched.setattr(migrations, "make", Mock(side_effect=failure))
        with pytest.raises(StoreError, match=told), opened.writing():
            pass
    assert count(opened) == 0


def test_a_file_that_cannot_be_let_go_is_taken_up_anew(layout, monkeypatch):
    opened = database(layout)
    build = ["word"]
    opened.found("first", build)
    with monkeypatch.context() as patched:
        patched.setattr(attaching.Attachments, "_detach", lambda self, name: self._instance.execute("SELECT nowhere"))
        with opened.writing() as cursor:
            cursor.execute("INSERT INTO base.flags VALUES ('h1', 'remove', '', 'me', now()::TIMESTAMP)")
    assert count(opened) == 1
    name = opened.found("first", build)
    with opened.reading() as cursor:
        assert cursor.execute(f"SELECT count(*) FROM {name}").fetchone() == (0,)


def test_sessions_that_search_for_the_same_words_at_once_both_find_them(layout):
    opened = database(layout)
    assert count(opened) == 0
    found, failures, begin = [], [], threading.Barrier(8)

    def search() -> None:
        begin.wait()
        try:
            for number in range(12):
                name = opened.found("first", [f"prompt {number % 3}", "first"])
                with opened.reading() as cursor:
                    found.append(cursor.execute(f"SELECT count(*) FROM {name}").fetchone()[0])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=search) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and found == [1] * 96


def test_searches_are_forgotten_in_the_order_in_which_they_were_asked_for(layout, monkeypatch):
    monkeypatch.setattr("concept_audit.store.database.SEARCHES_KEPT", 3)
    opened = database(layout)
    first = opened.found("first", ["0"])
    for number in range(1, 6):
        opened.found("first", [str(number)])
        assert opened.found("first", ["0"]) == first
    with opened.reading() as cursor:
        assert cursor.execute(f"SELECT count(*) FROM {first}").fetchone() == (1,)
        tables = cursor.execute("SELECT count(*) FROM duckdb_tables() WHERE starts_with(table_name, 'found_')")
        assert tables.fetchone() == (3,)


def test_a_reader_who_comes_while_others_read_sees_the_store_that_is_there(layout):
    opened = database(layout)
    reading, replaced, seen = threading.Event(), threading.Event(), []

    def early() -> None:
        with opened.reading():
            reading.set()
            replaced.wait(10)

    def late() -> None:
        with opened.reading() as cursor:
            seen.append(cursor.execute("SELECT value FROM audit.base.meta WHERE key = 'build_id'").fetchone()[0])

    one = threading.Thread(target=early)
    one.start()
    reading.wait(10)
    write_audit(layout.root, build="second")
    two = threading.Thread(target=late)
    two.start()
    two.join(0.2)
    replaced.set()
    one.join()
    two.join()
    assert seen == ["second"]


def test_results_are_kept_while_somebody_else_writes_what_people_do(layout):
    opened = database(layout)
    assert count(opened) == 0
    hold = "import duckdb, sys; con = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(layout.workspace)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"held\n"
    with opened.deriving() as cursor:
        cursor.execute("INSERT INTO base.own_answers VALUES ('h', 'm', 'text', now()::TIMESTAMP)")
    other.communicate()
    with opened.reading() as cursor:
        assert cursor.execute("SELECT answer FROM derived.base.own_answers").fetchall() == [("text",)]


def test_flags_do_not_wait_for_who_holds_the_results(layout):
    opened = database(layout)
    assert count(opened) == 0
    hold = "import duckdb, sys; con = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(layout.derived)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"held\n"
    with opened.writing() as cursor:
        cursor.execute("INSERT INTO base.flags VALUES ('h1', 'remove', '', 'me', now()::TIMESTAMP)")
    other.communicate()
    assert count(opened) == 1


def test_who_waits_for_one_file_holds_no_other(layout, monkeypatch):
    monkeypatch.setattr(attaching, "LOCK_PATIENCE_SECONDS", 0.3)
    opened = database(layout)
    assert count(opened) == 0
    code = """
import duckdb, sys, time
con = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.readline()
for _ in range(400):
    try:
        duckdb.connect(sys.argv[2]).close(); print('got', flush=True); break
    except duckdb.IOException:
        time.sleep(0.001)
sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(layout.derived), str(layout.workspace)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout.readline() == b"held\n"
    waiting = threading.Thread(target=lambda: pytest.raises(StoreError, count, opened))
    waiting.start()
    other.stdin.write(b"\n")
    other.stdin.flush()
    assert other.stdout.readline() == b"got\n"
    waiting.join()
    other.communicate()


def test_processes_that_flag_at_once_lose_nothing(layout):
    opened = database(layout)
    assert count(opened) == 0
    found = subprocess.run(
        [sys.executable, str(FLAGGING), str(layout.root), "--processes", "3", "--flags", "20", "--json"],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["acknowledged"] == told["kept"] == 60 and told["failed"] == 0
    assert count(opened) == 60
