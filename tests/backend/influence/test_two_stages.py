"""Two stages: the gradient index recalls, exact scores of the first rows and of a control decide."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from concept_audit import Audit, InfluenceOptions
from concept_audit.influence.two_stages import calibration, merged, recall
from concept_audit.pipeline import refine as stage
from concept_audit.store.derived import RankingGoneError, drop_rankings
from concept_audit.store.evidence import ranking_scores
from concept_audit.store.shard_store import ShardStore
from tests.backend.influence.test_attribution import labelled
from tests.backend.influence.test_index import EXACT, FROM_INDEX, SMALL

WANTED = ("tone", "concept_influence")


@pytest.fixture(scope="module")
def indexed(built, tmp_path_factory):
    root = shutil.copytree(built, tmp_path_factory.mktemp("stages") / "small")
    audit = Audit(root)
    audit.train_probe("tone", labelled(), layer=2)
    audit.build_index(SMALL)
    audit.rank(*WANTED, options=FROM_INDEX)
    audit.rank(*WANTED, options=EXACT)
    return root


@pytest.fixture
def audit(indexed, tmp_path):
    return Audit(shutil.copytree(indexed, tmp_path / "small"))


def by_row(audit, options=FROM_INDEX, concept="tone"):
    return audit.rank(concept, "concept_influence", options=options).set_index("example_id").sort_index()


def test_first_rows_and_control_have_exact_scores_and_the_rest_its_order(audit):
    before, truth = by_row(audit), by_row(audit, EXACT)
    number = audit.rankings.find(*WANTED, FROM_INDEX).id
    assert not before["exact"].any() and truth["exact"].all()
    assert audit.rankings.refinement(*WANTED, FROM_INDEX) is None
    told = audit.refine(*WANTED, FROM_INDEX)
    after = by_row(audit)
    # The queries of a probe are typed: no row is one.
    first = before.sort_values("rank").index[:100]
    assert after.loc[first, "exact"].all() and after["exact"].sum() == 150 == told["exact"]
    scale = truth["score"].abs().max()
    exact = after["exact"]
    assert after["score"][exact].to_numpy() == pytest.approx(
        truth["score"][exact].to_numpy(), rel=1e-3, abs=1e-4 * scale
    )
    rest = before[~exact].sort_values("rank")
    assert after["score"][rest.index].is_monotonic_decreasing and after["rank"][rest.index].is_monotonic_increasing
    assert after["score"][~exact].nunique() == before["score"][~exact].nunique()
    assert after["rank"].tolist() == after["score"].rank(ascending=False, method="first").tolist()
    assert after["percentile"].to_numpy() == pytest.approx(100 * after["score"].rank(pct=True, method="max"))
    assert audit.rankings.find(*WANTED, FROM_INDEX).id == number
    assert told == audit.rankings.refinement(*WANTED, FROM_INDEX) and told["done"]
    # What the exact stage has left to the index is at most what it says it has.
    best = set(truth.sort_values("rank").index[:50])
    (fifty,) = (each for each in told["recall"] if each["top"] == 50)
    assert fifty["low"] - 1 <= len(best & set(after.index[exact])) <= fifty["high"] + 1


def test_the_store_and_the_table_say_which_scores_are_exact(audit):
    audit.refine(*WANTED, FROM_INDEX)
    found = audit.query(
        "SELECT parameters->>'engine' AS engine, exact, count(*) AS n FROM scores WHERE concept_id = 'probe:tone' "
        "AND method = 'concept_influence' GROUP BY ALL ORDER BY engine, exact"
    )
    assert found["n"].tolist() == [150, 150, 300] and found["exact"].tolist() == [False, True, True]
    assert audit.query("SELECT bool_and(exact) AS all_of FROM scores WHERE method = 'vector_filter'")["all_of"].all()
    assert audit.query("SELECT * FROM scores LIMIT 1").columns[-1] == "exact"
    table = audit.rankings.table(*WANTED, options=FROM_INDEX)
    assert list(table)[-2:] == ["is_query", "exact"] and table["exact"].sum() == 150


class Killed(BaseException):
    pass


def test_a_refinement_that_is_killed_goes_on_where_it_was(audit, monkeypatch, tmp_path):
    whole = Audit(shutil.copytree(audit.root, tmp_path / "whole"))
    whole.refine(*WANTED, FROM_INDEX)
    real, scored = ShardStore.write_tensors, []

    def failing(self, path, *rest):
        if path.parent.name == "exact" and path.stem == "000002":
            raise Killed
        real(self, path, *rest)

    monkeypatch.setattr(ShardStore, "write_tensors", failing)
    with pytest.raises(Killed):
        audit.refine(*WANTED, FROM_INDEX)
    told = audit.rankings.refinement(*WANTED, FROM_INDEX)
    assert told["scored"] == 100 and told["wanted"] == 150 and not told["done"]
    half = by_row(audit)
    assert half["exact"].sum() == 100
    monkeypatch.setattr(ShardStore, "write_tensors", real)
    score = stage.score_rows

    def counted(lm, layers, queries, rows, **more):
        scored.append(len(rows))
        return score(lm, layers, queries, rows, **more)

    monkeypatch.setattr(stage, "score_rows", counted)
    again = Audit(audit.root)
    assert again.refine(*WANTED, FROM_INDEX)["done"] and scored == [50]
    assert by_row(again).equals(by_row(whole))
    assert again.refine(*WANTED, FROM_INDEX)["done"] and scored == [50]


def test_two_who_refine_the_same_ranking_score_its_rows_once(audit, monkeypatch):
    others = Audit(shutil.copytree(audit.root, audit.root.with_name("others")))
    others.refine(*WANTED, FROM_INDEX)
    score, scored = stage.score_rows, []

    def counted(lm, layers, queries, rows, **more):
        scored.append(len(rows))
        return score(lm, layers, queries, rows, **more)

    monkeypatch.setattr(stage, "score_rows", counted)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda each: each.refine(*WANTED, FROM_INDEX), (audit, Audit(audit.root))))
    assert scored == [50, 50, 50] and both[0] == both[1] and both[0]["done"]
    assert by_row(audit).equals(by_row(others))


def test_a_ranking_that_is_thrown_away_meanwhile_leaves_no_plan(audit, monkeypatch):
    ensure = audit.rankings.ensure

    def gone(*asked):
        number = ensure(*asked)
        audit.opened.derive(lambda cursor: drop_rankings(cursor, [number]))
        return number

    with monkeypatch.context() as patch:
        patch.setattr(audit.rankings, "ensure", gone)
        with pytest.raises(RankingGoneError, match="ask again"):
            audit.refine(*WANTED, FROM_INDEX)
    assert audit.refine(*WANTED, FROM_INDEX)["scored"] == 150


def test_the_index_s_own_scores_are_never_taken_from_a_refined_ranking(audit):
    told = audit.refine(*WANTED, FROM_INDEX)
    after = by_row(audit)
    number = audit.rankings.find(*WANTED, FROM_INDEX).id
    # Another computation of the same ranking, after its scores were thrown away with what was kept of them.
    audit.opened.derive(lambda cursor: cursor.execute("UPDATE base.refinements SET details = '{\"done\": false}'"))
    audit.opened.layout.shards.remove("influence", f"{number:016x}")
    again = audit.refine(*WANTED, FROM_INDEX)
    assert again["slope"] == pytest.approx(told["slope"], rel=1e-5)
    assert by_row(audit)["score"].to_numpy() == pytest.approx(after["score"].to_numpy(), rel=1e-5)


def test_rows_that_are_queries_keep_their_scores_by_the_others(audit):
    audit.rank("sae:3", "concept_influence", options=EXACT)
    audit.refine("sae:3", "concept_influence", FROM_INDEX)
    truth, found = by_row(audit, EXACT, "sae:3"), by_row(audit, FROM_INDEX, "sae:3")
    queries = found["is_query"]
    assert queries.sum() >= 8 and found["exact"][queries].all()
    scale = truth["score"].abs().max()
    assert found["score"][queries].to_numpy() == pytest.approx(truth["score"][queries], rel=1e-3, abs=1e-4 * scale)


def test_unit_normalised_scores_are_refined_as_such(audit):
    options = [each.changed(unit_normalised=True) for each in (FROM_INDEX, EXACT)]
    audit.refine(*WANTED, options[0])
    found, truth = (by_row(audit, each) for each in options)
    exact = found["exact"]
    assert exact.sum() == 150
    scale = truth["score"].abs().max()
    assert found["score"][exact].to_numpy() == pytest.approx(truth["score"][exact], rel=1e-3, abs=1e-4 * scale)


def test_token_influences_of_rows_that_were_scored_are_not_computed_again(audit, monkeypatch):
    from concept_audit.pipeline import kept_queries

    audit.refine(*WANTED, FROM_INDEX)
    rows = audit.rank(*WANTED, top=5, options=FROM_INDEX)
    monkeypatch.setattr(kept_queries, "score_rows", lambda *_, **__: pytest.fail("scored again"))
    ids = rows["example_id"].tolist()
    assert set(audit.rows.influence_heatmaps(*WANTED, ids, FROM_INDEX)) == set(ids)
    exact = audit.rows.exact_scores(*WANTED, ids, FROM_INDEX)
    assert [exact[i] for i in ids] == pytest.approx(rows["score"].tolist(), rel=1e-4)


def mislead(audit):
    """Give the index's scores to other rows."""
    number = audit.rankings.find(*WANTED, FROM_INDEX).id
    right = audit.opened.read(lambda cursor: ranking_scores(cursor, number, 300))
    wrong = np.random.default_rng(0).permutation(right)
    audit.opened.derive(
        lambda cursor: cursor.executemany(
            "UPDATE base.ranking_scores SET score = ? WHERE ranking_id = ? AND example_id = ?",
            [[float(score), number, i] for i, score in enumerate(wrong)],
        )
    )


def found_of_fifty(audit):
    """How many of the true first fifty have exact scores."""
    best = np.argsort(-by_row(audit, EXACT)["score"].to_numpy())[:50]
    return int(by_row(audit)["exact"].to_numpy()[best].sum())


@pytest.mark.parametrize("further", [0.0, 1.0])
def test_an_index_that_is_wrong_is_told_to_have_missed_rows(audit, monkeypatch, further):
    monkeypatch.setattr(stage, "FURTHER_SHARE", further)
    mislead(audit)
    told, truth = audit.refine(*WANTED, FROM_INDEX), by_row(audit, EXACT)["score"]
    (fifty,) = (each for each in told["recall"] if each["top"] == 50)
    found, scored = found_of_fifty(audit), 150 + 100 * int(further)
    # Scores that say nothing find of the true top what they find of all rows.
    assert abs(found - 50 * scored / 300) < 10 and fifty["value"] < 45
    assert fifty["low"] <= found <= fifty["high"]
    assert told["done"] and told["scored"] == told["wanted"] == scored and told["selected"] == scored - 50
    assert told["spearman"]["low"] < 0.3
    # Nothing but the order is left of them.
    after = by_row(audit)
    assert after["score"][~after["exact"]].std() < 0.5 * truth.std()


def test_further_rows_are_scored_until_the_true_top_is_thought_to_be_found(audit, monkeypatch, tmp_path):
    mislead(audit)
    whole = Audit(shutil.copytree(audit.root, tmp_path / "whole"))
    whole.refine(*WANTED, FROM_INDEX)
    exact, saved = stage.exact_scores, []

    def stopped(sources, ranking, planned, progress):
        for done, scores in exact(sources, ranking, planned, progress):
            yield done, scores
            saved.append((done, audit.rankings.refinement(*WANTED, FROM_INDEX)))
            if done == 200:
                raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("concept_audit.audit.refinements.exact_scores", stopped)
        audit.refine(*WANTED, FROM_INDEX)
    assert [(done, told["scored"], told["wanted"], told["done"]) for done, told in saved[-2:]] == [
        (150, 150, 200, False),
        (200, 200, 250, False),
    ]
    assert "200 of 250" in audit.refinements.in_words(*WANTED, FROM_INDEX)
    assert audit.refine(*WANTED, FROM_INDEX)["done"] and by_row(audit).equals(by_row(whole))


def test_rankings_that_are_exact_anyway_have_no_second_stage(audit):
    assert audit.refine("tone", "vector_filter") is None and audit.refine(*WANTED, EXACT) is None
    assert audit.rankings.refinement("tone", "vector_filter") is None


def test_read_only_nothing_is_scored(audit):
    sealed = Audit(audit.root, read_only=True)
    assert sealed.refine(*WANTED, FROM_INDEX) is None
    assert sealed.refine(*WANTED, InfluenceOptions.of(engine="index")) is None


def test_a_plan_takes_the_first_rows_then_the_control_then_the_others():
    scores = np.r_[np.arange(20_000.0), np.nan]
    order = np.argsort(-scores[:-1])
    plan = stage.Plan(scores, order[:600], order[700:1000])
    further = [*order[600:700], *order[1000:1500]]
    assert np.concatenate(plan.pieces).tolist() == [*order[:50], *order[700:1000], *order[50:600], *further]
    assert {len(piece) for piece in plan.pieces} == {50}
    assert plan.steps() == [1, 7, 11, 17, 18, 21, 25, 29, 30]
    assert [plan.wanted(rows) for rows in (0, 50, 900, 1050, 1500)] == [900, 900, 1050, 1250, 1500]
    few = stage.Plan(scores[order[:30]], np.arange(30), order[:0])
    assert few.steps() == [1] and not len(few.further)


def test_no_further_rows_are_wanted_where_the_index_is_right():
    y = np.random.default_rng(0).normal(size=5000)
    plan = stage.Plan.of(y + 1e-3, lambda among, wanted: np.flatnonzero(among)[:wanted])
    exact = np.full(len(y), np.nan)
    certain = [*plan.selected, *plan.control]
    exact[certain] = y[certain]
    assert len(plan.selected) == 150 and not plan.enough(exact, 224) and plan.enough(exact, 225)


def test_calibration_is_robust_rising_and_of_the_control_alone():
    rng = np.random.default_rng(0)
    y = rng.standard_t(3, 400)
    x = 3 * y + rng.normal(size=400)
    exact = np.full(400, np.nan)
    exact[:300] = y[:300]
    exact[399] = 1e6
    x[398] = np.nan
    found, line = merged(x, exact, np.arange(300))
    assert line.slope == pytest.approx(1 / 3, abs=0.05) and line.intercept == pytest.approx(0, abs=0.15)
    assert np.isnan(found[398]) and found[399] == 1e6 and (found[:300] == y[:300]).all()
    assert calibration(-x[:60], y[:60]).slope > 0
    assert calibration(x[:4], y[:4]).slope == 1


@pytest.mark.parametrize("noise", [0.2, 1.0])
@pytest.mark.parametrize("heavy", [False, True])
def test_recall_is_told_within_its_interval(noise, heavy):
    inside = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        truth = rng.standard_t(4, 2000) if heavy else rng.normal(size=2000)
        guess = 2 * (truth + noise * rng.normal(size=2000)) + 3
        order = np.argsort(-guess)
        scored = np.r_[order[:100], rng.choice(order[100:], 50, replace=False)]
        exact = np.full(2000, np.nan)
        exact[scored] = truth[scored]
        told = recall(guess, exact, 50, seed)
        found = len({*np.argsort(-truth)[:50]} & {*scored})
        assert told.low <= told.value <= told.high <= 50
        inside += told.low - 0.5 <= found <= told.high + 0.5
    assert inside >= 8
