"""The gradient index: against exact scores, resuming, what it refuses, and the rankings it gives."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from concept_audit import Audit, ConceptError, CurvatureOptions, IndexOptions, InfluenceOptions, StoreError
from concept_audit.cli import main
from concept_audit.influence.curvature import LayerCurvature
from concept_audit.influence.queries import NegatedConcept, Rows
from concept_audit.influence.targets import Projection
from concept_audit.pipeline.index import build as index_build
from concept_audit.pipeline.index import query as index_query
from concept_audit.pipeline.index.codes import Codes
from concept_audit.progress import Progress
from concept_audit.store.index import IndexFiles, present_index, products, sweep
from concept_audit.store.layout import Layout
from concept_audit.store.packing import Packing
from concept_audit.store.partition import RowPartition
from concept_audit.store.shard_store import ShardStore, read_tensors
from tests.backend.influence.test_attribution import labelled

SMALL = IndexOptions(
    row_bytes=4096, samples=120, curvature=CurvatureOptions(curvature_tokens=4_000), precision="float32"
)
FROM_INDEX = InfluenceOptions.of(engine="index")
NEW = ("layers", "kinds", "factors")
"""What the sides of an index did not say before layers were chosen."""
EXACT = InfluenceOptions.of(engine="exact", curvature_tokens=4_000, precision="float32")


@pytest.fixture(scope="module")
def indexed_once(built, tmp_path_factory):
    root = shutil.copytree(built, tmp_path_factory.mktemp("index") / "small")
    audit = Audit(root)
    audit.train_probe("tone", labelled(), layer=2)
    audit.build_index(SMALL)
    return root


@pytest.fixture
def audit(indexed_once, tmp_path):
    return Audit(shutil.copytree(indexed_once, tmp_path / "small"))


def files_of(audit) -> IndexFiles:
    return present_index(Layout(audit.root), RowPartition(300))


def by_row(audit, concept, method, options):
    return audit.rank(concept, method, options=options).sort_values("example_id")["score"].to_numpy()


def test_it_ranks_as_exact_scores_do(audit):
    told = audit.index.describe()["fidelity"]
    assert told["spearman"] > 0.9 and told["spearman_least"] > 0.8
    exact = by_row(audit, "tone", "concept_influence", EXACT)
    guess = by_row(audit, "tone", "concept_influence", FROM_INDEX)
    assert spearmanr(exact, guess).statistic > 0.9
    # Not only the order: the index estimates the score itself.
    assert np.polyfit(guess, exact, 1)[0] == pytest.approx(1, abs=0.25)
    top = set(np.argsort(-exact)[:30]) & set(np.argsort(-guess)[:30])
    assert len(top) >= 20


def test_numbers_are_kept_of_few_layers_and_norms_of_all(audit):
    about, files = audit.index.describe(), files_of(audit)
    assert 0 < len(about["chosen"]) < about["tracked"]
    projected = {name.split(".")[0] for block in (1, 2, 3) for name in read_tensors(files.projection(block))}
    assert len(projected) == len(about["chosen"]) == len(about["kept"])
    few = files.norms(3)
    audit.build_index(dataclasses.replace(SMALL, agreement=1.0), replace=True)
    whole = audit.index.describe()
    assert len(whole["chosen"]) == whole["tracked"] == about["tracked"]
    np.testing.assert_allclose(few, files_of(audit).norms(3), rtol=1e-5)


def test_an_index_is_at_hand_where_its_model_takes_little_memory(audit, monkeypatch):
    opened = Audit(audit.root)
    needs = opened.index.describe()["model_bytes"]
    assert needs == sum(parameter.nbytes for parameter in audit.model().model.parameters())
    for free, at_hand in ((4 * needs, True), (4 * needs - 1, False)):
        monkeypatch.setattr("concept_audit.audit.index.free_bytes", lambda device, free=free: free)
        assert opened.index.at_hand() is at_hand
    opened.model()
    assert opened.index.at_hand()
    monkeypatch.setattr(opened.index, "describe", lambda: None)
    assert not opened.index.at_hand()


def test_an_index_from_before_layers_were_chosen_still_answers(audit):
    audit.build_index(dataclasses.replace(SMALL, agreement=1.0), replace=True)
    now = by_row(audit, "tone", "concept_influence", FROM_INDEX)
    before = Audit(shutil.copytree(audit.root, audit.root.with_name("before")))
    files = files_of(before)
    described = {k: v for k, v in files.describe().items() if k not in ("agreement", "chosen", "tracked")}
    sides = read_tensors(files.sides)
    files.rows.store.write_tensors(files.sides, {name: sides[name] for name in sides if name not in NEW})
    files.write_description(described)
    again = by_row(before, "tone", "concept_influence", FROM_INDEX)
    np.testing.assert_array_equal(again, now)
    with pytest.raises(StoreError, match=r"agreement None, asked for 0.95"):
        before.build_index(SMALL)


def test_a_concept_above_all_kept_layers_is_refused_or_scored_exactly(audit):
    files = files_of(audit)
    files.write_description({**files.describe(), "chosen": {"a layer": 3}})
    with pytest.raises(ConceptError, match="keeps no layer that a concept at layer 2 depends on"):
        audit.rank("tone", "concept_influence", options=FROM_INDEX)
    assert len(audit.rank("tone", "concept_influence", options=InfluenceOptions.of(curvature_tokens=4_000))) == 300


@pytest.mark.parametrize("agreement", [0, 1.01, float("nan")])
def test_an_agreement_that_no_layers_can_have_is_refused(audit, agreement):
    with pytest.raises(ConceptError, match="--agreement"):
        audit.build_index(dataclasses.replace(SMALL, agreement=agreement), replace=True)


def test_few_bytes_a_row_agree_with_exact_scores(audit):
    audit.build_index(dataclasses.replace(SMALL, row_bytes=256), replace=True)
    found = [
        spearmanr(by_row(audit, name, "concept_influence", EXACT), by_row(audit, name, "concept_influence", FROM_INDEX))
        for name in ("tone", *audit.concepts.spread(4))
    ]
    assert np.mean([each.statistic for each in found]) > 0.9, found


def test_an_index_that_was_coded_otherwise_is_refused(audit):
    files = files_of(audit)
    files.write_description({name: value for name, value in files.describe().items() if name != "coding"})
    with pytest.raises(StoreError, match="earlier version, which coded the numbers of rows otherwise"):
        audit.rank("tone", "concept_influence", options=FROM_INDEX)


def test_all_numbers_and_no_code_give_exact_scores(audit, uncoded):
    """With every number of every layer kept, the index is a change of coordinates."""
    audit.build_index(dataclasses.replace(SMALL, row_bytes=10**9, agreement=1.0), replace=True)
    exact = by_row(audit, "tone", "concept_influence", EXACT)
    guess = by_row(audit, "tone", "concept_influence", FROM_INDEX)
    assert np.abs(exact - guess).max() <= 1e-3 * np.abs(exact).max()


def test_many_concepts_in_one_sweep_are_what_each_is_alone(audit):
    features = audit.concepts.spread(5)
    together = Audit(shutil.copytree(audit.root, audit.root.with_name("together")))
    together.rank_many([*features, "tone"], options=FROM_INDEX)
    for name in (*features, "tone"):
        assert together.rankings.has(name, "concept_influence", FROM_INDEX)
        alone, beside = (by_row(a, name, "concept_influence", FROM_INDEX) for a in (audit, together))
        assert np.abs(alone - beside).max() <= 1e-5 * np.abs(alone).max()


def test_influence_functions_and_contrasts_come_from_the_index_too(audit):
    for method, change in (
        ("influence_function", {}),
        ("concept_influence", {"contrast": True}),
        ("concept_influence", {"damping": 1.0}),
    ):
        least = 0.5 if method == "influence_function" else 0.7
        guess = by_row(audit, "tone", method, FROM_INDEX.changed(**change))
        block = {"blocks": (1, 3)} if method == "influence_function" else {}
        exact = by_row(audit, "tone", method, EXACT.changed(**change, **block))
        assert spearmanr(exact, guess).statistic > least, (method, change)


def test_unit_normalised_means_the_same_with_and_without_the_index(audit):
    """Norms over the blocks that the concept reaches, 1 and 2, though the index has a third."""

    def scores(options):
        return tuple(
            by_row(audit, "tone", "concept_influence", options.changed(unit_normalised=unit)) for unit in (False, True)
        )

    (exact, exact_unit), (guess, guess_unit) = scores(EXACT), scores(FROM_INDEX)
    np.testing.assert_allclose(guess / guess_unit, exact / exact_unit, rtol=1e-4)
    assert spearmanr(exact_unit, guess_unit).statistic >= spearmanr(exact, guess).statistic - 0.03
    assert spearmanr(exact_unit, guess_unit).statistic > 0.9


def test_the_index_answers_unless_exactness_or_what_it_cannot_do_is_asked_for(audit):
    def engine(method="concept_influence", **options):
        return audit.rankings.find("tone", method, InfluenceOptions.of(**options)).request.index is not None

    assert engine() and engine(damping=0.5) and engine(contrast=True) and engine(curvature_tokens=4_000)
    assert not engine(engine="exact") and not engine(curvature="identity") and not engine(blocks=(1, 1))
    assert not engine("influence_function") and engine("influence_function", engine="index")
    assert not engine("gradient_dot") and not engine(rank=4) and not engine(seed=1)
    with pytest.raises(ConceptError, match="does not serve --curvature identity, --rank 4"):
        engine(engine="index", curvature="identity", rank=4)


def test_chosen_rows_are_scored_exactly_on_demand(audit):
    rows = audit.rank("tone", "concept_influence", top=20, options=FROM_INDEX)["example_id"].tolist()
    found = audit.rows.exact_scores("tone", "concept_influence", rows, FROM_INDEX)
    exact = by_row(audit, "tone", "concept_influence", EXACT)
    assert [found[i] for i in rows] == pytest.approx(exact[rows], rel=1e-3, abs=1e-3 * np.abs(exact).max())
    maps = audit.rows.influence_heatmaps("tone", "concept_influence", rows, FROM_INDEX)
    assert len(maps) == 20


class Killed(BaseException):
    pass


def test_a_killed_build_goes_on_where_it_was(audit, monkeypatch, tmp_path):
    expected = [path.read_bytes() for path in files_of(audit).paths()]
    before = by_row(audit, "tone", "concept_influence", FROM_INDEX)
    again = Audit(shutil.copytree(audit.root, tmp_path / "again"))
    shutil.rmtree(files_of(again).root)
    real = ShardStore.write_tensors
    for victim in ("projection-0002", "sides", "000000", "000001"):

        def failing(self, path, *rest, victim=victim):
            if path.stem == victim and "index" in path.parts:
                raise Killed
            real(self, path, *rest)

        monkeypatch.setattr(ShardStore, "write_tensors", failing)
        with pytest.raises(Killed):
            again.build_index(SMALL)
        assert again.index.describe() is None
        with pytest.raises(StoreError, match="no gradient index yet"):
            again.rankings.ensure("tone", "concept_influence", FROM_INDEX)
    monkeypatch.setattr(ShardStore, "write_tensors", real)
    again.build_index(SMALL)
    assert [path.read_bytes() for path in files_of(again).paths()] == expected
    assert by_row(again, "tone", "concept_influence", FROM_INDEX) == pytest.approx(before)
    assert again.index.progress() is None


def test_an_index_whose_check_was_killed_answers_and_the_next_run_measures(audit, monkeypatch):
    expected = audit.index.describe()
    files = files_of(audit)
    files.write_description({**expected, "done": False})

    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(index_build, "measure_fidelity", killed)
        with pytest.raises(Killed):
            audit.build_index(SMALL)
    cut_short = Audit(audit.root)
    assert "fidelity" not in cut_short.index.describe()
    assert "not measured yet" in cut_short.index.agreement()
    assert len(cut_short.rank("tone", "concept_influence", options=FROM_INDEX.changed(damping=3.0))) == 300

    def still_answers(*arguments):
        assert files.describe()["done"]
        return expected["fidelity"]

    monkeypatch.setattr(index_build, "measure_fidelity", still_answers)
    assert cut_short.build_index(SMALL) == expected == files.describe()


@pytest.mark.parametrize("harm", ["deleted", "cut off", "short"])
def test_a_shard_that_is_lost_is_noticed_and_made_again_by_the_same_command(audit, harm):
    before = by_row(audit, "tone", "concept_influence", FROM_INDEX)
    files, other = files_of(audit), InfluenceOptions.of(engine="index", damping=5.0)
    expected = [path.read_bytes() for path in files.paths()]
    path = files.rows.path(0)
    if harm == "deleted":
        path.unlink()
    elif harm == "cut off":
        path.write_bytes(expected[0][:-100])
    else:
        about = {name: tensor[:200].contiguous() for name, tensor in read_tensors(path).items()}
        dataclasses.replace(files.rows, partition=RowPartition(200)).write_tensors(0, about)
    with pytest.raises(StoreError, match="000000.*absent or damaged.*`concept-audit index .*makes what is missing"):
        audit.rankings.ensure("tone", "concept_influence", other)
    audit.build_index(SMALL)
    assert [path.read_bytes() for path in files.paths()] == expected
    audit.train_probe("tone", labelled(), layer=2)  # so that its rankings are computed once more
    np.testing.assert_array_equal(by_row(audit, "tone", "concept_influence", FROM_INDEX), before)


def test_an_index_of_something_else_is_refused(audit):
    files = files_of(audit)
    about = files.describe()
    for name in ("model", "data"):
        files.write_description({**about, name: "0000"})
        with pytest.raises(StoreError, match=f"of another {name}.*concept-audit index"):
            audit.rankings.ensure("tone", "concept_influence", FROM_INDEX)
    files.write_description({name: value for name, value in about.items() if name != "norms"})
    with pytest.raises(StoreError, match="--unit-normalised; build it again with `concept-audit index .*--exact"):
        audit.rankings.ensure("tone", "concept_influence", FROM_INDEX.changed(unit_normalised=True))
    either = InfluenceOptions.of(unit_normalised=True)
    assert audit.rankings.find("tone", "concept_influence", either).request.index is None
    assert audit.rankings.find("tone", "concept_influence", FROM_INDEX).request.index is not None
    files.write_description({**about, "blocks": [1, 1]})
    with pytest.raises(ConceptError, match="deeper than the gradient index.*--layers 2"):
        audit.rankings.ensure("tone", "concept_influence", FROM_INDEX)
    files.description.write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        audit.rankings.ensure("tone", "concept_influence", FROM_INDEX)


def test_a_query_without_gradient_says_so(audit):
    nowhere = NegatedConcept(Projection(2, np.zeros(32, np.float32)))
    target = index_query.Target(nowhere, Rows([np.arange(3, 20)], [np.arange(17) > 4]), [1.0], 2)
    with pytest.raises(ConceptError, match="no gradient on its query examples"):
        index_query.index_scores(audit.opened.sources(), audit.index.describe(), [target], 1.0, Progress())


def test_options_that_make_no_sense(audit):
    with pytest.raises(ConceptError, match="--bytes 0.*--damping -1"):
        audit.build_index(IndexOptions(row_bytes=0, curvature=CurvatureOptions(damping=-1)))


def test_the_command_line_builds_and_reads_it(audit, capsys, tmp_path):
    shutil.rmtree(files_of(audit).root)
    out = tmp_path / "ranked.csv"
    command = ["rank", str(audit.root), "--concept", "tone", "--method", "concept_influence", "--out", str(out)]
    assert main([*command, "--index"]) == 1
    assert "concept-audit index" in capsys.readouterr().err
    assert main(["index", str(audit.root), "--bytes", "2048", "--samples", "60", "--curvature-tokens", "3000"]) == 0
    told = capsys.readouterr().err
    assert "300 rows × 2 KiB" in told and "minutes from the start" in told and "Spearman" in told
    assert main([*command, "--index", "--index-only"]) == 0 and not pd.read_csv(out)["exact"].any()
    assert "All scores are the gradient index's; none is exact." in capsys.readouterr().err
    assert main([*command, "--index", "--exact"]) == 1 and main([*command, "--index-only", "--exact"]) == 1
    assert "--exact and --index-only: choose one of them" in capsys.readouterr().err
    assert main(command) == 0
    told, table = capsys.readouterr().err, pd.read_csv(out)
    assert "Exact scores, best rows first" in told and "150 rows have exact scores, among them the first" in told
    assert "Of the true top 50 about" in told and "(95% interval" in told and "Spearman correlation" in told
    assert list(table)[-2:] == ["is_query", "exact"] and table["exact"].sum() == 150
    first = int(told.split("among them the first ")[1].split(".")[0])
    assert table["exact"][:first].all() and not table["exact"][first]
    assert main(["info", str(audit.root)]) == 0
    about = audit.index.describe()
    layers = f"{len(about['chosen'])} of {about['tracked']} layers"
    assert f"index    2 KiB a row, {layers}, blocks 1 to 3" in capsys.readouterr().out


def test_groups_tell_means_with_intervals(audit):
    table = audit.groups("tone", "vector_filter", "topic")
    rows = audit.rows.list()
    scores = audit.rank("tone").set_index("example_id")["score"]
    for group in table.itertuples():
        mine = scores[rows[rows["metadata"].str.contains(group.group)]["example_id"]]
        assert group.n_rows == len(mine) and group.mean == pytest.approx(mine.mean())
        assert group.low < group.mean < group.high
    assert table["mean"].is_monotonic_decreasing and set(table["group"]) == {"rivers", "money"}
    features = audit.groups("tone", "concept_influence", "sae_feature", FROM_INDEX, beside="vector_filter")
    assert (features["n_rows"] >= 3).all() and features["beside_mean"].notna().all()
    assert audit.groups("tone", "vector_filter", "source")["n_rows"].tolist() == [300]
    audit.flags.set(rows["content_hash"].tolist()[:7])
    assert set(audit.groups("tone", "vector_filter", "flag")["group"]) == {"remove", "not flagged"}
    with pytest.raises(ConceptError, match="no such metadata field"):
        audit.groups("tone", "vector_filter", "colour")
    with pytest.raises(ConceptError, match="it has 300 values"):
        audit.groups("tone", "vector_filter", "number")


def test_a_sweep_reads_rows_of_any_shard(audit):
    files = files_of(audit)
    paths, packing = files.paths(), Codes.read(files).packing
    assert 4090 <= packing.row_bytes <= 4096
    queries = np.random.default_rng(0).normal(size=(packing.numbers, 3)).astype(np.float32)
    offsets = np.array([0.0, 3.0, -20.0])
    found = np.concatenate(list(sweep(paths, queries, packing, offsets)))
    from safetensors import safe_open

    for number, path in enumerate(paths):
        with safe_open(path, "pt") as file:
            codes, scales = file.get_tensor("codes"), file.get_tensor("scales").numpy()
        mine = found[number * 256 : number * 256 + len(codes)]
        values = packing.unpack(codes, torch.empty(len(codes), packing.numbers, dtype=torch.float64)).numpy()
        expected = (values @ queries + offsets) * scales[:, None]
        assert np.abs(mine - expected).max() <= 1e-4 * np.abs(expected).max()
    chosen = [299, 0, 255, 256]
    some = products(files, chosen, queries, packing, offsets)
    assert np.abs(some - found[chosen]).max() <= 1e-4 * np.abs(found).max()


def test_solving_in_the_eigenbasis_is_what_the_index_takes_apart(audit):
    """⟨X, Y⟩ of whitened gradient and query is the exact influence, for any damping."""
    torch.manual_seed(1)
    Q_A, Q_S = torch.linalg.qr(torch.randn(6, 6)).Q, torch.linalg.qr(torch.randn(4, 4)).Q
    c = LayerCurvature(Q_A, Q_S, torch.rand(4, 6) + 0.1, torch.rand(6) + 0.1, torch.rand(4) + 0.1)
    G, q = torch.randn(4, 6), torch.randn(4, 6)
    s, a = c.output_values.sqrt()[:, None], c.input_values.sqrt()[None]
    X = (Q_S.T @ G @ Q_A) / s / a
    Y = (Q_S.T @ q @ Q_A) / (c.eigenvalues + 0.3 * c.eigenvalues.mean()) * s * a
    assert (X * Y).sum().item() == pytest.approx((G * c.solve(q, 0.3)).sum().item(), rel=1e-4)


@pytest.mark.parametrize("counts", [(64, 0, 0), (30, 20, 56)])
def test_integer_products_of_the_sweep_are_those_of_floats(tmp_path, counts):
    from safetensors.torch import save_file

    from concept_audit.store import index as store

    rng = np.random.default_rng(0)
    packing = Packing(counts)
    codes = torch.from_numpy(rng.integers(-127, 128, (300, packing.row_bytes)).astype(np.int8))
    queries = (rng.normal(size=(packing.numbers, 3)) * [1, 1e-6, 0]).astype(np.float32)
    path = tmp_path / "codes.safetensors"
    save_file({"codes": codes, "scales": torch.full((300,), 0.5)}, path)
    values = packing.unpack(codes, torch.empty(300, packing.numbers, dtype=torch.float64)).numpy()
    truth = 0.5 * values @ queries.astype(np.float64)
    (found,) = store.sweep([path], queries, packing)
    plain = store._float_product(queries, packing, store.CPU)(codes).numpy() * 0.5
    assert np.allclose(plain, truth, rtol=1e-5, atol=1e-4 * np.abs(truth).max(0))
    assert np.abs(found - truth).max(0) == pytest.approx(0, abs=2e-4 * np.abs(truth).max())
    assert np.corrcoef(found[:, 1], truth[:, 1])[0, 1] > 0.999999
