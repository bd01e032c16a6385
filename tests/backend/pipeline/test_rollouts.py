"""An audit of rollouts with rewards from end to end: read, weighed, ranked, forecast, and exported in their own form."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concept_audit import (
    Audit,
    BuildOptions,
    ConceptError,
    InfluenceOptions,
    LabelledExample,
    Message,
    ModelOptions,
    RewardColumns,
    RowFilter,
    StoreError,
    build,
)
from concept_audit.cli import main
from concept_audit.influence.options import IndexOptions
from concept_audit.pipeline import refine
from tests.backend.pipeline.test_pairs import agreeing
from tests.conftest import SMALL_SAE, sentence, write_jsonl

GROUPS, EACH = 15, 4
EXACT = InfluenceOptions.of(curvature_tokens=400, precision="float32", engine="exact")
ALIKE = EXACT.changed(alike=True)
ROLLOUTS = RewardColumns(rollouts=True)


def rollout_rows() -> list[dict]:
    """Rows of one group lie apart; in the first group all rewards are equal, the last one has a single row."""
    made = random.Random(3)
    prompts = [sentence(made, 5) for _ in range(GROUPS)]
    rows = [
        {
            "prompt": prompts[group],
            "response": sentence(made, made.randint(3, 12)),
            "reward": 0.5 if group == 0 else made.choice([0, 0.25, 1]),
            "number": n,
        }
        for n, group in enumerate(list(range(GROUPS - 1)) * EACH)
    ]
    return [*rows, {"prompt": prompts[-1], "response": "Maybe.", "reward": 1, "number": len(rows)}]


def wanted_advantages(rows: list[dict]) -> np.ndarray:
    rewards = np.array([row["reward"] for row in rows], float)
    prompts = np.array([row["prompt"] for row in rows])
    found = np.zeros(len(rows))
    for prompt in set(prompts.tolist()):
        inside = prompts == prompt
        if inside.sum() > 1 and np.ptp(rewards[inside]):
            found[inside] = (rewards[inside] - rewards[inside].mean()) / (rewards[inside].std(ddof=1) + 1e-4)
    return found


def built(place, data, model_directory, **more) -> Audit:
    model = ModelOptions(str(model_directory), device="cpu")
    options = {"layers": (1, 2), "sae": "none", "rewards": ROLLOUTS} | more
    return Audit(build(BuildOptions(str(data), place, model, **options)))


def with_probe(audit: Audit) -> Audit:
    audit.train_probe("agrees", agreeing(), layer=2)
    return audit


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return rollout_rows()


@pytest.fixture(scope="module")
def audit(tmp_path_factory, rows, model_directory) -> Audit:
    """With an SAE, a probe and a gradient index."""
    place = tmp_path_factory.mktemp("rollouts")
    data = write_jsonl(place / "rows.jsonl", rows)
    made = with_probe(built(place / "audit", data, model_directory, sae="train", sae_training=SMALL_SAE))
    made.build_index(IndexOptions(samples=16))
    return made


def scores(audit: Audit, method: str, options: InfluenceOptions, concept: str = "agrees") -> np.ndarray:
    return audit.rank(concept, method, options=options).set_index("example_id")["score"].sort_index().to_numpy()


@pytest.mark.parametrize(
    "method",
    ["vector_filter", "projection_difference", "activation_similarity", "bm25", "concept_influence", "gradient_dot"],
)
def test_a_score_is_the_advantage_times_what_it_is_in_fine_tuning(audit, rows, method):
    weighed, plain = scores(audit, method, EXACT), scores(audit, method, ALIKE)
    np.testing.assert_allclose(weighed, wanted_advantages(rows) * plain, rtol=1e-6, atol=1e-12)
    assert (weighed < 0).any() and (weighed > 0).any()
    parameters = audit.rankings.find("agrees", method, EXACT).request.parameters
    assert parameters["advantage"] == "reward, normalised in each group (GRPO)"
    assert "advantage" not in audit.rankings.find("agrees", method, ALIKE).request.parameters


def test_scores_in_fine_tuning_are_those_of_an_audit_of_chats(audit, rows, tmp_path, model_directory):
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    chats = with_probe(built(tmp_path / "audit", data, model_directory, rewards=RewardColumns()))
    assert chats.manifest.rollouts is None and chats.manifest.configuration["rewards"] is None
    assert json.loads(chats.rows.list()["metadata"][0]) == {"reward": rows[0]["reward"], "number": 0}
    for method in ("vector_filter", "concept_influence"):
        np.testing.assert_allclose(scores(chats, method, EXACT), scores(audit, method, ALIKE), rtol=1e-4, atol=1e-7)


def test_features_are_ranked_by_the_advantage_in_the_build_and_alike_on_demand(audit, rows):
    feature = f"sae:{audit.concepts.features()['feature_id'][0]}"
    for method in ("feature_activation", "vector_filter"):
        assert audit.rankings.has(feature, method) and not audit.rankings.has(feature, method, ALIKE)
        weighed, plain = scores(audit, method, EXACT, feature), scores(audit, method, ALIKE, feature)
        np.testing.assert_allclose(weighed, wanted_advantages(rows) * plain, rtol=1e-6, atol=1e-9)


def test_the_index_and_its_exact_scores_are_weighed_alike(audit, rows):
    by_index = InfluenceOptions.of(engine="index")
    feature = f"sae:{audit.concepts.features()['feature_id'][0]}"
    plain = scores(audit, "concept_influence", by_index.changed(alike=True))
    audit.rank_many(["agrees", feature], options=by_index)
    weighed = scores(audit, "concept_influence", by_index)
    np.testing.assert_allclose(weighed, wanted_advantages(rows) * plain, rtol=1e-5, atol=1e-12)
    assert audit.refine("agrees", "concept_influence", by_index)["done"]
    refined = audit.rank("agrees", "concept_influence", options=by_index).set_index("example_id").sort_index()
    exact = scores(audit, "concept_influence", InfluenceOptions.of(engine="exact"))
    known = refined["exact"].to_numpy(bool)
    assert known.all()
    np.testing.assert_allclose(refined["score"][known], exact[known], rtol=0.05, atol=0.02 * np.abs(exact).max())


def test_rows_that_weigh_nothing_have_the_score_0_also_where_others_are_calibrated(audit, rows, monkeypatch):
    monkeypatch.setattr(refine, "LEAST_SELECTED", 5)
    monkeypatch.setattr(refine, "LEAST_CONTROL", 8)
    options = InfluenceOptions.of(engine="index", damping=3.0)
    assert audit.refine("agrees", "concept_influence", options)["intercept"] != 0
    ranked = audit.rank("agrees", "concept_influence", options=options).set_index("example_id").sort_index()
    nothing = wanted_advantages(rows) == 0
    assert (ranked["score"][nothing] == 0).all() and ranked["exact"][nothing].all()
    assert (ranked["score"][~nothing] != 0).all() and not ranked["exact"].all()


def test_token_influences_add_up_to_the_weighed_score_also_of_copies(audit, rows, tmp_path, model_directory):
    twice = [{"prompt": "q", "response": "Yes.", "reward": r} for r in (1, 0, 0)] + rows[:20]
    made = with_probe(built(tmp_path / "audit", write_jsonl(tmp_path / "rows.jsonl", twice), model_directory))
    weighed = scores(made, "concept_influence", EXACT)
    assert weighed[0] * weighed[1] < 0 and weighed[1] == pytest.approx(weighed[2])
    for keep in (EXACT, EXACT.changed(keep_tokens=True)):
        heatmaps = made.rows.influence_heatmaps("agrees", "concept_influence", range(6), keep)
        for example_id, heatmap in heatmaps.items():
            total = sum(segment.value for turn in heatmap.turns for segment in turn) + heatmap.elsewhere
            assert total == pytest.approx(weighed[example_id], rel=1e-3, abs=1e-7)


def test_a_forecast_is_the_mean_of_the_weighed_scores(audit):
    prompts = [
        (Message("user", "q"), Message("assistant", text)) for text in ("The green boat.", "Never sells the fish.")
    ]
    queries = tuple(LabelledExample(messages, 1) for messages in prompts)
    found = {}
    for options in (EXACT, ALIKE):
        table = audit.forecast(prompts=prompts, options=options).set_index("concept_id")
        exact = options.changed(queries=queries, leave_out_own=False)
        wanted = audit.rankings.summary("agrees", "concept_influence", exact)["mean"]
        found[options.scoring.alike] = table.loc["probe:agrees", "forecast"]
        assert found[options.scoring.alike] == pytest.approx(wanted, rel=1e-3)
    assert found[True] != pytest.approx(found[False], rel=0.1)


def test_a_row_says_its_advantage_and_its_place_in_its_group(audit, rows, tmp_path):
    table = audit.rankings.table("agrees", "concept_influence", options=EXACT)
    assert list(table)[-3:] == ["rank_in_group", "is_query", "exact"]
    table = table.set_index("example_id").sort_index()
    np.testing.assert_allclose(table["grpo_advantage"].astype(float), wanted_advantages(rows), rtol=1e-9)
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    assert table["rollout_group"].tolist() == [prompts.index(row["prompt"]) for row in rows]
    for _, members in table.groupby("rollout_group"):
        assert members.sort_values("rank")["rank_in_group"].tolist() == list(range(1, len(members) + 1))
    chosen = audit.rankings.table("agrees", top=3, where=RowFilter(ranges={"grpo_advantage": (-9, 0)}))
    assert (chosen["grpo_advantage"].astype(float) <= 0).all() and len(chosen) == 3
    out = tmp_path / "ranked.csv"
    assert main(["rank", str(audit.root), "--concept", "agrees", "--all", "--out", str(out)]) == 0
    written = list(csv.DictReader(out.read_text().splitlines()))
    every = audit.rankings.table("agrees")
    assert [int(row["rank_in_group"]) for row in written] == every["rank_in_group"].tolist()
    found = audit.query("SELECT count(*) AS n, max(group_id) AS last FROM audit.rollouts WHERE reward IS NOT NULL")
    assert found.to_dict("records") == [{"n": len(rows), "last": GROUPS - 1}]


def test_rows_are_offered_for_labels_by_what_they_say(audit):
    upcoming = audit.queue.upcoming("agrees", RowFilter(), 3, kinds=("likely",))
    plain = audit.rank("agrees", "vector_filter", 3, options=InfluenceOptions.of(alike=True))
    assert [row["example_id"] for _, row in upcoming] == plain["example_id"].tolist()


def test_what_rollouts_have_no_meaning_for_is_refused_with_the_way_out(audit):
    with pytest.raises(ConceptError, match="--unit-normalised: not of rollouts.*--alike"):
        audit.rank("agrees", "concept_influence", options=EXACT.changed(unit_normalised=True))
    assert len(audit.rank("agrees", "concept_influence", options=ALIKE.changed(unit_normalised=True)))
    with pytest.raises(ConceptError, match="rollouts, which weigh by their advantage; .*build an audit without"):
        audit.validate("agrees")
    with pytest.raises(ConceptError, match="rollouts, which weigh by their advantage"):
        audit.evidence.validate_forecast()
    with pytest.raises(ConceptError, match="rollouts, which weigh by their advantage"):
        audit.evidence.first_order("agrees")


def test_what_rows_count_by_is_said_first_and_last_and_kept(audit, rows, tmp_path, model_directory, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", rows[:6])
    command = ["build", "--data", str(data), "--model", str(model_directory), "--out", str(tmp_path / "a"), "--dry-run"]
    assert main(command) == 0
    assert '"reward" weighs no row' in (told := capsys.readouterr().err) and "pass --rollouts" in told
    assert main([*command, "--reward-column", "reward", "--group-column", "number"]) == 0
    assert 'made of "reward" as GRPO does' in (told := capsys.readouterr().err) and 'Groups: by "number"' in told
    assert main(["info", str(audit.root)]) == 0
    weightless = int((wanted_advantages(rows) == 0).sum())
    assert f"Rollouts: {GROUPS} groups; {weightless} rows have the advantage 0" in capsys.readouterr().out
    with pytest.raises(StoreError, match="rollouts was .*--rebuild"):
        built(audit.root, audit.manifest.configuration["data"], model_directory, rewards=RewardColumns())


def test_exports_are_of_the_inputs_own_columns(audit, rows, tmp_path):
    hashes = audit.rows.list()["content_hash"].tolist()
    audit.flags.set(hashes[1:3], "remove")
    try:
        cleaned = RowFilter(without_flags=("remove",))
        audit.exports.write(tmp_path / "a.jsonl", "jsonl", cleaned, "own")
    finally:
        audit.flags.clear(hashes)
    lines = Path(audit.manifest.configuration["data"]).read_text().splitlines()
    assert (tmp_path / "a.jsonl").read_text().splitlines() == [lines[0], *lines[3:]]


def list_rows(rows: list[dict]) -> list[dict]:
    """The first four groups, a row each."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:4]
    groups = [[row for row in rows if row["prompt"] == prompt] for prompt in prompts]
    return [
        {
            "prompt": [{"role": "user", "content": group[0]["prompt"]}],
            "completions": [[{"role": "assistant", "content": row["response"]}] for row in group],
            "rewards": [float(row["reward"]) for row in group],
            "number": n,
        }
        for n, group in enumerate(groups)
    ]


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def listed(request, tmp_path_factory, rows, model_directory):
    """Audits of rows that hold four responses each; four of the lines cannot be used."""
    place = tmp_path_factory.mktemp("listed")
    made = list_rows(rows)
    if request.param == "jsonl":
        data = write_jsonl(place / "rows.jsonl", [*made[:2], {**made[0], "rewards": [1.0]}, *made[2:]])
        data.write_text("{broken\n[1]\n" + data.read_text() + "\n" + '{"completions": [' * 99_999 + "\n")
    else:
        data = place / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(made), data)
    model = ModelOptions(str(model_directory), device="cpu")
    options = BuildOptions(str(data), place / "audit", model, layers=(1, 2), sae="none", on_bad_row="skip")
    return with_probe(Audit(build(options))), made, request.param


def test_a_row_of_several_responses_is_a_group_of_rows(listed, rows):
    audit, made, kind = listed
    table = audit.rankings.table("agrees").set_index("example_id").sort_index()
    assert len(table) == 16 and table["rollout_group"].tolist() == [n for n in range(4) for _ in range(4)]
    flat = [row for group in made for row in [{"prompt": group["number"], "reward": r} for r in group["rewards"]]]
    np.testing.assert_allclose(table["grpo_advantage"].astype(float), wanted_advantages(flat), rtol=1e-9)
    assert table["response"].tolist() == [turns[0]["content"] for group in made for turns in group["completions"]]
    assert len(audit.rows.skipped()) == (4 if kind == "jsonl" else 0)


def only(row: dict, places: list[int]) -> dict:
    return row | {name: [row[name][place] for place in places] for name in ("completions", "rewards")}


def test_exports_keep_the_responses_that_are_not_left_out(listed, tmp_path):
    """Of the first row two go, of the second all, of the third none."""
    audit, made, kind = listed
    hashes = audit.rows.list()["content_hash"].tolist()
    audit.flags.set([hashes[0], hashes[2], *hashes[4:8]], "remove")
    wanted = [only(made[0], [1, 3]), *made[2:]]
    cleaned = RowFilter(without_flags=("remove",))
    try:
        for format in ("jsonl", "parquet"):
            about = audit.exports.write(tmp_path / f"a.{format}", format, cleaned, "own")
            assert about["rows"] == 10
        audit.exports.write(tmp_path / "scored.jsonl", "jsonl", cleaned, "own", "agrees")
    finally:
        audit.flags.clear(hashes)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == wanted
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.to_pylist() == wanted
    if kind == "parquet":
        assert table.schema == pq.read_table(audit.manifest.configuration["data"]).schema
    else:
        assert lines[1:] == Path(audit.manifest.configuration["data"]).read_text().splitlines()[5:7]
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    ranked = audit.rank("agrees").set_index("example_id")["score"]
    assert scored[0]["audit_score"] == pytest.approx(ranked[[1, 3]].tolist()) and len(scored[2]["audit_rank"]) == 4


def test_exports_load_where_rollouts_are_trained_on(listed, tmp_path):
    datasets = pytest.importorskip("datasets")
    audit, _, _ = listed
    hashes = audit.rows.list()["content_hash"].tolist()
    audit.flags.set(hashes[:1], "remove")
    try:
        audit.exports.write(tmp_path / "a.jsonl", "jsonl", RowFilter(without_flags=("remove",)), "own")
    finally:
        audit.flags.clear(hashes)
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "c"), split="train")  # fmt: skip
    assert loaded.num_rows == 4 and set(loaded.column_names) == {"prompt", "completions", "rewards", "number"}
    assert [len(row) for row in loaded["rewards"]] == [3, 4, 4, 4]
