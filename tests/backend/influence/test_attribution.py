"""Influence through the audit: the store, resuming, options, and what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil

import duckdb
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from concept_audit import Audit, ConceptError, InfluenceOptions, LabelledExample, Message, StoreError
from concept_audit.model import gradients
from concept_audit.pipeline import curvature
from concept_audit.progress import Progress
from concept_audit.types import methods_of
from tests.conftest import chat_rows, shards

EXACT = InfluenceOptions.of(precision="float32", curvature_tokens=4_000)
GRADIENT_METHODS = ("concept_influence", "influence_function", "gradient_dot")


def labelled(count: int = 6) -> list[LabelledExample]:
    made = chat_rows(2 * count, seed=5)
    return [LabelledExample(tuple(Message(**turn) for turn in row["messages"]), i % 2) for i, row in enumerate(made)]


class Said(Progress):
    def __init__(self):
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def probed(built, tmp_path_factory):
    """A copy of the finished audit with a probe."""
    root = shutil.copytree(built, tmp_path_factory.mktemp("influence") / "small")
    Audit(root).train_probe("tone", labelled(), layer=2)
    return root


@pytest.fixture
def audit(probed, tmp_path):
    return Audit(shutil.copytree(probed, tmp_path / "small"))


def test_every_method_ranks_every_row_through_the_store(audit):
    for method in methods_of("probe"):
        table = audit.rank("tone", method, options=EXACT)
        assert len(table) == 300 and np.isfinite(table["score"]).all(), method
        assert table["score"].is_monotonic_decreasing and table["rank"].tolist() == list(range(1, 301))
        assert audit.rankings.has("tone", method, EXACT)
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{audit.root}/audit.duckdb' AS audit (READ_ONLY)")
        connection.execute(f"ATTACH '{audit.root}/workspace.duckdb' AS workspace (READ_ONLY)")
        connection.execute(f"ATTACH '{audit.root}/derived.duckdb' AS derived (READ_ONLY)")
        connection.execute("USE workspace")
        kept = connection.execute(
            "SELECT method, parameters FROM main.scores WHERE concept_id = 'probe:tone' AND rank = 1"
        ).fetchall()
    parameters = {method: json.loads(text) for method, text in kept}
    assert set(parameters) == set(methods_of("probe"))
    assert parameters["concept_influence"]["curvature"] == "ekfac"
    assert parameters["concept_influence"]["precision"] == "float32"
    assert "damping" not in parameters["gradient_dot"]
    assert parameters["vector_filter"] == {}


def test_token_influences_sum_to_the_score(audit):
    kept = EXACT.changed(keep_tokens=True, curvature="identity")
    for options in (kept, EXACT.changed(curvature="identity", unit_normalised=True)):
        table = audit.rank("tone", "concept_influence", top=8, options=options)
        maps = audit.rows.influence_heatmaps("tone", "concept_influence", table["example_id"].tolist(), options)
        for row in table.to_dict("records"):
            heatmap = maps[row["example_id"]]
            shown = sum(segment.value for turn in heatmap.turns for segment in turn)
            assert shown + heatmap.elsewhere == pytest.approx(row["score"], rel=1e-4)
            assert heatmap.signed
    with pytest.raises(ConceptError, match="not computed yet"):
        audit.rows.influence_heatmaps("tone", "concept_influence", [0], EXACT)
    with pytest.raises(ConceptError, match="bm25: has no token influences"):
        audit.rows.influence_heatmaps("tone", "bm25", [0], EXACT)


def test_an_sae_feature_is_a_target_by_its_direction_and_by_its_activation(audit):
    feature = f"sae:{audit.concepts.features().iloc[0]['feature_id']}"
    by = {
        target: audit.rank(feature, "concept_influence", options=EXACT.changed(target=target))
        for target in ("direction", "activation")
    }
    assert by["direction"]["score"].tolist() != by["activation"]["score"].tolist()
    assert (by["activation"]["score"] != 0).any()


def test_forward_mode_and_token_sum_agree_through_the_audit(audit):
    options = EXACT.changed(curvature="identity")
    backward = audit.rank("tone", "gradient_dot", options=options).set_index("example_id")["score"]
    concept = audit.concept("tone")
    ranking = audit.rankings.ensure("tone", "gradient_dot", options)
    shutil.rmtree(audit.root / "shards" / "influence")
    with audit.opened.database.deriving() as cursor:
        cursor.execute("DELETE FROM base.rankings WHERE ranking_id = ?", [ranking])
        cursor.execute("DELETE FROM base.ranking_scores WHERE ranking_id = ?", [ranking])
    forward = audit.rank(concept.name, "gradient_dot", options=options.changed(mode="forward")).set_index("example_id")[
        "score"
    ]
    scale = backward.abs().max()
    assert (forward - backward.loc[forward.index]).abs().max() <= 1e-5 * scale


def test_a_killed_run_goes_on_where_it_was_to_the_same_scores(audit, monkeypatch, tmp_path):
    monkeypatch.setattr(curvature, "PART_TOKENS", 400)
    undisturbed = Audit(shutil.copytree(audit.root, tmp_path / "undisturbed"))
    wanted = undisturbed.rank("tone", "concept_influence", options=EXACT).set_index("example_id")["score"]
    seen: list[str] = []

    class Interrupting(Progress):
        """Breaks off in each stage once, after some of its work."""

        def stage(self, name, total=None, unit="rows"):
            kind = name.split(" (")[0]

            class Fused:
                def __enter__(inner):
                    inner.made = progress_stage(name, total, unit)
                    stage = inner.made.__enter__()
                    plain = stage.advance

                    def advance(units=1, detail=None):
                        plain(units, detail)
                        if kind not in seen and stage.done - stage.skipped > 0.3 * (total or 0):
                            seen.append(kind)
                            raise KeyboardInterrupt(name)

                    stage.advance = advance
                    return stage

                def __exit__(inner, *error):
                    return inner.made.__exit__(*error)

            return Fused()

    plain = Progress()
    progress_stage = plain.stage
    for _ in range(12):
        try:
            audit.rankings.ensure("tone", "concept_influence", EXACT, Interrupting())
            break
        except KeyboardInterrupt:
            continue
    assert {kind.split(" of ")[0] for kind in seen} >= {"Covariances", "Eigenvectors", "Eigenvalues", "Influence"}
    found = audit.rank("tone", "concept_influence", options=EXACT).set_index("example_id")["score"]
    assert (found - wanted.loc[found.index]).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_seed_fixes_the_sampled_fisher(audit, tmp_path):
    def ranked(name: str, seed: int):
        copy = Audit(shutil.copytree(audit.root, tmp_path / name))
        options = EXACT.changed(seed=seed)
        return copy.rank("tone", "influence_function", options=options).set_index("example_id")["score"].sort_index()

    one, again, other = ranked("one", 1), ranked("again", 1), ranked("other", 2)
    assert (one == again).all()
    assert (one != other).any() and spearmanr(one, other).statistic > 0.9


def test_curvature_is_fitted_once_and_extended_to_deeper_blocks(audit):
    audit.rankings.ensure("tone", "concept_influence", EXACT)
    (directory,) = (audit.root / "shards" / "curvature").iterdir()
    made = {path.name: path.stat().st_mtime_ns for path in directory.glob("block-*")}
    assert sorted(made) == ["block-0001.safetensors", "block-0002.safetensors"]
    audit.rankings.ensure("tone", "influence_function", EXACT)
    after = {path.name: path.stat().st_mtime_ns for path in directory.glob("block-*")}
    assert len(after) == 4 and {name: after[name] for name in made} == made
    assert not [path for path in directory.iterdir() if path.is_dir()]


def test_groups_of_blocks_give_the_factors_of_all_at_once(audit, monkeypatch, tmp_path):
    other = Audit(shutil.copytree(audit.root, tmp_path / "other"))
    together = audit.rank("tone", "influence_function", options=EXACT).set_index("example_id")["score"]
    monkeypatch.setattr(curvature, "GROUP_BYTES_CPU", 1)
    apart = other.rank("tone", "influence_function", options=EXACT).set_index("example_id")["score"]
    assert (apart - together.loc[apart.index]).abs().max() <= 1e-4 * together.abs().max()


def test_factors_of_another_model_are_refused_and_both_are_named(audit):
    audit.rankings.ensure("tone", "concept_influence", EXACT)
    (directory,) = (audit.root / "shards" / "curvature").iterdir()
    described = json.loads((directory / "curvature.json").read_text())
    (directory / "curvature.json").write_text(json.dumps({**described, "model": "0123456789abcdef"}))
    options = EXACT.changed(contrast=True)
    with pytest.raises(StoreError, match="another model or data set") as caught:
        audit.rankings.ensure("tone", "concept_influence", options)
    assert "0123456789abcdef" in str(caught.value) and described["model"] in str(caught.value)


def test_a_contrast_is_the_positive_queries_minus_the_negative_ones(audit):
    options = EXACT.changed(curvature="identity")
    found = {}
    for name, queries, contrast in (
        ("both", labelled(), True),
        ("positive", [e for e in labelled() if e.label], False),
        ("negative", [dataclasses.replace(e, label=1) for e in labelled() if not e.label], False),
    ):
        chosen = options.changed(queries=tuple(queries), contrast=contrast)
        table = audit.rank("tone", "concept_influence", options=chosen)
        found[name] = table.set_index("example_id")["score"].sort_index()
    difference = found["positive"] - found["negative"]
    assert (found["both"] - difference).abs().max() <= 1e-4 * difference.abs().max()


def test_a_probe_can_be_read_at_another_layer(audit):
    options = EXACT.changed(curvature="identity", layer=3)
    there = audit.rank("tone", "concept_influence", options=options)
    assert len(there) == 300
    with pytest.raises(ConceptError, match="--layer 4: this audit keeps layers 1, 2, 3"):
        audit.rank("tone", "concept_influence", options=options.changed(layer=4))
    with pytest.raises(ConceptError, match="lives at layer"):
        audit.rank("sae:0", "concept_influence", options=options.changed(layer=1))


def test_queries_can_be_answered_by_the_model_itself(audit):
    prompts = tuple(LabelledExample(e.messages[:-1], 1) for e in labelled(2))
    options = EXACT.changed(curvature="identity", queries=prompts, own_answers=True)
    assert np.isfinite(audit.rank("tone", "concept_influence", options=options)["score"]).all()


def test_own_answers_are_generated_once_and_shown(audit, monkeypatch):
    assert audit.rows.own_answers([0, 5]) == {}
    first = audit.rank("tone", "projection_difference")
    assert set(audit.rows.own_answers([0, 5, 299])) == {0, 5, 299}
    assert first.set_index("example_id")["score"].loc[0] == pytest.approx(
        first.set_index("example_id")["score"].loc[299], rel=1e-4
    )
    monkeypatch.setattr("concept_audit.pipeline.answers.Answering.run", lambda *_: pytest.fail("generated again"))
    assert len(audit.rank("sae:0", "projection_difference")) == 300


def test_queries_without_a_response_are_refused(audit):
    long = Message("user", "river " * 400)
    queries = (LabelledExample((long, Message("assistant", "bank")), 1),)
    with pytest.raises(ConceptError, match="query 1 has no response tokens"):
        audit.rank("tone", "concept_influence", options=EXACT.changed(queries=queries, curvature="identity"))
    with pytest.raises(ConceptError, match="no negative query examples"):
        only = tuple(e for e in labelled() if e.label)
        audit.rank("tone", "gradient_dot", options=EXACT.changed(queries=only, contrast=True))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"damping": -1.0}, "--damping -1.0: must not be negative"),
        ({"rank": 0}, "--rank 0: must be 1 or more"),
        ({"blocks": (1, 9)}, "--blocks 1-9: the target depends on blocks 1 to 2"),
        ({"mode": "forward", "unit_normalised": True}, "does not see the norm"),
        ({"mode": "forward", "keep_tokens": True}, "gives no token influences"),
    ],
)
def test_options_out_of_range_are_refused(audit, wrong, said):
    with pytest.raises(ConceptError, match=said):
        audit.rank("tone", "concept_influence", options=EXACT.changed(**wrong))


def test_an_unknown_method_is_refused(audit):
    with pytest.raises(ConceptError, match="--method magic: unknown; choose from feature_activation, vector_filter"):
        audit.rank("tone", "magic")


def test_a_row_with_a_loss_that_is_not_finite_is_reported_and_left_unscored(audit, monkeypatch):
    lm = audit.model()
    plain = gradients.LanguageModelHead.token_losses
    bad = shards(audit.root, "tokens")
    from concept_audit.store.examples import read_tokens

    length = max(len(row.input_ids) for row in read_tokens(bad, 0))
    victims = {row.example_id for row in read_tokens(bad, 0) if len(row.input_ids) == length}

    def spoiled(self, batch, draw=None):
        nll = plain(self, batch, draw)
        owners = gradients.supervised(batch).nonzero()[:, 0]
        longest = batch.real.sum(1) >= length - 1
        return nll + torch.where(longest[owners], float("nan"), 0.0)

    monkeypatch.setattr(gradients.LanguageModelHead, "token_losses", spoiled)
    said = Said()
    options = EXACT.changed(curvature_tokens=100_000)
    audit.rankings.ensure("tone", "concept_influence", options, said)
    table = audit.rank("tone", "concept_influence", options=options)
    assert 0 < 300 - len(table) <= len(victims) + 2 and not victims & set(table["example_id"])
    assert any("left unscored" in line for line in said.lines)
    assert any("the curvature is fitted without them" in line for line in said.lines)
    assert lm is audit.model()


def test_bfloat16_ranks_almost_as_float32_does(audit):
    exact = audit.rank("tone", "concept_influence", options=EXACT).set_index("example_id")["score"]
    half = audit.rank("tone", "concept_influence", options=EXACT.changed(precision="bfloat16")).set_index("example_id")[
        "score"
    ]
    assert spearmanr(exact.sort_index(), half.sort_index()).statistic > 0.98


def test_retraining_a_probe_deletes_what_its_influence_left(audit):
    audit.rankings.ensure("tone", "concept_influence", EXACT.changed(curvature="identity"))
    assert list((audit.root / "shards" / "influence").iterdir())
    audit.train_probe("tone", layer=2)
    assert not list((audit.root / "shards" / "influence").iterdir())
