"""What can be computed again: bounded, may be deleted at any time, and never shown for what it is not."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import duckdb
import numpy as np
import pytest

from concept_audit.store import derived, workspace
from concept_audit.store.database import database
from concept_audit.store.derived import RankingGoneError, require_rankings, save_ranking
from concept_audit.store.queries import ranking_stored
from concept_audit.store.rankings import ranked
from tests.backend.store.common import PROBE, ROWS, identity, write_audit

MANY = 60_000
"""Scores of one ranking that take more than DuckDB's smallest block."""


@pytest.fixture
def layout(tmp_path):
    return write_audit(tmp_path / "audit")


def keep(opened, wanted, scores=None, rows=ROWS, **how) -> None:
    scores = np.arange(rows, dtype=float) if scores is None else scores
    table = ranked(np.array([wanted.ranking_id]), scores[:, None])
    with opened.deriving(**how) as cursor:
        save_ranking(cursor, wanted, table)


def train(opened, direction=PROBE.direction) -> int:
    with opened.writing() as cursor:
        return workspace.save_probe(cursor, "tone", 1, "difference_of_means", direction, {}, "m")


def shown(opened) -> list:
    with opened.reading() as cursor:
        query = "SELECT example_id, rank FROM scores WHERE concept_id = 'probe:tone' ORDER BY rank"
        return cursor.execute(query).fetchall()


def test_it_may_be_deleted_at_any_time(layout):
    opened = database(layout)
    train(opened)
    keep(opened, identity())
    assert len(shown(opened)) == ROWS
    layout.derived.unlink()
    assert shown(opened) == []
    with opened.reading() as cursor, pytest.raises(RankingGoneError):
        require_rankings(cursor, [identity().ranking_id])
    keep(opened, identity())
    assert len(shown(opened)) == ROWS


@pytest.mark.parametrize("content", [b"", b"no database" * 1000])
def test_a_damaged_one_is_made_anew(layout, content):
    opened = database(layout)
    train(opened)
    keep(opened, identity())
    layout.derived.write_bytes(content)
    assert shown(opened) == []


def test_one_of_another_version_is_made_anew(layout):
    opened = database(layout)
    train(opened)
    keep(opened, identity())
    with opened.deriving() as cursor:
        cursor.execute("UPDATE base.meta SET value = '99' WHERE key = 'format'")
    assert shown(opened) == []


def test_the_workspace_alone_tells_what_people_did(layout):
    opened = database(layout)
    with opened.writing() as cursor:
        cursor.execute("INSERT INTO base.flags VALUES ('h1', 'remove', 'n', 'Ada', now()::TIMESTAMP)")
    layout.derived.unlink(missing_ok=True)
    layout.audit.unlink()
    with duckdb.connect(str(layout.workspace), read_only=True) as con:
        assert con.execute("SELECT content_hash, flag FROM base.flags").fetchall() == [("h1", "remove")]
        assert con.execute("SELECT * FROM flag_log").fetchall() == []


def test_all_views_but_scores_do_without_it(layout):
    opened = database(layout)
    train(opened)
    assert not layout.derived.exists()
    with duckdb.connect(str(layout.workspace), read_only=True) as con:
        con.execute(f"ATTACH '{layout.audit}' AS audit (READ_ONLY)")
        for view in ("examples", "concepts", "sae_features", "feature_activations", "flags", "flag_log"):
            con.execute(f"SELECT * FROM {view}").fetchall()


def test_it_stays_within_its_bound_and_keeps_what_is_asked_for(layout):
    opened = database(layout)
    rng = np.random.default_rng(0)
    wanted = [identity(method=f"m{n}") for n in range(14)]
    one = None
    for each in wanted:
        opened.used([wanted[0].ranking_id])
        keep(opened, each, rng.normal(size=MANY), limit=8 << 20)
        one = one or layout.derived.stat().st_size
        assert layout.derived.stat().st_size <= (8 << 20) + one
    with opened.reading() as cursor:
        kept = {number for (number,) in cursor.execute("SELECT ranking_id FROM derived.base.rankings").fetchall()}
    there = [each.ranking_id in kept for each in wanted]
    assert there[0] and there[-1] and not all(there)
    assert there.index(False) == 1, "the one that was not asked for longest goes first"


def test_what_is_being_shown_is_never_put_out(layout):
    opened = database(layout)
    shown_now = identity(method="shown")
    keep(opened, shown_now, np.random.default_rng(0).normal(size=MANY), limit=1)
    keep(opened, identity(method="other"), np.arange(MANY, dtype=float), limit=1, keep=[shown_now.ranking_id])
    with opened.reading() as cursor:
        require_rankings(cursor, [shown_now.ranking_id, identity(method="other").ranking_id])
    keep(opened, identity(method="third"), np.arange(MANY, dtype=float), limit=1)
    with opened.reading() as cursor, pytest.raises(RankingGoneError):
        require_rankings(cursor, [shown_now.ranking_id])


def test_a_bound_that_is_lowered_gives_room_back(layout):
    opened = database(layout)
    rng = np.random.default_rng(0)
    for n in range(6):
        keep(opened, identity(method=f"m{n}"), rng.normal(size=4 * MANY))
    before = layout.derived.stat().st_size
    keep(opened, identity(method="last"), limit=before // 4)
    assert layout.derived.stat().st_size <= before // 2
    with opened.reading() as cursor:
        require_rankings(cursor, [identity(method="last").ranking_id])


def test_single_values_go_by_age(layout, monkeypatch):
    opened = database(layout)
    values = np.zeros(200_000, np.float32)
    long_ago = derived.now() - timedelta(days=9)
    with opened.deriving() as cursor, monkeypatch.context() as patched:
        patched.setattr(derived, "now", lambda: long_ago)
        derived.cache_projections(cursor, "old", {"h": np.random.default_rng(0).normal(size=200_000)})
        derived.keep_own_answers(cursor, "m", {"h": "text"})
    with opened.deriving(limit=1) as cursor:
        derived.cache_projections(cursor, "new", {"h": values})
    with opened.reading() as cursor:
        assert derived.cached_projections(cursor, "old", ["h"]) == {} == derived.own_answers(cursor, "m", ["h"])
        assert len(derived.cached_projections(cursor, "new", ["h"])["h"]) == 200_000


def test_rankings_of_one_kind_are_one(layout):
    opened = database(layout)
    train(opened)
    keep(opened, identity(), np.arange(ROWS, dtype=float))
    other = replace(identity(), ranking_id=5)
    keep(opened, other, -np.arange(ROWS, dtype=float))
    keep(opened, other, np.zeros(ROWS))
    assert shown(opened) == [(i, i + 1) for i in range(ROWS)]


def test_a_ranking_that_ends_after_a_retraining_is_not_shown_as_the_present_ones(layout):
    opened = database(layout)
    train(opened)
    late = identity()
    new = np.array([0.8, -0.6], np.float32)
    assert train(opened, new) == 2
    present = identity(replace(PROBE, version=2, direction=new))
    keep(opened, present, np.arange(ROWS, dtype=float))
    keep(opened, late, -np.arange(ROWS, dtype=float))
    assert shown(opened) == [(ROWS - 1 - i, i + 1) for i in range(ROWS)]
    with opened.reading() as cursor:
        require_rankings(cursor, [late.ranking_id])
        assert not ranking_stored(cursor, late.ranking_id)


def test_a_ranking_of_an_earlier_build_is_not_shown_for_the_present_one(layout):
    opened = database(layout)
    train(opened)
    write_audit(layout.root, build="second")
    keep(opened, identity(build="first"))
    assert shown(opened) == []
    keep(opened, identity(build="second"))
    assert len(shown(opened)) == ROWS
    with opened.reading() as cursor:
        assert cursor.execute("SELECT count(*) FROM derived.base.rankings").fetchone() == (1,)


def test_versions_never_come_again(layout):
    opened = database(layout)
    assert [train(opened), train(opened)] == [1, 2]
    with opened.writing() as cursor:
        workspace.delete_probe(cursor, "tone")
    assert train(opened) == 3
    with opened.writing() as cursor:
        workspace.rename_probe(cursor, "tone", "voice")
    assert train(opened) == 4
    with opened.writing() as cursor:
        workspace.delete_probe(cursor, "voice")
        workspace.rename_probe(cursor, "tone", "voice")
        (probe,) = workspace.probes(cursor)
    assert (probe.name, probe.version) == ("voice", 7)


def test_trainings_of_one_version_with_other_directions_are_told_apart():
    other = replace(PROBE, direction=np.array([0.8, 0.6], np.float32))
    assert identity().ranking_id != identity(other).ranking_id


def test_ranks_are_those_that_sql_gives(layout):
    rng = np.random.default_rng(1)
    scores = np.round(rng.normal(size=500), 1)
    scores[[3, 77]] = np.nan
    found = ranked(np.array([9]), scores[:, None])
    with duckdb.connect() as con:
        con.execute("CREATE TABLE raw (example_id BIGINT, score DOUBLE)")
        con.executemany("INSERT INTO raw VALUES (?, ?)", list(enumerate(scores.tolist())))
        expected = con.execute(
            """SELECT example_id, score, row_number() OVER (ORDER BY score DESC, example_id) AS rank,
                      100 * cume_dist() OVER (ORDER BY score) AS percentile
               FROM raw WHERE NOT isnan(score) ORDER BY rank"""
        ).fetchnumpy()
    for name, values in expected.items():
        assert np.array_equal(found[name].to_numpy(), values), name
    assert set(found["ranking_id"].to_pylist()) == {9}
