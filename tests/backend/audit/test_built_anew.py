"""An audit that is open while its files change: built anew, or rid of what can be computed again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from concept_audit import Audit, BuildOptions, LabelledExample, Message, ModelOptions, RowFilter, StoreError, build
from concept_audit.audit import rankings as module
from concept_audit.store.layout import Layout
from concept_audit.store.manifest import read_manifest
from tests.conftest import chat_rows, write_jsonl


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_directory):
    """The options of a small audit without an SAE, which has a probe."""
    place = tmp_path_factory.mktemp("anew")
    options = BuildOptions(
        data=str(write_jsonl(place / "rows.jsonl", chat_rows(24))),
        out=place / "audit",
        model=ModelOptions(str(model_directory), device="cpu"),
        layers=(1, 2),
        sae="none",
    )
    build(options)
    train(Audit(options.out, device="cpu"))
    return options


@pytest.fixture
def options(made, tmp_path):
    """The options of a copy that a test may change."""
    shutil.copytree(made.out, tmp_path / "audit")
    return BuildOptions(**{**vars(made), "out": tmp_path / "audit"})


@pytest.fixture
def audit(options):
    return Audit(options.out, device="cpu")


def train(audit: Audit, swapped: bool = False) -> None:
    rows = audit.rows.list(limit=16)
    texts = [tuple(Message(m["role"], m["content"]) for m in json.loads(text)) for text in rows["messages"]]
    examples = [LabelledExample(text, (i + swapped) % 2) for i, text in enumerate(texts)]
    audit.train_probe("tone", examples, layer=2, fits=["difference_of_means"])


def rebuilt(options: BuildOptions, rows: list[dict]) -> None:
    write_jsonl(options.out.parent / "other.jsonl", rows)
    build(BuildOptions(**{**vars(options), "data": str(options.out.parent / "other.jsonl"), "rebuild": True}))


def test_an_audit_that_is_built_anew_while_it_is_open_shows_the_new_rows(audit, options):
    before = audit.rank("tone")
    audit.rows.heatmaps("tone", [0, 1])
    rebuilt(options, chat_rows(30, seed=5))
    assert audit.overview().n_rows == 30 == len(audit.rank("tone"))
    assert audit.rank("tone")["prompt"].tolist() != before["prompt"].tolist()
    assert set(audit.rows.heatmaps("tone", [29])) == {29}
    scores = audit.opened.read(lambda cursor: cursor.execute("SELECT count(*) FROM scores").fetchone())
    assert scores == (30,)


def test_a_ranking_of_rows_that_are_no_more_is_not_kept_for_those_that_are(audit, options, monkeypatch):
    compute = module.scores_of

    def while_it_is_built_anew(*arguments):
        scores = compute(*arguments)
        rebuilt(options, chat_rows(24, seed=5))
        return scores

    with monkeypatch.context() as patched:
        patched.setattr(module, "scores_of", while_it_is_built_anew)
        with pytest.raises(StoreError, match="built anew while its rows were ranked.* ask for it again"):
            audit.rank("tone")
    fresh = Audit(options.out, device="cpu").rank("tone")
    assert audit.rank("tone")["score"].tolist() == fresh["score"].tolist()


@pytest.mark.parametrize("stage", ["_rows", "_store"])
def test_an_abandoned_rebuild_is_not_shown_as_either_audit(audit, options, monkeypatch, stage):
    audit.flags.set(["h"], "remove")
    with monkeypatch.context() as patched:
        patched.setattr(
            f"concept_audit.pipeline.build._Build.{stage}", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            rebuilt(options, chat_rows(30, seed=5))
    for ask in (lambda: Audit(options.out), lambda: audit.rows.list(), lambda: audit.rank("tone"), audit.overview):
        with pytest.raises(StoreError, match="not finished.*stopped midway.*same `concept-audit build` again"):
            ask()
    rebuilt(options, chat_rows(30, seed=5))
    assert audit.overview().n_rows == 30
    assert audit.opened.read(lambda cursor: cursor.execute("SELECT count(*) FROM base.flags").fetchone()) == (1,)


def test_a_model_that_the_audit_is_built_anew_with_is_the_one_that_runs(audit, options):
    first = audit.model()
    manifest = read_manifest(options.out / "manifest.json")
    manifest.fingerprints["model"] = "another"
    manifest.write(Layout(options.out))
    with pytest.raises(StoreError, match="made with a model of fingerprint another"):
        audit.model()
    manifest.fingerprints["model"] = first.fingerprint
    manifest.write(Layout(options.out))
    assert audit.model().fingerprint == first.fingerprint


def test_a_probe_that_is_deleted_and_trained_again_has_nothing_of_the_one_before(audit):
    before = audit.rank("tone")
    maps = audit.rows.heatmaps("tone", [0])
    ranking = audit.rankings.find("tone", "vector_filter").id
    audit.probes.delete("tone")
    train(audit, swapped=True)
    (probe,) = audit.probes.list()
    assert probe.version == 2
    assert audit.rankings.find("tone", "vector_filter").id != ranking
    assert audit.rank("tone")["score"].tolist() == pytest.approx((-before["score"]).tolist()[::-1], abs=1e-5)
    assert audit.rows.heatmaps("tone", [0]) != maps


def test_a_ranking_that_ends_when_its_probe_has_been_trained_again_is_said_to_be_old(audit, monkeypatch):
    said = []
    monkeypatch.setattr(audit.opened.progress, "say", said.append)
    compute = module.scores_of

    def while_it_is_trained_again(*arguments):
        monkeypatch.setattr(module, "scores_of", compute)
        scores = compute(*arguments)
        train(audit, swapped=True)
        audit.rank("tone")
        return scores

    monkeypatch.setattr(module, "scores_of", while_it_is_trained_again)
    audit.rankings.ensure("tone")
    assert any("trained again meanwhile; this ranking is of version 1, the present one is 2" in text for text in said)
    per_row = audit.query("SELECT example_id, count(*) AS n FROM scores WHERE concept_id = 'probe:tone' GROUP BY 1")
    assert set(per_row["n"]) == {1} and len(per_row) == 24


def test_a_ranking_that_is_thrown_away_between_two_looks_is_computed_again(audit, options, monkeypatch):
    expected = audit.rank("tone")["score"].tolist()
    ensure, thrown = audit.rankings.ensure, []

    def and_throw_away(*arguments, **more):
        found = ensure(*arguments, **more)
        if len(thrown) < 2:
            thrown.append((options.out / "derived.duckdb").unlink())
        return found

    monkeypatch.setattr(audit.rankings, "ensure", and_throw_away)
    assert audit.rank("tone", where=RowFilter())["score"].tolist() == expected
    thrown.clear()
    changed = audit.flags.set_matching(RowFilter(), "review", "tone", top=5)
    assert changed.n_texts == 5
    thrown.clear()
    other = ("tone", "bm25", module.DEFAULTS)
    assert audit.comparisons.agreement(("tone", "vector_filter", module.DEFAULTS), other).n_rows == 24


def test_a_bound_of_next_to_nothing_slows_down_and_breaks_nothing(audit, options):
    small = Audit(options.out, device="cpu", derived_bytes=1)
    one, other = (("tone", method, module.DEFAULTS) for method in ("vector_filter", "bm25"))
    assert small.comparisons.agreement(one, other).n_rows == 24
    assert len(small.rank("tone")) == 24 == len(small.rank("tone", "bm25"))
    assert np.isfinite(small.rank("tone")["score"]).all()


def test_a_bound_comes_from_the_environment(audit, options, monkeypatch):
    monkeypatch.setenv("CONCEPT_AUDIT_DERIVED_BYTES", "12345")
    assert Audit(options.out).opened.sources().derived_bytes == 12345
    monkeypatch.setenv("CONCEPT_AUDIT_DERIVED_BYTES", "much")
    with pytest.raises(StoreError, match="CONCEPT_AUDIT_DERIVED_BYTES=much: give a number"):
        Audit(options.out)


def test_a_cache_that_cannot_be_written_costs_time_and_not_the_answer(audit, monkeypatch):
    def refuses(*arguments):
        raise StoreError("the disk is full")

    audit.rank("tone")
    expected = audit.rows.heatmaps("tone", [3])
    with audit.opened.database.deriving() as cursor:
        cursor.execute("DELETE FROM base.token_projections")
    monkeypatch.setattr(audit.opened.database, "deriving", refuses)
    assert audit.rows.heatmaps("tone", [3]) == expected


def test_flagging_does_not_make_the_labels_of_others_forgotten(audit):
    audit.labels.counts()
    other = audit.opened.database
    with other.writing() as cursor:
        cursor.execute("INSERT INTO base.probe_skips VALUES ('tone', 'x')")
    audit.flags.set(["h1"], "remove")
    assert audit.labels.counts().set_index("probe").loc["tone", "skipped"] == 1
