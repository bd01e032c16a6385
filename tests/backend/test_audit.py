"""The Python API: probes, rankings, heatmaps and flags."""

from __future__ import annotations

import gc
import json
import weakref

import numpy as np
import pytest

from concept_audit import Audit, ConceptError, LabelledExample, Message, RowFilter, StoreError
from concept_audit.store import workspace
from concept_audit.store.examples import read_texts
from tests.conftest import chat_rows, shards


@pytest.fixture
def audit(audit_directory) -> Audit:
    return Audit(audit_directory)


def of_rows(audit: Audit, count: int = 20) -> list[LabelledExample]:
    """The first rows of the data as labelled examples: rows about money are positive."""
    rows = audit.rows.list(limit=count)
    return [
        LabelledExample(
            tuple(Message(m["role"], m["content"]) for m in json.loads(messages)),
            int(json.loads(metadata)["topic"] == "money"),
        )
        for messages, metadata in zip(rows["messages"], rows["metadata"], strict=True)
    ]


def typed(count: int = 16) -> list[LabelledExample]:
    rows = chat_rows(count, seed=9)
    return [LabelledExample(tuple(Message(**turn) for turn in row["messages"]), i % 2) for i, row in enumerate(rows)]


def no_model():
    pytest.fail("the model was loaded")


def test_a_probe_from_rows_of_the_data_needs_no_model(audit, monkeypatch):
    monkeypatch.setattr(audit, "model", no_model)
    trained = audit.train_probe("topic", of_rows(audit))
    assert trained.layer in audit.layers
    assert len(audit.rank("topic")) == 300


def test_typed_examples_run_the_model_once(audit, monkeypatch):
    first = audit.train_probe("typed", typed())
    monkeypatch.setattr(audit, "model", no_model)
    again = audit.train_probe("typed", typed())
    assert (first.direction == again.direction).all()


def test_the_model_of_an_audit_that_was_let_go_is_gone_before_another_one_is_loaded(audit_directory):
    """Of two large models only one may fit, and garbage is collected seldom."""
    first, second = Audit(audit_directory), Audit(audit_directory)
    left = weakref.ref(first.model().model)
    gc.disable()
    try:
        del first
        second.model()
        assert left() is None
    finally:
        gc.enable()


def test_activations_of_typed_examples_equal_those_of_the_same_rows(audit):
    examples = of_rows(audit, 12)
    from_rows = audit.train_probe("rows", examples, layer=2, fits=["difference_of_means"])
    told_apart = [
        LabelledExample((*e.messages[:-1], Message("assistant", e.messages[-1].content)), e.label) for e in examples
    ]
    with audit.opened.database.deriving() as cursor:
        cursor.execute("DELETE FROM base.row_activations")
    lm = audit.model()
    from concept_audit.pipeline.examples import _run
    from concept_audit.progress import Progress

    means = _run(lm, told_apart, [2], 256, Progress())
    stacked = np.stack([means[e.content_hash][2] for e in told_apart])
    labels = np.array([e.label for e in told_apart])
    direction = stacked[labels == 1].mean(0) - stacked[labels == 0].mean(0)
    assert from_rows.direction @ direction / np.linalg.norm(direction) > 0.9999


def test_scores_of_a_probe_are_projections_on_its_direction(audit):
    from concept_audit.store.activations import read_means

    trained = audit.train_probe("topic", of_rows(audit), layer=3)
    means = np.concatenate(list(read_means(shards(audit.root, "activations"), 3)))
    scores = audit.rank("topic").sort_values("example_id")["score"]
    np.testing.assert_allclose(scores, means @ trained.direction, rtol=1e-5, atol=1e-6)


def test_training_again_replaces_the_ranking(audit):
    examples = of_rows(audit)
    audit.train_probe("topic", examples, layer=1)
    before = audit.rank("topic")
    audit.train_probe("topic", [LabelledExample(e.messages, 1 - e.label) for e in examples], layer=1)
    after = audit.rank("topic")
    # The direction is the opposite, to the solver's tolerance: rows that are all but tied may change places.
    opposite = -after.set_index("example_id")["score"][before["example_id"]].to_numpy()
    assert opposite == pytest.approx(before["score"].to_numpy(), abs=1e-3 * before["score"].abs().max())
    with audit.opened.database.reading() as cursor:
        assert cursor.execute("SELECT count(DISTINCT ranking_id) FROM derived.base.ranking_scores").fetchone() == (1,)
    assert audit.probes.list()[0].version == 2


def test_labels_alone_can_train_and_are_kept(audit):
    examples = of_rows(audit)
    for example in examples:
        audit.labels.add("mine", [example])
    audit.train_probe("mine")
    assert {(e.content_hash, e.label) for e in audit.labels.list("mine")} == {
        (e.content_hash, e.label) for e in examples
    }
    audit.labels.remove("mine", [examples[0].content_hash])
    assert len(audit.labels.list("mine")) == len(examples) - 1
    audit.probes.delete("mine")
    assert audit.labels.list("mine") == [] and audit.probes.list() == []


@pytest.mark.parametrize("name", ["", "  ", "a/b", "../x", "x" * 65, "<b>", "=1"])
def test_names_that_a_url_would_not_keep_are_refused(audit, name):
    with pytest.raises(ConceptError, match="probe name"):
        audit.labels.add(name, typed(2))


def test_a_layer_that_is_not_kept_is_refused(audit):
    with pytest.raises(ConceptError, match="keeps layers 1, 2, 3; choose one"):
        audit.train_probe("x", of_rows(audit), layer=4)


def test_a_probe_of_another_model_is_refused(audit):
    direction = audit.concept("sae:0").direction
    with audit.opened.database.writing() as cursor:
        workspace.save_probe(cursor, "foreign", 2, "difference_of_means", direction, {}, "other")
    with pytest.raises(ConceptError, match="train it again, its labels are kept"):
        audit.rank("foreign")


def test_an_audit_whose_model_has_changed_is_refused(audit, monkeypatch):
    manifest = json.loads((audit.root / "manifest.json").read_text())
    manifest["fingerprints"]["model"] = "0000"
    (audit.root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="made with a model of fingerprint 0000"):
        audit.model()


def test_token_values_of_a_probe_average_to_the_score(audit, monkeypatch):
    audit.train_probe("topic", of_rows(audit), layer=2)
    top = audit.rank("topic", top=6)
    heatmaps = audit.rows.heatmaps("topic", top["example_id"].tolist())
    for row in top.itertuples():
        values = [segment.value for turn in heatmaps[row.example_id].turns for segment in turn]
        assert np.mean(values) == pytest.approx(row.score, rel=1e-4, abs=1e-4)
    monkeypatch.setattr(audit, "model", no_model)
    assert audit.rows.heatmaps("topic", top["example_id"].tolist()) == heatmaps


def test_segments_join_to_the_response(audit):
    top = audit.rank("sae:3", top=20)
    heatmaps = audit.rows.heatmaps("sae:3", top["example_id"].tolist())
    for row in top.itertuples():
        (turn,) = heatmaps[row.example_id].turns
        assert "".join(segment.text for segment in turn) == row.response


def test_emoji_and_several_turns_are_kept_whole():
    from concept_audit.concepts.heatmap import _turns
    from concept_audit.model.chat import ChatRenderer
    from concept_audit.store.examples import TokenizedText
    from tests.conftest import small_tokenizer

    turns = ["hé 🌍", "好的 🙂 déjà vu", "and", "line\nbreak  two"]
    messages = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]
    row = ChatRenderer(small_tokenizer(), 200).render(messages)
    text = TokenizedText("h", row.text, row.input_ids, row.starts, row.ends, row.parts)
    found = _turns(text, np.arange(len(row.input_ids), dtype=float))
    assert ["".join(segment.text for segment in turn) for turn in found] == [turns[1], turns[3]]
    assert [turn[-1].end_of_turn for turn in found] == [True, True]


def test_sae_heatmaps_show_where_the_feature_fires_without_the_model(audit, monkeypatch):
    import duckdb

    monkeypatch.setattr(audit, "model", no_model)
    feature = int(audit.concepts.features()["feature_id"][0])
    row = int(audit.concepts.strongest_rows(feature, 1)["example_id"][0])
    (turn,) = audit.rows.heatmaps(f"sae:{feature}", [row])[row].turns
    stored = duckdb.sql(
        f"""SELECT activation FROM '{audit.root}/shards/features/*/*.parquet'
            WHERE feature_id = {feature} AND example_id = {row} ORDER BY token_position"""
    ).fetchall()
    fired = [segment.value for segment in turn if segment.value]
    assert fired == pytest.approx([value for (value,) in stored])
    assert max(fired) == pytest.approx(audit.concepts.strongest_rows(feature, 1)["max_activation"][0])


def test_copies_of_a_row_share_its_flag(audit):
    (content_hash,) = audit.rows.list(RowFilter(example_ids=(0,)))["content_hash"]
    audit.flags.set([content_hash], "remove", "bad advice", by="me")
    assert audit.rows.list(RowFilter(flag="remove"))["example_id"].tolist() == [0, 299]
    assert audit.overview().n_flagged == 2
    audit.flags.clear([content_hash])
    assert audit.rows.count(RowFilter(flag="any")) == 0


def test_all_rows_that_pass_a_filter_are_flagged_at_once(audit):
    money = RowFilter(metadata={"topic": ("money",)})
    audit.flags.set_matching(money, "review", "sae:3", note="all of them")
    flagged = audit.rows.list(RowFilter(flag="review"))
    copies = audit.rows.list(money)["content_hash"]
    assert set(flagged["content_hash"]) == set(copies) and set(flagged["note"]) == {"all of them"}
    audit.flags.set_matching(RowFilter(text="river"), None)
    assert audit.rows.count(RowFilter(flag="any")) == audit.rows.count(money) - audit.rows.count(
        RowFilter(text="river", metadata=money.metadata)
    )


def test_texts_are_read_for_the_rows_asked_for(built):
    found = read_texts(shards(built, "tokens"), [299, 3, 256])
    assert sorted(found) == [3, 256, 299]
    assert all(len(row.input_ids) == len(row.starts) == len(row.parts) for row in found.values())
