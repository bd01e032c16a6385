"""Curvature of wide sides: leading eigenvectors and the mean of the rest, against matrices written out."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from concept_audit import Audit, ModelError, StoreError
from concept_audit.influence import curvature
from concept_audit.influence.curvature import Eigenbasis, LayerCurvature
from concept_audit.influence.fitting import Fisher, SquaredGradients, accumulate
from concept_audit.influence.projection import Sides, query_maps, row_maps
from concept_audit.influence.wide import leading_eigenbasis, orthonormal
from concept_audit.model.linear import linear_layers
from concept_audit.pipeline import curvature as stage
from concept_audit.store.index import present_index
from concept_audit.store.layout import Layout
from concept_audit.store.partition import RowPartition
from concept_audit.store.shard_store import ShardStore
from tests.backend.influence.test_attribution import labelled
from tests.backend.influence.test_brute_force import BruteForce, close, model, rows
from tests.backend.influence.test_index import EXACT, FROM_INDEX, SMALL, by_row

OUT, IN = 9, 7
DAMPING = 0.5


def basis(n: int, kept: int, seed: int) -> Eigenbasis:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q[:, :kept]
    values = torch.rand(kept + (kept < n), generator=generator, dtype=torch.float64) + 0.1
    return Eigenbasis(vectors, values)


@pytest.fixture(params=[(4, 3), (OUT, 3), (4, IN), (OUT, IN)], ids=["both wide", "in wide", "out wide", "none"])
def layer(request) -> LayerCurvature:
    outputs, inputs = basis(OUT, request.param[0], 1), basis(IN, request.param[1], 2)
    generator = torch.Generator().manual_seed(3)
    shape = len(outputs.values), len(inputs.values)
    values = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.01
    return LayerCurvature(inputs.vectors, outputs.vectors, values, inputs.values, outputs.values)


def projectors(side: Eigenbasis) -> list[torch.Tensor]:
    """q qᵀ of each kept vector, and what they leave out."""
    found = [torch.outer(q, q) for q in side.vectors.T]
    return found if side.complete else [*found, torch.eye(len(side.vectors)).double() - sum(found)]


def written_out(layer: LayerCurvature) -> torch.Tensor:
    """H from its definition: [out × in, out × in]."""
    found = torch.zeros(OUT * IN, OUT * IN, dtype=torch.float64)
    for i, P_S in enumerate(projectors(layer.output_basis)):
        for j, P_A in enumerate(projectors(layer.input_basis)):
            found += layer.eigenvalues[i, j] * torch.kron(P_S, P_A)
    return found


def solved(layer: LayerCurvature, gradient: torch.Tensor) -> torch.Tensor:
    H = written_out(layer)
    damped = H + DAMPING * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    return torch.linalg.solve(damped, gradient.reshape(-1)).reshape(OUT, IN)


def vectors(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_the_inverse_is_that_of_the_matrix_written_out(layer):
    gradient = vectors(OUT, IN)
    close(layer.solve(gradient, DAMPING), solved(layer, gradient), 1e-9)
    assert layer.solve(torch.stack([gradient] * 2), DAMPING).shape == (2, OUT, IN)


def test_a_token_s_share_is_that_of_the_solved_gradient(layer):
    a, delta, a_query, delta_query = vectors(5, IN), vectors(5, OUT), vectors(6, IN), vectors(6, OUT)
    wanted = ((delta @ solved(layer, delta_query.T @ a_query)) * a).sum(-1)
    close(layer.token_products(a, delta, a_query, delta_query, DAMPING), wanted, 1e-9)


def test_rows_and_queries_between_the_sides_give_the_influence(layer):
    """⟨X, Y⟩ = ⟨G_z, (H + λI)⁻¹ q⟩ where no direction is left out."""
    whole = Sides(torch.linalg.qr(vectors(OUT, OUT)).Q, torch.linalg.qr(vectors(IN, IN)).Q)
    row, query = vectors(OUT, IN), vectors(OUT, IN).flip(0)
    left, right = row_maps(layer, whole)
    between = layer.between(*query_maps(layer, whole), lambda L, R: L.T @ query @ R, DAMPING)
    wanted = (row * solved(layer, query)).sum()
    assert float(((left.T @ row @ right) * between).sum()) == pytest.approx(float(wanted), rel=1e-6)


def test_covariances_are_whitened_with_the_mean_of_what_is_left_out(layer):
    side = layer.output_basis
    S = sum(value * P for value, P in zip(side.values, projectors(side), strict=True))
    assert side.mean == pytest.approx(float(S.diagonal().mean()))
    left, _ = row_maps(layer, Sides(torch.eye(OUT).double(), torch.eye(IN).double()))
    close(left.T @ S @ left, torch.eye(OUT), 1e-3)
    weighted = side.inward(side.values, torch.float64)(torch.eye(OUT).double())
    close(weighted @ weighted.T, S @ S, 1e-9)


def test_eigenvalues_are_means_of_squared_gradients():
    lm, data = model("llama"), rows()
    layers = linear_layers(lm, 2, 2)
    brute = BruteForce(lm, layers, data)
    into, out = {0: 6, 3: 6}, {0: 5, 6: 5}
    bases = []
    for i, layer in enumerate(layers):
        # Layers that read the same input have one basis of it.
        Q_A = basis(layer.d_in, into.get(layer.source, layer.d_in), layer.source).vectors
        bases.append((Q_A, basis(layer.d_out, out.get(i, layer.d_out), 9 + i).vectors))
    squares = SquaredGradients(layers, bases)
    accumulate(lm, layers, squares, data, list(map(str, range(len(data)))), Fisher("empirical"), budget=64)
    gradients = [brute.loss_gradient(i) for i in range(len(data))]
    again = SquaredGradients.of(layers, squares.tensors())
    for i, (Q_A, Q_S) in enumerate(bases):
        G = torch.stack([gradient[i] for gradient in gradients])
        sides = [projectors(Eigenbasis(Q, torch.ones(Q.shape[1] + (Q.shape[1] < len(Q))).double())) for Q in (Q_S, Q_A)]
        wanted = torch.tensor(
            [
                [float((L @ G @ R).square().sum()) / len(G) / float(L.trace() * R.trace()) for R in sides[1]]
                for L in sides[0]
            ]
        )
        close(again.eigenvalues(i), wanted, 1e-5)


def test_leading_eigenvectors_and_the_mean_of_the_rest():
    n, kept = 300, 40
    Q = torch.linalg.qr(vectors(n, n)).Q
    values = 2.0 ** -torch.arange(n).double().div(5)
    M = (Q * values) @ Q.T
    found = leading_eigenbasis(M.float(), kept)
    assert found.vectors.dtype == torch.bfloat16 and found.values.dtype == torch.float32
    close(found.values[:kept], values[:kept], 1e-3)
    assert float(found.values[-1]) == pytest.approx(float(values[kept:].mean()), rel=0.02)
    exact = orthonormal(found.vectors, torch.float32).double()
    close(exact.T @ exact, torch.eye(kept), 1e-4)
    assert torch.trace(exact.T @ M @ exact) >= 0.999 * values[:kept].sum()
    flat = leading_eigenbasis(torch.eye(n), kept)
    assert flat.values.numpy() == pytest.approx(np.ones(kept + 1), abs=1e-5)
    nothing = leading_eigenbasis(torch.zeros(n, n), kept)
    assert not nothing.values.any() and torch.isfinite(nothing.vectors).all()
    with pytest.raises(ModelError, match="overflow"):
        leading_eigenbasis(torch.full((n, n), torch.nan), kept)


@pytest.fixture
def narrow(monkeypatch):
    """Sides of more than 33 numbers are wide: those of the MLP."""
    monkeypatch.setattr(curvature, "WIDE", 33)
    monkeypatch.setattr(curvature, "KEPT", 24)


@pytest.fixture
def audit(built, tmp_path):
    found = Audit(shutil.copytree(built, tmp_path / "small"))
    found.train_probe("tone", labelled(), layer=2)
    return found


def test_an_index_with_wide_sides_is_built_and_ranks_as_exact_scores_do(audit, narrow, monkeypatch):
    audit.build_index(SMALL)
    about = audit.index.describe()
    assert about["wide_sides"] == "24 leading eigenvectors of those wider than 33"
    assert about["fidelity"]["spearman"] > 0.9
    exact, guess = (by_row(audit, "tone", "concept_influence", options) for options in (EXACT, FROM_INDEX))
    assert np.corrcoef(exact, guess)[0, 1] > 0.9
    (path,) = (audit.root / "shards" / "curvature").glob("*/block-0001.safetensors")
    kept = stage.read_tensors(path)
    wide = {name: tensor for name, tensor in kept.items() if name.endswith("vectors") and len(tensor) == 64}
    assert len(wide) == 3 and all(t.shape[1] == 24 and t.dtype == torch.bfloat16 for t in wide.values())
    # What an earlier version kept of the same layers is of another form: it is neither read nor taken for ours.
    files = present_index(Layout(audit.root), RowPartition(300))
    files.write_description({name: value for name, value in about.items() if name != "wide_sides"})
    with pytest.raises(StoreError, match="another form.*--replace"):
        audit.rankings.ensure("tone", "concept_influence", FROM_INDEX.changed(damping=3.0))
    monkeypatch.setattr(curvature, "WIDE", 2048)
    whole = by_row(audit, "tone", "concept_influence", EXACT.changed(damping=9.0))
    assert len(list((audit.root / "shards" / "curvature").glob("*/block-0001.safetensors"))) == 2
    assert np.isfinite(whole).all()


def test_in_bfloat16_layers_with_one_wide_side_are_learned_as_well(audit, narrow):
    """Numbers of the wide side come in float32 then, and those of the other in bfloat16."""
    audit.build_index(dataclasses.replace(SMALL, precision="bfloat16"))
    assert audit.index.describe()["fidelity"]["spearman"] > 0.9
    exact, guess = (by_row(audit, "tone", "concept_influence", options) for options in (EXACT, FROM_INDEX))
    assert np.corrcoef(exact, guess)[0, 1] > 0.9


@pytest.mark.parametrize(("room", "reads"), [(1 << 30, 3), (0, 6)], ids=["all fit", "none fits"])
def test_factors_that_fit_are_read_once_for_all_concepts(tmp_path, monkeypatch, room, reads):
    layers = linear_layers(model("llama"), 1, 3)
    files = stage.CurvatureFiles(stage.ShardSet(ShardStore(tmp_path), "curvature", "key", stage.ListedPartition(())))
    for block in (1, 2, 3):
        tensors: dict[str, torch.Tensor] = {}
        for layer in layers:
            if layer.block == block:
                for side, width in (("inputs", layer.d_in), ("outputs", layer.d_out)):
                    tensors |= {f"{layer.name}.{side}.vectors": torch.eye(width, 5).bfloat16()}
                    tensors |= {f"{layer.name}.{side}.values": torch.arange(6.0).flip(0)}
                tensors[f"{layer.name}.eigenvalues"] = torch.ones(6, 6)
        files.shards.store.write_tensors(files.block(block), tensors)
    read = []
    real = stage.read_tensors
    monkeypatch.setattr(stage, "read_tensors", lambda path, device: read.append(path) or real(path, device))
    monkeypatch.setattr(stage, "GROUP_BYTES_CPU", room)
    of_layer = stage.curvature_of(files, layers, "kfac", torch.device("cpu"))
    for _ in range(2):
        for i, layer in enumerate(layers):
            found = of_layer(i)
            assert found.inputs.shape == (layer.d_in, 5) and found.inputs.dtype == torch.float32
            close(found.eigenvalues, curvature.kfac_eigenvalues(found.input_basis, found.output_basis))
    assert len(read) == reads
