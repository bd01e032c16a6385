"""The gradient index of preference pairs: against exact scores, its first rows scored exactly, and what tells it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import spearmanr

from concept_audit import Audit, BuildOptions, ConceptError, InfluenceOptions, ModelOptions, StoreError, build
from concept_audit.cli import main
from concept_audit.influence.learning import Learner
from concept_audit.model.pairs import separator, sequences
from concept_audit.pipeline.index import fidelity as index_fidelity
from concept_audit.pipeline.index import query as index_query
from concept_audit.pipeline.sampling import as_rows, chosen_sides, drawn_sides
from concept_audit.store import partition
from concept_audit.store.examples import read_tokens
from concept_audit.store.index import present_index
from concept_audit.store.shard_store import ShardStore
from tests.backend.influence.test_index import EXACT, FROM_INDEX, SMALL
from tests.backend.pipeline.test_engine import OneByOne
from tests.backend.pipeline.test_pairs import agreeing, pair_rows
from tests.conftest import chat_rows, write_jsonl

BETA = 0.3
WANTED = ("agrees", "concept_influence")


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    """So that few pairs make several shards, some of several units."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(partition, "UNIT_ROWS", 16)
        patched.setattr(partition, "SHARDS_OF_A_SIZE", 2)
        yield


@pytest.fixture(scope="module")
def indexed_once(tmp_path_factory, model_directory):
    home = tmp_path_factory.mktemp("pairs")
    data = write_jsonl(home / "rows.jsonl", pair_rows(160, longest=20))
    model = ModelOptions(str(model_directory), device="cpu")
    audit = Audit(build(BuildOptions(str(data), home / "audit", model, layers=(1, 2), sae="none", beta=BETA)))
    audit.train_probe("agrees", agreeing(), layer=2)
    seen = SimpleNamespace(learned=set(), own=set(), scored=set(), queries=set())
    with pytest.MonkeyPatch.context() as patch:
        watch(seen, patch)
        audit.build_index(SMALL)
    return audit.root, seen


def watch(seen: SimpleNamespace, patch: pytest.MonkeyPatch) -> None:
    """Note what the projection learns from, and what it is measured on."""
    sides, numbers, solved = Learner.sides, Learner.numbers, index_query.OpenIndex.solved
    score = index_fidelity.score_rows_for_many

    def contents(rows) -> set[bytes]:
        return {ids.tobytes() for ids in rows.ids}

    def learning(self, rows, asked):
        seen.learned |= contents(rows)
        return sides(self, rows, asked)

    def learning_more(self, bases, rows, own, *rest):
        seen.learned |= contents(rows)
        seen.own |= contents(own)
        return numbers(self, bases, rows, own, *rest)

    def asking(self, target, *rest):
        seen.queries |= contents(target.queries)
        return solved(self, target, *rest)

    def scoring(lm, layers, queries, rows, **more):
        seen.scored |= contents(rows)
        return score(lm, layers, queries, rows, **more)

    patch.setattr(Learner, "sides", learning)
    patch.setattr(Learner, "numbers", learning_more)
    patch.setattr(index_query.OpenIndex, "solved", asking)
    patch.setattr(index_fidelity, "score_rows_for_many", scoring)


@pytest.fixture(scope="module")
def single_conversations(tmp_path_factory, model_directory) -> Audit:
    """Not the one that all tests share: shards are small here."""
    home = tmp_path_factory.mktemp("single")
    data, model = write_jsonl(home / "rows.jsonl", chat_rows(9)), ModelOptions(str(model_directory), device="cpu")
    return Audit(build(BuildOptions(str(data), home / "audit", model, layers=(1,), sae="none")))


@pytest.fixture
def audit(indexed_once, tmp_path):
    return Audit(shutil.copytree(indexed_once[0], tmp_path / "audit"))


@pytest.fixture(scope="module")
def exact(indexed_once):
    return by_row(Audit(indexed_once[0]), EXACT)


def by_row(audit, options):
    return audit.rank(*WANTED, options=options).sort_values("example_id")["score"].to_numpy()


def files_of(audit):
    return present_index(audit.opened.layout, audit.opened.sources().shards("tokens").partition)


def tokens_of(audit):
    tokens = audit.opened.sources().shards("tokens")
    return [row for number in tokens.numbers() for row in read_tokens(tokens, number)]


def test_it_ranks_pairs_as_exact_scores_do(audit, exact):
    guess = by_row(audit, FROM_INDEX)
    assert len(files_of(audit).paths()) > 3, "of several shards"
    assert spearmanr(exact, guess).statistic > 0.9
    # Not only the order: the index estimates the score itself, beta and all.
    assert np.polyfit(guess, exact, 1)[0] == pytest.approx(1, abs=0.25)
    told = audit.index.describe()["fidelity"]
    assert told["spearman"] > 0.9 and told["rows"] == 20 and told["row_mean_differences"] == 6


def test_all_numbers_and_no_code_give_exact_scores_of_pairs(audit, exact, uncoded):
    """With every number of every layer kept, the index is a change of coordinates."""
    audit.build_index(replace(SMALL, row_bytes=10**9, agreement=1.0), replace=True)
    assert np.abs(exact - by_row(audit, FROM_INDEX)).max() <= 1e-3 * np.abs(exact).max()


def test_the_first_pairs_are_scored_exactly_and_their_token_maps_have_both_sides(audit, exact):
    approximate = by_row(audit, FROM_INDEX)
    told = audit.refine(*WANTED, FROM_INDEX)
    assert told["done"] and told["selected"] == 100 and told["exact"] == 150
    table = audit.rank(*WANTED, options=FROM_INDEX).set_index("example_id")
    scored = table[table["exact"]]["score"]
    assert set(np.argsort(-approximate)[:100]) <= set(scored.index)
    assert scored.to_numpy() == pytest.approx(exact[scored.index], rel=1e-3, abs=1e-3 * np.abs(exact).max())
    maps = audit.rows.influence_heatmaps(*WANTED, scored.index[:2].tolist(), FROM_INDEX)
    for example_id, heatmap in maps.items():
        assert heatmap.rejected == 1 and len(heatmap.turns) == 2
        total = sum(segment.value for turn in heatmap.turns for segment in turn) + heatmap.elsewhere
        assert total == pytest.approx(scored[example_id], rel=1e-3, abs=1e-7)


def test_what_a_projection_learns_and_is_measured_on(indexed_once):
    root, seen = indexed_once
    rows = as_rows(tokens_of(Audit(root)))
    whole = {ids.tobytes(): ids for ids in rows.ids}
    parts = sequences(rows.ids, rows.response)
    chosen = {ids.tobytes() for ids, sign in zip(parts.ids, parts.sign, strict=True) if sign > 0}
    rejected = {ids.tobytes() for ids in parts.ids} - chosen
    # Concepts are asked for on single texts of both kinds; the size of the numbers is that of pairs.
    assert seen.learned <= chosen | rejected and len(seen.learned & rejected) > 20 < len(seen.learned & chosen)
    assert seen.own <= set(whole) and len(seen.own) > 50
    assert seen.queries <= chosen and seen.scored <= chosen | rejected and len(seen.scored) == 40
    teaching = [whole[content] for content in seen.own]
    taught = {side.tobytes() for side in sequences(teaching, [ids > 0 for ids in teaching]).ids} | seen.learned
    assert not taught & seen.scored and not taught & seen.queries and not seen.scored & seen.queries


def test_sides_are_drawn_by_content_and_single_rows_stay_as_they_are(audit, single_conversations):
    rows = tokens_of(audit)
    drawn, first = drawn_sides(rows, 0), chosen_sides(rows)
    assert len(drawn) == len(first) == len(rows) and all(separator(ids) is None for ids in (*drawn.ids, *first.ids))
    same = [np.array_equal(a, b) for a, b in zip(drawn.ids, first.ids, strict=True)]
    assert 50 < sum(same) < 110
    backwards = drawn_sides(rows[::-1], 0)
    assert all(np.array_equal(a, b) for a, b in zip(drawn.ids, backwards.ids[::-1], strict=True))
    single = tokens_of(single_conversations)
    for made in (drawn_sides(single, 0), chosen_sides(single)):
        assert all(np.array_equal(a, row.input_ids) for a, row in zip(made.ids, single, strict=True))


def test_the_index_answers_unless_exactness_or_what_pairs_have_no_meaning_for_is_asked_for(audit):
    def engine(method="concept_influence", **options):
        return audit.rankings.find("agrees", method, InfluenceOptions.of(**options)).request.index is not None

    assert engine() and engine(damping=0.5) and engine("influence_function", engine="index")
    assert not engine(engine="exact") and not engine(curvature="identity") and not engine("gradient_dot")
    for asked in ("auto", "index"):
        with pytest.raises(ConceptError, match="--unit-normalised: not of preference pairs"):
            engine(engine=asked, unit_normalised=True)
    assert np.isnan(files_of(audit).norms(2)).all()


def test_an_index_of_another_beta_or_of_other_rows_is_not_taken(audit):
    files, about = files_of(audit), audit.index.describe()
    assert about["beta"] == BETA
    for change, named in (({"beta": 0.1}, "beta"), ({"data": "0000"}, "data")):
        files.write_description({**about, **change})
        with pytest.raises(StoreError, match=f"of another {named} .*concept-audit index"):
            audit.rankings.ensure(*WANTED, FROM_INDEX)
        assert Audit(audit.root).rankings.find(*WANTED).request.index is None


def test_indexes_of_single_conversations_know_no_beta(single_conversations):
    sources = single_conversations.opened.sources()
    assert sources.identity == {"model": sources.manifest.fingerprints["model"], "data": sources.data}


class Killed(BaseException):
    pass


def test_a_killed_build_goes_on_where_it_was_and_any_engine_makes_the_same(audit, monkeypatch):
    files = files_of(audit)
    expected = [path.read_bytes() for path in files.paths()]
    write = ShardStore.write_tensors

    def failing(self, path, *rest):
        if path.stem == "000002" and "index" in path.parts:
            raise Killed
        write(self, path, *rest)

    files.write_description({**audit.index.describe(), "done": False})
    files.remove_rows()
    monkeypatch.setattr(ShardStore, "write_tensors", failing)
    with pytest.raises(Killed):
        Audit(audit.root).build_index(SMALL)
    monkeypatch.setattr(ShardStore, "write_tensors", write)
    assert len(files.rows.there()) == 2
    Audit(audit.root, engine=OneByOne()).build_index(SMALL)
    assert [path.read_bytes() for path in files.paths()] == expected


def test_the_command_line_builds_it_and_ranks_by_it(audit, capsys):
    shutil.rmtree(files_of(audit).root)
    root = str(audit.root)
    assert main(["index", root, "--bytes", "2048", "--samples", "60", "--curvature-tokens", "3000"]) == 0
    told = capsys.readouterr().err
    assert "160 rows × 2 KiB" in told and "minutes from the start" in told and "Spearman" in told
    ranked = ["rank", root, "--concept", "agrees", "--method", "concept_influence", "--top", "5"]
    assert main([*ranked, "--index-only"]) == 0
    assert "All scores are the gradient index's; none is exact." in capsys.readouterr().err
