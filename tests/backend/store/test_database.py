"""Two files, many readers and one writer at a time, whoever else has them open."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading

import duckdb
import pytest

from concept_audit import Audit, StoreError
from concept_audit.files import atomic_write
from concept_audit.store import attaching as module
from concept_audit.store.database import database
from concept_audit.store.layout import Layout
from concept_audit.store.schema import CONTRACT_VIEWS

PROMISED = {
    "examples": "example_id content_hash source source_row prompt response n_tokens metadata",
    "concepts": "concept_id name kind layer direction",
    "scores": "concept_id method example_id score rank percentile",
    "sae_features": "feature_id label density max_activation top_tokens",
    "feature_activations": "feature_id example_id max_activation mean_activation token_position",
    "flags": "content_hash example_id flag note flagged_by flagged_at",
}
HOLD = """
import duckdb, sys
con = duckdb.connect(sys.argv[1], read_only=sys.argv[2] == "read")
con.execute("SELECT 1")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def audit(audit_directory) -> Audit:
    found = Audit(audit_directory)
    found.flags.set(found.rows.list(limit=1)["content_hash"].tolist(), "review", "look", by="me")
    return found


@pytest.fixture
def held(audit):
    """Another process that has the workspace open; ends when the test calls what it gets."""
    processes = []

    def hold(mode: str):
        path = str(Layout(audit.root).workspace)
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, path, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        processes.append(process)
        assert process.stdout.readline().strip() == b"held"
        return process

    yield hold
    for process in processes:
        process.communicate()


@pytest.mark.parametrize("view", CONTRACT_VIEWS)
def test_any_client_finds_the_promised_columns(audit, view):
    con = duckdb.connect(str(Layout(audit.root).workspace), read_only=True)
    con.execute(f"ATTACH '{Layout(audit.root).audit}' AS audit (READ_ONLY)")
    con.execute(f"ATTACH '{Layout(audit.root).derived}' AS derived (READ_ONLY)")
    columns = [name for name, *_ in con.execute(f"DESCRIBE {view}").fetchall()]
    promised = PROMISED[view].split()
    assert columns[: len(promised)] == promised
    assert con.execute(f"SELECT count(*) FROM {view}").fetchone()[0] > 0


def test_the_audit_can_be_read_by_itself(audit):
    con = duckdb.connect(str(Layout(audit.root).audit), read_only=True)
    for view in set(CONTRACT_VIEWS) - {"flags"}:
        assert con.execute(f"SELECT count(*) FROM {view}").fetchone()[0] > 0


def test_a_writer_elsewhere_is_named_and_waited_for(audit, held, monkeypatch):
    monkeypatch.setattr(module, "LOCK_PATIENCE_SECONDS", 0.2)
    process = held("write")
    with pytest.raises(StoreError, match=f"another process .*PID {process.pid}.* holds it; close"):
        audit.flags.clear(["x"])
    process.communicate()
    audit.flags.clear(["x"])


def test_a_reader_elsewhere_does_not_stop_our_reading(audit, held, monkeypatch):
    monkeypatch.setattr(module, "LOCK_PATIENCE_SECONDS", 0.2)
    held("read")
    assert audit.overview().n_flagged == 2  # the row and its copy


def test_a_person_can_read_while_the_app_is_idle(audit):
    audit.overview()
    done = subprocess.run(
        [sys.executable, "-c", HOLD, str(Layout(audit.root).workspace), "write"], input=b"", capture_output=True
    )
    assert done.returncode == 0


def test_threads_that_read_and_write_at_once_lose_nothing(audit):
    hashes = audit.rows.list()["content_hash"].unique().tolist()[:40]
    failures = []

    def work(part: list[str]) -> None:
        try:
            for content_hash in part:
                audit.flags.set([content_hash], "remove")
                audit.overview()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(hashes[i::8],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with database(Layout(audit.root)).reading() as cursor:
        assert cursor.execute("SELECT count(*) FROM base.flags WHERE flag = 'remove'").fetchone() == (40,)


def test_an_error_undoes_the_whole_change(audit):
    with pytest.raises(ZeroDivisionError), database(Layout(audit.root)).writing() as cursor:
        cursor.execute("DELETE FROM base.flags")
        raise ZeroDivisionError
    assert audit.overview().n_flagged == 2  # the row and its copy


def test_leases_do_not_nest(audit):
    held = database(Layout(audit.root))
    with held.reading(), pytest.raises(RuntimeError, match="holds a lease"), held.writing():
        pass
    assert audit.overview().n_rows == 300


def test_what_a_killed_process_committed_is_there(audit):
    code = """
import duckdb, os, sys
con = duckdb.connect(sys.argv[1])
con.execute("SET checkpoint_threshold = '1GB'")
con.execute("UPDATE base.flags SET note = 'by the killed one'")
os._exit(9)
"""
    workspace = Layout(audit.root).workspace
    subprocess.run([sys.executable, "-c", code, str(workspace)], check=False)
    assert workspace.with_name(workspace.name + ".wal").exists()
    assert audit.rows.list(where=_flagged())["note"].tolist()[0] == "by the killed one"


def test_a_build_that_replaces_the_store_is_seen_at_once(audit, tmp_path):
    place = Layout(audit.root).audit
    copy = tmp_path / "new.duckdb"
    shutil.copy(place, copy)
    con = duckdb.connect(str(copy))
    con.execute("UPDATE base.examples SET prompt = 'replaced'")
    con.close()
    copy.replace(place)
    assert set(audit.rows.list(limit=5)["prompt"]) == {"replaced"}


def test_files_are_whole_or_absent(tmp_path):
    with pytest.raises(ValueError, match="no"), atomic_write(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []
    with atomic_write(tmp_path / "deep" / "a.txt") as partial:
        partial.write_text("all")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.txt"]


def _flagged():
    from concept_audit import RowFilter

    return RowFilter(flag="any")
