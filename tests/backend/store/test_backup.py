"""Copies of what people did: whole, checked, and put back without losing what is there."""

from __future__ import annotations

import shutil

import duckdb
import numpy as np
import pytest

from concept_audit import StoreError
from concept_audit.cli.main import main
from concept_audit.store import workspace
from concept_audit.store.backup import back_up, restore
from concept_audit.store.database import database
from concept_audit.store.layout import Layout
from concept_audit.store.rankings import ranked
from tests.backend.store.common import PROBE, ROWS, identity, write_audit


@pytest.fixture
def layout(tmp_path) -> Layout:
    layout = write_audit(tmp_path / "audit")
    layout.manifest.write_text("{}")
    flag(layout, "h1")
    return layout


def flag(layout: Layout, content_hash: str) -> None:
    with database(layout).writing() as cursor:
        cursor.execute("INSERT INTO base.flags VALUES (?, 'remove', '', 'Ada', now()::TIMESTAMP)", [content_hash])


def flagged(layout: Layout) -> list[str]:
    with database(layout).reading() as cursor:
        return [h for (h,) in cursor.execute("SELECT content_hash FROM base.flags ORDER BY 1").fetchall()]


def test_a_copy_brings_back_what_was_there_and_keeps_what_is(layout, tmp_path):
    copy = back_up(layout, tmp_path / "copy.duckdb")
    flag(layout, "h2")
    before = restore(layout, copy)
    assert flagged(layout) == ["h1"]
    restore(layout, before)
    assert flagged(layout) == ["h1", "h2"]
    assert not list(layout.root.glob("*.partial")) and not list(layout.root.glob(".*"))


def test_a_copy_is_of_its_own(layout):
    one, two = back_up(layout), back_up(layout)
    assert one != two and one.parent == layout.backups
    with pytest.raises(StoreError, match="is there already"):
        back_up(layout, one)
    with duckdb.connect(str(one), read_only=True) as con:
        assert con.execute("SELECT content_hash FROM base.flags").fetchall() == [("h1",)]


def test_what_people_did_is_copied_of_an_audit_that_is_not_finished(layout, tmp_path):
    layout.audit.unlink()
    copy = back_up(layout, tmp_path / "copy.duckdb")
    layout.workspace.unlink()
    assert restore(layout, copy) is None
    write_audit(layout.root)
    assert flagged(layout) == ["h1"]


@pytest.mark.parametrize("content", [b"", b"text" * 5000, None])
def test_what_is_no_copy_is_refused_and_nothing_is_changed(layout, tmp_path, content):
    wrong = tmp_path / "wrong.duckdb"
    if content is None:
        shutil.copy(layout.audit, wrong)
    else:
        wrong.write_bytes(content)
    for path in (wrong, tmp_path / "absent"):
        with pytest.raises(StoreError, match="wrong|absent"):
            restore(layout, path)
    assert flagged(layout) == ["h1"] and not layout.backups.exists()


def test_a_copy_of_a_newer_version_is_refused(layout, tmp_path):
    copy = back_up(layout, tmp_path / "copy.duckdb")
    with duckdb.connect(str(copy)) as con:
        con.execute("UPDATE base.meta SET value = '99' WHERE key = 'format'")
    with pytest.raises(StoreError, match="pip install -U concept-audit"):
        restore(layout, copy)


def test_rankings_of_a_training_that_is_put_back_over_are_not_taken_for_its_own(layout, tmp_path):
    copy = back_up(layout, tmp_path / "copy.duckdb")

    def train(direction: np.ndarray) -> int:
        with database(layout).writing() as cursor:
            return workspace.save_probe(cursor, "tone", 1, "difference_of_means", direction, {}, "m")

    assert train(PROBE.direction) == 1
    with database(layout).deriving() as cursor:
        from concept_audit.store.derived import save_ranking

        save_ranking(
            cursor, identity(), ranked(np.array([identity().ranking_id]), np.arange(ROWS, dtype=float)[:, None])
        )
    restore(layout, copy)
    assert train(np.array([0.0, 1.0], np.float32)) == 1
    with database(layout).reading() as cursor:
        assert cursor.execute("SELECT count(*) FROM scores WHERE concept_id = 'probe:tone'").fetchone() == (0,)


def test_the_commands_copy_and_put_back(layout, tmp_path, capsys):
    copy = tmp_path / "copy.duckdb"
    assert main(["backup", str(layout.root), str(copy)]) == 0
    assert capsys.readouterr().out.strip() == str(copy)
    flag(layout, "h2")
    assert main(["restore", str(layout.root), str(copy)]) == 1
    assert "Pass --yes" in capsys.readouterr().err and flagged(layout) == ["h1", "h2"]
    assert main(["restore", str(layout.root), str(copy), "--yes"]) == 0
    kept = capsys.readouterr().out.split()[-1]
    assert flagged(layout) == ["h1"]
    assert main(["restore", str(layout.root), kept, "--yes"]) == 0
    assert flagged(layout) == ["h1", "h2"]
