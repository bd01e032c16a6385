"""What the index's agreement with exact scores is measured on: nothing that its projection has learned from."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from concept_audit import Audit, BuildOptions, CurvatureOptions, IndexOptions, ModelOptions, build
from concept_audit.influence import scoring
from concept_audit.influence.fidelity import difference_of_means
from concept_audit.influence.learning import Learner
from concept_audit.model.load import LanguageModel
from concept_audit.pipeline.index import fidelity as stage
from concept_audit.pipeline.index import query as index_query
from concept_audit.progress import Progress
from tests.conftest import chat_rows, write_jsonl

# More concepts to learn from than rows that may teach: each of these does.
SMALL = IndexOptions(row_bytes=512, samples=240, curvature=CurvatureOptions(curvature_tokens=500), precision="bfloat16")


FEW = IndexOptions(row_bytes=512, samples=48, curvature=CurvatureOptions(curvature_tokens=500), precision="float32")
OLD = ("rows", "concepts", "spearman", "spearman_least", "top", "overlap", "overlap_least", "damping")


def same_tokens(rows) -> set[tuple[int, ...]]:
    return {tuple(ids.tolist()) for ids in rows.ids}


def watched_build(root, patch) -> SimpleNamespace:
    """Build an index, noting the rows that learn and those that measure."""
    seen = SimpleNamespace(learned=set(), scored=set(), sources=set(), targets=[], dtypes=set())
    sides, components = Learner.sides, Learner.numbers
    solved, score = index_query.OpenIndex.solved, stage.score_rows_for_many
    activations = getattr(stage, "response_activations", None)

    def learning(self, rows, asked):
        seen.learned |= same_tokens(rows)
        return sides(self, rows, asked)

    def learning_more(self, bases, rows, own, numbers, asked, *more):
        seen.learned |= same_tokens(rows) | same_tokens(own)
        seen.asked = asked
        return components(self, bases, rows, own, numbers, asked, *more)

    def asking(self, target, damping, group):
        seen.targets.append(target)
        seen.sources |= same_tokens(target.queries)
        return solved(self, target, damping, group)

    def scoring(lm, layers, queries, rows, **more):
        seen.scored |= same_tokens(rows)
        seen.dtypes |= {lm.dtype, *(query.dtype for query in queries)}
        return score(lm, layers, queries, rows, **more)

    def averaging(lm, ids, *more):
        seen.sources |= {tuple(row.tolist()) for row in ids}
        seen.dtypes.add(lm.dtype)
        return activations(lm, ids, *more)

    patch.setattr(Learner, "sides", learning)
    patch.setattr(Learner, "numbers", learning_more)
    patch.setattr(index_query.OpenIndex, "solved", asking)
    patch.setattr(stage, "score_rows_for_many", scoring)
    patch.setattr(stage, "response_activations", averaging, raising=False)
    seen.audit = Audit(root)
    seen.told = seen.audit.build_index(SMALL)["fidelity"]
    return seen


@pytest.fixture(scope="module")
def watched(built, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield watched_build(shutil.copytree(built, tmp_path_factory.mktemp("fidelity") / "small"), patch)


def test_no_row_that_measures_has_taught_the_projection(watched):
    assert watched.scored and watched.sources
    assert not watched.learned & watched.scored
    assert not watched.learned & watched.sources
    # Nor is a row scored on a concept that comes from it.
    assert not watched.scored & watched.sources
    # 299 rows of different content: the rest is learned from.
    assert len(watched.learned) == 299 - watched.told["held_out"] > 200
    assert watched.told["rows"] == len(watched.scored) > 30


def test_concepts_are_of_the_kinds_that_people_ask_for(watched):
    told = watched.told
    assert told["sae_directions"] + told["row_mean_differences"] == told["concepts"] == len(watched.targets)
    assert told["sae_directions"] == told["row_mean_differences"] == 3
    features = watched.audit.concepts.features()["feature_id"]
    decoders = np.stack([watched.audit.concept(f"sae:{f}").direction for f in features])
    directions = [target.quantity.target.direction for target in watched.targets]
    nearest = [float(np.abs(decoders @ v).max()) for v in directions]
    assert nearest[:3] == pytest.approx([1, 1, 1], abs=1e-5) and max(nearest[3:]) < 0.999
    assert len({v.tobytes() for v in directions}) == 6
    for v in directions:
        assert np.linalg.norm(v) == pytest.approx(1, abs=1e-5)


def test_the_projection_learns_from_the_kinds_that_are_asked_and_from_none_that_measures(watched):
    features = watched.audit.concepts.features()["feature_id"]
    decoders = np.stack([watched.audit.concept(f"sae:{f}").direction for f in features])
    sae_layer = watched.audit.manifest.configuration["sae_layer"]
    measured = [target.quantity.target.direction for target in watched.targets]
    assert set(watched.asked) == set(watched.audit.index.describe()["layers"])
    for layer, directions in watched.asked.items():
        drawn = np.isnan(directions).all(1)
        given = directions[~drawn]
        assert np.isfinite(given).all() and np.linalg.norm(given, axis=1) == pytest.approx(1, abs=1e-5)
        assert drawn.sum() >= SMALL.samples / 3 and len(given) >= SMALL.samples / 4
        of_features = np.abs(given @ decoders.T).max(1) > 1 - 1e-5
        assert of_features.any() == (layer == sae_layer) and not of_features.all()
        for v in measured:
            assert (given @ v).max() < 1 - 1e-5


def test_exact_scores_are_of_float32_whatever_the_index_is_of(watched):
    assert watched.dtypes == {torch.float32} and watched.told["precision"] == "float32"
    assert watched.audit.index.describe()["precision"] == "bfloat16"


def test_the_sentence_says_what_was_measured_on(watched):
    told, words = watched.told, watched.audit.index.agreement()
    assert f"{told['rows']} rows that the projection has not learned from" in words
    assert "3 SAE directions and 3 differences of row means" in words and "curvature" in words


@pytest.fixture(scope="module")
def without_sae(model_directory, tmp_path_factory):
    """Audits of a few rows without an SAE, by how many there are."""

    def made(count: int) -> Audit:
        home = tmp_path_factory.mktemp(f"rows-{count}")
        data = write_jsonl(home / "rows.jsonl", chat_rows(count))
        model = ModelOptions(str(model_directory), device="cpu")
        options = BuildOptions(data=str(data), out=home / "audit", model=model, layers=(1, 2), sae="none")
        return Audit(build(options))

    return made


def test_without_an_sae_differences_of_row_means_are_what_is_measured_with(without_sae):
    audit = without_sae(72)
    told = audit.build_index(FEW)["fidelity"]
    assert told["sae_directions"] == 0 and told["row_mean_differences"] == 6
    assert told["held_out"] == 18 and told["rows"] == 9 and np.isfinite(told["spearman"])
    assert "6 differences of row means" in audit.index.agreement()
    assert "SAE" not in audit.index.agreement()


def test_of_too_few_rows_nothing_is_claimed(without_sae):
    audit = without_sae(12)
    told = audit.build_index(FEW)["fidelity"]
    assert told["held_out"] == 0 and told["spearman"] is None
    assert "not measured" in audit.index.agreement()


def test_an_index_of_an_earlier_version_does_not_claim_unseen_rows(watched, monkeypatch):
    old = {**watched.audit.index.describe()}
    old["fidelity"] = {name: old["fidelity"][name] for name in OLD}
    monkeypatch.setattr(watched.audit.index, "describe", lambda: old)
    assert "may have learned from" in watched.audit.index.agreement()


def test_the_figures_do_not_depend_on_how_much_is_held_at_a_time(watched, monkeypatch):
    sources, about = watched.audit.opened.sources(), watched.audit.index.describe()
    held = stage.hold_out(sources.shards("tokens"), about["seed"])
    monkeypatch.setattr(stage, "QUERY_BYTES", 1)
    monkeypatch.setattr(scoring, "ROW_GRADIENT_BYTES", 1)
    asked = []
    solved = index_query.OpenIndex.solved

    def asking(self, target, damping, group):
        asked.append([layer.block for layer in group.layers])
        return solved(self, target, damping, group)

    monkeypatch.setattr(index_query.OpenIndex, "solved", asking)
    told = stage.measure_fidelity(sources, about, held, Progress())
    numbers = ("rows", "concepts", "spearman", "spearman_least", "overlap", "overlap_least")
    assert [told[n] for n in numbers] == pytest.approx([watched.told[n] for n in numbers], rel=1e-6)
    assert all(len(set(blocks)) == 1 for blocks in asked) and len({blocks[0] for blocks in asked}) == 3


def test_where_float32_finds_no_room_the_precision_told_is_the_index_s(watched, monkeypatch):
    def full(self, dtype):
        if dtype == torch.float32:
            raise torch.OutOfMemoryError("full")
        return narrow

    sources, about = watched.audit.opened.sources(), watched.audit.index.describe()
    narrow = sources.model().in_dtype(torch.bfloat16)
    monkeypatch.setattr(LanguageModel, "in_dtype", full)
    held = stage.hold_out(sources.shards("tokens"), about["seed"])
    assert stage.measure_fidelity(sources, about, held, Progress())["precision"] == "bfloat16"


def test_a_copy_in_float32_is_made_only_if_it_leaves_most_of_the_memory_free(watched, monkeypatch):
    lm = watched.audit.opened.sources().model()
    narrow = lm.in_dtype(torch.bfloat16)
    numbers = sum(parameter.numel() for parameter in lm.model.parameters())
    for free, has_room in ((10.1 * numbers, True), (9.9 * numbers, False)):
        monkeypatch.setattr(stage, "free_bytes", lambda device, free=free: free)
        assert stage.copy_has_room(narrow) is has_room
        assert stage.copy_has_room(lm), "in float32 it is no copy"
    monkeypatch.setattr(stage, "copy_has_room", lambda lm: False)
    monkeypatch.setattr(type(lm), "in_dtype", lambda self, dtype: narrow if dtype == torch.bfloat16 else self)
    told = []
    monkeypatch.setattr(Progress, "say", lambda self, text: told.append(text))
    about = watched.audit.index.describe()
    with stage._exact_model(watched.audit.opened.sources(), about, Progress()) as exact:
        assert exact.dtype == torch.bfloat16
    assert "No room for the model in float32" in told[0]


def test_rows_that_are_alike_and_what_tells_them_from_the_others():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(10, 6)).astype(np.float32)
    means[[2, 5, 7]] += [20, 0, 0, 0, 0, 0]
    alike, direction = difference_of_means(means, 5, 3)
    others = [i for i in range(10) if i not in (2, 5, 7)]
    expected = means[[2, 5, 7]].mean(0) - means[others].mean(0)
    assert alike[0] == 5 and sorted(alike) == [2, 5, 7]
    assert direction == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)
