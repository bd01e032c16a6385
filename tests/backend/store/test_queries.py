"""Filters, ranks and histograms against pandas on the same rows."""

from __future__ import annotations

import json
import re

import duckdb
import numpy as np
import pandas as pd
import pytest

from concept_audit import Audit, BuildOptions, ConceptError, LabelledExample, Message, ModelOptions, RowFilter, build
from concept_audit.store import queries, workspace
from concept_audit.store.assemble import LEAST_MEMORY, THREAD_MEMORY, limit
from tests.conftest import chat_rows, write_jsonl

ODD = "a\"b/c~d.e'f;--"


@pytest.fixture(scope="module")
def audit(tmp_path_factory, model_directory) -> Audit:
    """Rows with awkward metadata and some copies, so that scores tie."""
    rows = chat_rows(60, seed=4)
    for i, row in enumerate(rows):
        row[ODD] = ["x", "y'); DROP TABLE base.flags; --", None][i % 3]
        row["nested"] = {"deep": [i % 2]}
        row["empty"] = None
    rows += rows[:15]
    place = tmp_path_factory.mktemp("queries")
    root = build(
        BuildOptions(
            data=str(write_jsonl(place / "rows.jsonl", rows)),
            out=place / "audit",
            model=ModelOptions(str(model_directory), device="cpu"),
            layers=(1, 2),
            sae="none",
        )
    )
    audit = Audit(root)
    direction = np.random.default_rng(0).normal(size=32).astype(np.float32)
    with audit.opened.database.writing() as cursor:
        workspace.save_probe(
            cursor,
            "p",
            2,
            "difference_of_means",
            direction / np.linalg.norm(direction),
            {},
            audit.manifest.fingerprints["model"],
        )
    audit.flags.set(audit.rows.list(limit=20)["content_hash"].tolist()[::2], "remove")
    audit.flags.set(audit.rows.list(limit=20)["content_hash"].tolist()[1:2], "review")
    return audit


@pytest.fixture(scope="module")
def table(audit) -> pd.DataFrame:
    frame = audit.rank("p")
    frame["meta"] = [json.loads(text) for text in frame["metadata"]]
    return frame


def test_ranks_order_by_score_then_by_row(table):
    expected = table.sort_values(["score", "example_id"], ascending=[False, True])
    assert table["rank"].tolist() == list(range(1, 76))
    assert expected["example_id"].tolist() == table["example_id"].tolist()
    assert table["score"].duplicated().any()


def test_percentiles_are_the_share_of_rows_at_or_below(table):
    expected = [100 * (table["score"] <= score).mean() for score in table["score"]]
    np.testing.assert_allclose(table["percentile"], expected)


FILTERS = {
    "text": (RowFilter(text="RIVER"), lambda r: "river" in (r["prompt"] + "\0" + r["response"]).lower()),
    "wildcards are plain text": (RowFilter(text="%"), lambda r: "%" in r["prompt"] + r["response"]),
    "metadata": (RowFilter(metadata={"topic": ("money",)}), lambda r: r["meta"]["topic"] == "money"),
    "several values": (RowFilter(metadata={"number": ("3", "7")}), lambda r: r["meta"]["number"] in (3, 7)),
    "odd names": (RowFilter(metadata={ODD: ("x",)}), lambda r: r["meta"][ODD] == "x"),
    "injection": (
        RowFilter(metadata={ODD: ("y'); DROP TABLE base.flags; --",)}),
        lambda r: str(r["meta"][ODD]).startswith("y'"),
    ),
    "nested": (RowFilter(metadata={"nested": ('{"deep":[1]}',)}), lambda r: r["meta"]["nested"]["deep"] == [1]),
    "no such value": (RowFilter(metadata={"topic": ("nothing",)}), lambda r: False),
    "any flag": (RowFilter(flag="any"), lambda r: isinstance(r["flag"], str)),
    "no flag": (RowFilter(flag="none"), lambda r: not isinstance(r["flag"], str)),
    "a flag": (RowFilter(flag="review"), lambda r: r["flag"] == "review"),
    "scores": (RowFilter(scores=(-0.1, 0.1)), lambda r: -0.1 <= r["score"] <= 0.1),
    "rows": (RowFilter(example_ids=(3, 5, 70)), lambda r: r["example_id"] in (3, 5, 70)),
    "two at once": (
        RowFilter(text="river", flag="none"),
        lambda r: "river" in (r["prompt"] + "\0" + r["response"]).lower() and not isinstance(r["flag"], str),
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_the_rows_that_pandas_keeps(audit, table, name):
    where, keep = FILTERS[name]
    expected = [r["example_id"] for r in table.to_dict("records") if keep(r)]
    assert audit.rank("p", where=where)["example_id"].tolist() == expected
    assert audit.rows.count(where, "p") == len(expected)


def test_pages_put_together_are_the_whole(audit, table):
    pages = [audit.rank("p", top=20, offset=start) for start in (0, 20, 40, 60)]
    assert pd.concat(pages)["example_id"].tolist() == table["example_id"].tolist()


def test_rows_without_a_ranking_come_in_the_order_of_the_data(audit):
    assert audit.rows.list(limit=4, offset=2)["example_id"].tolist() == [2, 3, 4, 5]
    money = audit.rows.list(RowFilter(metadata={"topic": ("money",)}))["example_id"]
    assert money.is_monotonic_increasing


def test_a_sample_is_the_same_for_its_seed_and_not_for_another(audit):
    first, again, other = (audit.rows.sample(RowFilter(), seed, 30)["example_id"].tolist() for seed in "aab")
    assert first == again != other


@pytest.mark.parametrize("where", [RowFilter(), RowFilter(text="river")])
def test_histograms_equal_numpys(audit, table, where):
    edges, everything, passing = audit.rankings.histogram("p", where=where, bins=13)
    kept = set(audit.rank("p", where=where)["example_id"])
    expected, _ = np.histogram(table["score"], edges)
    np.testing.assert_array_equal(everything, expected)
    np.testing.assert_array_equal(passing, np.histogram(table["score"][table["example_id"].isin(kept)], edges)[0])


def test_the_summary_is_that_of_the_scores(audit, table):
    summary = audit.rankings.summary("p")
    assert summary["mean"] == pytest.approx(table["score"].mean())
    assert summary["deviation"] == pytest.approx(table["score"].std(ddof=0))
    assert summary["count"] == 75


def test_metadata_fields_tell_their_values(audit):
    fields = audit.rows.metadata_fields().set_index("field")
    assert set(fields.index) == {"topic", "number", ODD, "nested", "empty"}
    assert fields.loc["topic", "n_rows"] == 75 and fields.loc["empty", "n_rows"] == 0
    assert fields.loc["number", "n_values"] == 60
    assert set(fields.loc["nested", "top_values"]) == {'{"deep":[0]}', '{"deep":[1]}'}


def test_concepts_are_found_by_id_and_by_name(audit):
    assert audit.concept("p").concept_id == audit.concept("probe:p").concept_id == "probe:p"
    with pytest.raises(ConceptError, match="there are probes p. Train"):
        audit.concept("q")


def test_features_are_searched_by_token(built):
    audit = Audit(built)
    token = audit.concepts.features()["top_tokens"][0][0]
    found = audit.concepts.features(token.strip())
    assert len(found) and all(
        any(token.strip().lower() in t.lower() for t in [*tops, *promoted])
        for tops, promoted in zip(found["top_tokens"], found["promoted"], strict=True)
    )
    assert audit.concepts.features("no such token 123").empty
    for order in ("telling", "max_activation", "density", "rarest", "feature_id"):
        assert len(audit.concepts.features(order=order)) == len(audit.concepts.features())


def test_features_that_fire_on_a_word_stand_out_before_those_that_fire_on_a_piece(built):
    found = Audit(built).concepts.features(order="telling")
    on_a_word = [bool(re.fullmatch(r"\s[^\W\d_]{3,}", tops[0])) for tops in found["top_tokens"]]
    assert any(on_a_word) and not all(on_a_word) and on_a_word == sorted(on_a_word, reverse=True)
    rows = Audit(built).overview().n_rows
    weight = found["max_activation"] * np.log(rows / found["n_examples"].clip(lower=2))
    for words in (True, False):
        assert weight[np.array(on_a_word) == words].is_monotonic_decreasing


@pytest.mark.parametrize("where", [RowFilter(), RowFilter(text="river"), RowFilter(flag="none")], ids=repr)
@pytest.mark.parametrize("kind", ["likely", "uncertain", "unlikely"])
def test_the_queue_offers_the_best_row_that_has_no_label_and_was_not_skipped(audit, table, kind, where):
    done = table["content_hash"].iloc[[0, 2, 40, -1]].tolist()
    with audit.opened.database.writing() as cursor:
        workspace.skip(cursor, "asked", done[:1])
        workspace.skip(cursor, "other", done[1:2])
        workspace.label(cursor, "asked", [LabelledExample((Message("user", "x"), Message("assistant", "y")), 1)])
        workspace.skip(cursor, "asked", done[2:])
    left = table[~table["content_hash"].isin([done[0], *done[2:]])]
    left = left[left["example_id"].isin(audit.rank("p", where=where)["example_id"])]
    place = {"likely": left["rank"], "unlikely": -left["rank"], "uncertain": (left["score"] - 0.02).abs()}[kind]
    expected = left.assign(place=place).sort_values(["place", "example_id"])["example_id"].iloc[0]
    ranking = audit.rankings.ensure("p")
    found = audit.opened.read(lambda cursor: queries.unlabelled(cursor, "asked", where, ranking, kind, 0.02))
    assert found["example_id"].tolist() == [expected] and found["response"][0]


def test_before_training_the_queue_offers_every_row_once(audit):
    offered = []
    while (found := audit.queue.next("new", RowFilter(text="river"))) is not None:
        offered.append(found[1]["content_hash"])
        audit.queue.skip("new", [found[1]["content_hash"]])
    rows = audit.rows.list(RowFilter(text="river"))
    assert sorted(offered) == sorted(set(rows["content_hash"])) != offered


def test_texts_are_searched_once_for_all_rows_of_a_queue(audit, monkeypatch):
    searched = []
    found = audit.opened.database.found
    monkeypatch.setattr(audit.opened.database, "found", lambda *asked: searched.append(asked) or found(*asked))
    audit.queue.next("new", RowFilter(text="money"))
    audit.rows.sample(RowFilter(text="money"), "seed", 3)
    assert len(searched) == 2


def test_rows_by_id_are_those_rows(audit, table):
    ids = [70, 3, 5]
    found = audit.opened.read(lambda cursor: queries.rows_by_id(cursor, ids))
    expected = table.set_index("example_id").loc[sorted(ids)]
    assert found["example_id"].tolist() == sorted(ids) and found["response"].tolist() == expected["response"].tolist()
    assert audit.opened.read(lambda cursor: queries.rows_by_id(cursor, [])).empty


def test_what_a_page_asks_of_a_feature_lies_together(built):
    with duckdb.connect(str(built / "audit.duckdb"), read_only=True) as con:
        found = con.execute("SELECT feature_id, example_id FROM base.feature_activations").fetchall()
    assert len({example_id // 256 for _, example_id in found}) > 1, "of more than one shard"
    assert found == sorted(found)


@pytest.mark.parametrize("memory, told", [(0, LEAST_MEMORY), (3 << 30, 3 << 30)])
def test_the_memory_of_the_stores_build_is_what_it_is_given(memory, told, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    with duckdb.connect() as con:
        limit(con, memory)
        shown, threads = con.execute("SELECT current_setting('memory_limit'), current_setting('threads')").fetchone()
    assert shown == (f"{told / 2**20:.1f} MiB" if told < 2**30 else f"{told / 2**30:.1f} GiB")
    assert threads == told // THREAD_MEMORY
