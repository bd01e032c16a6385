"""A build from end to end: what the store holds, and what a second build does."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch

from concept_audit import Audit, BuildOptions, LabelledExample, Message, ModelOptions, RowFilter, StoreError, build
from concept_audit.concepts.sae import load_sae
from concept_audit.model.chat import CONTENT, PROMPT
from concept_audit.progress import Progress
from concept_audit.store.activations import read_means
from concept_audit.store.examples import read_tokens
from concept_audit.store.layout import Layout
from tests.conftest import SMALL_SAE, shards, write_jsonl

CPU = torch.device("cpu")


@pytest.fixture
def options(data_file, model_directory, tmp_path) -> BuildOptions:
    return BuildOptions(
        data=str(data_file),
        out=tmp_path / "audit",
        model=ModelOptions(str(model_directory), device="cpu"),
        layers=(1, 2, 3),
        sae="none",
        sae_training=SMALL_SAE,
    )


def plain_means(lm, layer: int, rows) -> np.ndarray:
    """Mean response activations by a plain loop: one row at a time, no padding, every hidden state."""
    means = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor(row.input_ids[None].astype(np.int64))
            states = lm.model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0]
            means.append(states[torch.tensor(row.parts != PROMPT)].mean(0).numpy())
    return np.stack(means)


def shard_rows(layout: Layout):
    tokens = shards(layout.root, "tokens")
    return [row for number in tokens.numbers() for row in read_tokens(tokens, number)]


def test_scores_equal_a_plain_loop_over_the_model(built):
    audit, layout = Audit(built), Layout(built)
    rows = shard_rows(layout)
    means = plain_means(audit.model(), 2, rows)
    directions = load_sae(str(layout.sae), CPU).directions()
    for feature in audit.concepts.features()["feature_id"].head(10):
        ranked = audit.rank(f"sae:{feature}", "vector_filter").set_index("example_id")["score"]
        expected = means @ directions[feature]
        np.testing.assert_allclose(ranked.sort_index(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_feature_activations_equal_the_sae_on_each_token(built):
    layout, lm = Layout(built), Audit(built).model()
    sae = load_sae(str(layout.sae), CPU)
    con = duckdb.connect(str(layout.audit), read_only=True)
    for row in shard_rows(layout)[::37]:
        with torch.no_grad():
            ids = torch.tensor(row.input_ids[None].astype(np.int64))
            stream = lm.model(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
            dense = sae.module.encode(stream[torch.tensor(row.parts == CONTENT)]).numpy()
        stored = con.execute(
            """SELECT feature_id, max_activation, mean_activation, token_position FROM feature_activations
               WHERE example_id = ? ORDER BY feature_id""",
            [row.example_id],
        ).fetchall()
        firing = np.flatnonzero(dense.max(0) > 1e-3)
        assert set(firing) <= {feature for feature, *_ in stored}
        positions = np.flatnonzero(row.parts == CONTENT)
        for feature, highest, mean, position in stored:
            assert highest == pytest.approx(dense[:, feature].max(), rel=1e-3, abs=1e-3)
            assert mean == pytest.approx(dense[:, feature].mean(), rel=1e-3, abs=1e-3)
            assert dense[list(positions).index(position), feature] == pytest.approx(highest, rel=1e-3, abs=1e-3)


def test_densities_count_firing_tokens(built):
    layout = Layout(built)
    con = duckdb.connect(str(layout.audit), read_only=True)
    content = sum(int((row.parts == CONTENT).sum()) for row in shard_rows(layout))
    glob = str(shards(built, "features").file("*.parquet"))
    counted = dict(con.execute(f"SELECT feature_id, count(*) FROM '{glob}' GROUP BY 1").fetchall())
    for feature, density in con.execute("SELECT feature_id, density FROM sae_features").fetchall():
        assert density == pytest.approx(counted.get(feature, 0) / content)


def test_the_same_command_again_does_nothing_and_says_so(options):
    build(options)

    class Listening(Progress):
        said: list[str] = []

        def say(self, text):
            self.said.append(text)

    before = (options.out / "audit.duckdb").stat().st_mtime_ns
    build(options, Listening())
    assert (options.out / "audit.duckdb").stat().st_mtime_ns == before
    assert "nothing left to do" in Listening.said[-1]


def test_other_settings_are_refused_and_named(options):
    build(options)
    with pytest.raises(StoreError, match=r"layers was \[1, 2, 3\], is now \[1, 3\].*--rebuild"):
        build(dataclasses.replace(options, layers=(1, 3)))


def test_changed_data_are_refused(options, rows, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", rows[:40])
    build(dataclasses.replace(options, data=str(data)))
    write_jsonl(data, rows[:41])
    with pytest.raises(StoreError, match="data .content. was"):
        build(dataclasses.replace(options, data=str(data)))


def test_a_rebuild_keeps_probes_labels_and_flags(options, rows, tmp_path):
    build(options)
    audit = Audit(options.out)
    chosen = audit.rows.list().head(10)
    examples = [
        LabelledExample(tuple(Message(m["role"], m["content"]) for m in json.loads(text)), i % 2)
        for i, text in enumerate(chosen["messages"])
    ]
    audit.train_probe("mine", examples, layer=3)
    audit.flags.set([chosen["content_hash"][4]], "review", "odd")
    backwards = write_jsonl(tmp_path / "backwards.jsonl", rows[::-1])
    changed = dataclasses.replace(options, data=str(backwards), rebuild=True, sae="train")
    build(changed)
    again = Audit(options.out)
    assert len(again.labels.list("mine")) == 10
    assert again.rank("mine", top=3)["rank"].tolist() == [1, 2, 3]
    flagged = again.rows.list(RowFilter(flag="any"))
    assert flagged["content_hash"].unique().tolist() == [chosen["content_hash"][4]]
    assert flagged["note"].tolist()[0] == "odd"
    assert flagged["example_id"].tolist()[0] == len(rows) - 1 - 4


def test_truncated_duplicate_and_unscored_rows_are_counted(options, rows, tmp_path):
    long_answer = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "river " * 400}]
    long_prompt = [{"role": "user", "content": "river " * 400}, {"role": "assistant", "content": "no"}]
    extra = [{"messages": long_answer}, {"messages": long_prompt}, rows[0]]
    data = write_jsonl(tmp_path / "rows.jsonl", [*rows[:20], *extra])
    build(dataclasses.replace(options, data=str(data), max_tokens=64))
    audit = Audit(options.out)
    counts = audit.overview()
    assert (counts.n_rows, counts.n_duplicates, counts.n_unscored) == (23, 1, 1)
    assert counts.n_truncated >= 2
    table = audit.rows.list()
    assert table["duplicate_of"][22] == 0
    assert table["n_tokens"].max() == 64


def test_metadata_are_kept_and_filter(built, rows):
    audit = Audit(built)
    assert set(audit.rows.metadata_fields()["field"]) == {"topic", "number"}
    money = audit.rows.list(RowFilter(metadata={"topic": ("money",)}))
    assert [json.loads(text)["number"] for text in money["metadata"]] == [
        row["number"] for row in rows if row["topic"] == "money"
    ]


def test_a_loaded_sae_gives_the_features_that_training_gave(built, options):
    build(dataclasses.replace(options, sae=str(Layout(built).sae)))
    trained, loaded = (duckdb.connect(str(Layout(r).audit), read_only=True) for r in (built, options.out))
    for table in ("sae_features", "feature_activations"):
        first, second = (con.execute(f"SELECT * FROM {table} ORDER BY 1, 2").df() for con in (trained, loaded))
        assert first.shape == second.shape
        assert first["max_activation"].to_numpy() == pytest.approx(second["max_activation"].to_numpy(), rel=1e-4)


def test_features_are_complete_when_only_a_share_of_tokens_is_kept(built, options):
    build(dataclasses.replace(options, sae="train", sae_disk=400_000))
    layout = Layout(options.out)
    con = duckdb.connect(str(layout.audit), read_only=True)
    covered = con.execute("SELECT count(DISTINCT example_id) FROM feature_activations").fetchone()[0]
    assert covered > 0.95 * 300


def test_features_ranked_on_demand_rank_as_in_the_build(built, options, tmp_path):
    shutil.copytree(Layout(built).sae, tmp_path / "sae")
    build(dataclasses.replace(options, sae=str(tmp_path / "sae"), score_cells=0))
    early, late = Audit(built), Audit(options.out)
    feature = f"sae:{early.concepts.features()['feature_id'][0]}"
    first, second = early.rank(feature), late.rank(feature)
    assert first["example_id"].tolist() == second["example_id"].tolist()
    np.testing.assert_allclose(first["score"], second["score"], rtol=1e-4)


def test_rows_without_response_hold_nan_in_the_shards(options, rows, tmp_path):
    empty = [{"role": "user", "content": "river " * 400}, {"role": "assistant", "content": "no"}]
    data = write_jsonl(tmp_path / "rows.jsonl", [*rows[:5], {"messages": empty}])
    build(dataclasses.replace(options, data=str(data), max_tokens=64))
    (block,) = read_means(shards(options.out, "activations"), 2)
    assert np.isnan(block[5]).all() and not np.isnan(block[:5]).any()


def test_an_audit_may_be_moved_with_what_it_was_made_from(data_file, model_directory, tmp_path, monkeypatch):
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    data = shutil.copy(data_file, before / "rows.jsonl")
    model = shutil.copytree(model_directory, before / "model")
    monkeypatch.chdir(before)
    options = BuildOptions(
        data="rows.jsonl",
        out=before / "cache" / "audit",
        model=ModelOptions(str(model), device="cpu"),
        cache=before / "cache",
        layers=(1,),
        sae="none",
    )
    build(options)
    monkeypatch.chdir(tmp_path)
    lines = Path(data).read_text("utf-8").splitlines()
    for place in (before, after):
        if place == after:
            before.rename(after)
        audit = Audit(place / "cache" / "audit")
        assert audit.model().d_model == 32
        audit.exports.write(tmp_path / "own.jsonl", "jsonl", schema="own")
        assert (tmp_path / "own.jsonl").read_text("utf-8").splitlines() == lines
        assert Path(audit.manifest.configuration["cache"]) == place / "cache"
    again = dataclasses.replace(
        options,
        data=str(after / "rows.jsonl"),
        out=after / "cache" / "audit",
        model=ModelOptions(str(after / "model"), device="cpu"),
        cache=after / "cache",
    )
    stamp = (again.out / "audit.duckdb").stat().st_mtime_ns
    build(again)
    assert (again.out / "audit.duckdb").stat().st_mtime_ns == stamp, "nothing was left to do"
