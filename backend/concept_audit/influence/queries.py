"""Query gradients: what a concept, or the loss on query examples, asks of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from concept_audit.errors import ConceptError
from concept_audit.influence.curvature import LayerCurvature
from concept_audit.model.batches import Batch, batches_by_length, padded
from concept_audit.model.budgets import gradient_tokens_per_batch
from concept_audit.model.exact import at_exact_device
from concept_audit.model.gradients import GradientPass, ResidualTarget, Visit, response_span, supervised
from concept_audit.model.linear import LinearLayer
from concept_audit.model.load import LanguageModel
from concept_audit.model.precision import wide_product

LENGTH_MULTIPLE = 16
"""Batches are padded to a multiple of this many tokens."""
Gradients = list[torch.Tensor]
"""One matrix [out, in] for each tracked layer."""


@dataclass(frozen=True)
class Rows:
    """Rows as tokens.

    Attributes:
        ids: one int array [tokens] a row.
        response: one bool array [tokens] a row: the tokens that the loss sees.
    """

    ids: Sequence[np.ndarray]
    response: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def spans(self) -> list[int]:
        """Tokens of each row up to its last response token; what follows changes no gradient."""
        return [response_span(mask) for mask in self.response]

    @property
    def scorable(self) -> list[int]:
        """Places of the rows that have a response token to predict, and so a loss."""
        return [i for i, mask in enumerate(self.response) if mask[1:].any()]

    def batch(self, chosen: Sequence[int], lm: LanguageModel) -> Batch:
        """Some rows, cut at their spans, as a model takes them."""
        spans = {i: response_span(self.response[i]) for i in chosen}
        ids = {i: self.ids[i][:span] for i, span in spans.items()}
        response = {i: self.response[i][:span] for i, span in spans.items()}
        return padded(chosen, ids, response, lm.device, LENGTH_MULTIPLE, lm.positions)


class Quantity(Protocol):
    """Something of which each row has a value, with a gradient."""

    def __call__(self, run: GradientPass, batch: Batch, visit: Visit) -> torch.Tensor:
        """Values [rows] of a batch; their gradients go to `visit`."""


@dataclass(frozen=True)
class Loss:
    """L(z): the mean negative log-likelihood of a row's response tokens."""

    def __call__(self, run: GradientPass, batch: Batch, visit: Visit) -> torch.Tensor:
        return run.losses(batch, visit)


@dataclass(frozen=True)
class NegatedConcept:
    """−f(z): minus the mean of a target over a row's response tokens, which falls as the concept grows."""

    target: ResidualTarget

    def __call__(self, run: GradientPass, batch: Batch, visit: Visit) -> torch.Tensor:
        return -run.values(batch, self.target, lambda i, a, delta: visit(i, a, -delta))


def query_gradient(
    lm: LanguageModel,
    layers: Sequence[LinearLayer],
    quantity: Quantity,
    rows: Rows,
    weights: Sequence[float],
    budget: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> Gradients:
    """∇θ Σ_q weight_q · quantity(q), for every tracked layer.

    Args:
        rows: the query examples.
        weights: one a row; 1/n each for the mean of n, of both signs for a contrast.
        budget: tokens a batch, padding included; chosen by the device if None.
        advance: told the number of rows as they are done.

    Returns:
        matrices [out, in], in float32 or wider, on the model's device.

    Raises:
        ConceptError: a query has no response tokens, or its value is not finite.
    """
    spans = rows.spans
    for number, span in enumerate(spans, start=1):
        if span == 0:
            raise ConceptError(
                f"query {number} has no response tokens, so there is nothing to attribute; give it an assistant "
                "turn within the first tokens that the model takes"
            )
    wide = lm.wide_dtype
    total = [torch.zeros(layer.d_out, layer.d_in, dtype=wide, device=lm.device) for layer in layers]
    with GradientPass(lm, layers) as run:
        for chosen in batches_by_length(spans, budget or gradient_tokens_per_batch(lm)):
            batch = rows.batch(chosen, lm)
            scale = torch.tensor([weights[i] for i in chosen], dtype=wide, device=lm.device)[:, None, None]

            def add(index: int, a: torch.Tensor, delta: torch.Tensor, scale: torch.Tensor = scale) -> None:
                scaled = (delta * scale.to(delta)).flatten(0, 1)
                total[index] += wide_product(scaled.T, a.flatten(0, 1), wide)

            values = quantity(run, batch, add)
            for place, value in zip(chosen, values.tolist(), strict=True):
                if not np.isfinite(value):
                    why = (
                        "it has no token to predict"
                        if not supervised(batch).any()
                        else "the model's numbers overflow on it"
                    )
                    raise ConceptError(f"query {place + 1} has a value that is not finite ({why}); leave it out")
            advance(len(chosen))
    return total


def precondition(gradients: Gradients, curvatures: Callable[[int], LayerCurvature], damping: float) -> Gradients:
    """(H + λI)⁻¹ applied layer by layer.

    Args:
        curvatures: the curvature of a tracked layer, by its index; asked for one at a time.
        damping: λ as a share of the layer's mean eigenvalue.
    """
    return [curvatures(i).solve(gradient, damping) for i, gradient in enumerate(gradients)]


class PreparedQueries(Protocol):
    """One or several query gradients, ready to score rows with.

    Attributes:
        count: how many queries.
        retained: the share of the squared norm that is kept of each, [queries].
    """

    count: int
    retained: np.ndarray

    def token_scores(self, index: int, a: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """δ_tᵀ G a_t of one layer for every token and query: [rows, tokens, queries]."""

    def operations(self, layers: Sequence[LinearLayer]) -> int:
        """Multiplications a token, all layers together."""


class DenseQueries:
    """Query gradients as they are.

    Args:
        queries: one list of matrices a query.
        dtype: in which they are multiplied with inputs.

    Attributes:
        matrices: one tensor [queries, out, in] a layer.
    """

    def __init__(self, queries: Sequence[Gradients], dtype: torch.dtype):
        self._take([torch.stack(same).to(dtype) for same in zip(*queries, strict=True)])

    @classmethod
    def kept(cls, matrices: list[torch.Tensor]) -> DenseQueries:
        """From the `matrices` of earlier ones."""
        made = cls.__new__(cls)
        made._take(matrices)
        return made

    def _take(self, matrices: list[torch.Tensor]) -> None:
        self.matrices = matrices
        self.count = len(matrices[0])
        self.retained = np.ones(self.count)

    def token_scores(self, index: int, a: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        # One query at a time: the products of all would take `count` times the room of δ.
        matrices = self.matrices[index].to(a.dtype)
        return torch.stack([inner_product(torch.nn.functional.linear(a, G), delta) for G in matrices], dim=-1)

    def operations(self, layers: Sequence[LinearLayer]) -> int:
        return self.count * sum(layer.d_in * layer.d_out for layer in layers)


class LowRankQueries:
    """Query gradients as G ≈ U Vᵀ, the best approximation of that rank layer by layer.

    A gradient has at most as many independent directions as its queries have tokens;
    with curvature the rest is small. What is lost is told by `retained`.

    Args:
        queries: one list of matrices a query.
        rank: columns of U and V for each query; less where a layer is narrower.
        dtype: in which they are multiplied with inputs.
        seed: of the randomised factorisation.
    """

    def __init__(self, queries: Sequence[Gradients], rank: int, dtype: torch.dtype, seed: int = 0):
        self.count = len(queries)
        kept = np.zeros(self.count)
        whole = np.zeros(self.count)
        self.factors: list[tuple[torch.Tensor, torch.Tensor]] = []
        for i in range(len(queries[0])):
            left, right = [], []
            for number, query in enumerate(queries):
                U, V = truncated(query[i], rank, seed)
                left.append(U)
                right.append(V)
                # V has orthogonal columns, so ‖U Vᵀ‖² is the sum over columns.
                kept[number] += float((U.square().sum(0) * V.square().sum(0)).sum())
                whole[number] += float(query[i].square().sum())
            self.factors.append((torch.cat(left, 1).to(dtype), torch.cat(right, 1).to(dtype)))
        self.retained = np.divide(kept, whole, out=np.ones(self.count), where=whole > 0)

    def token_scores(self, index: int, a: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        U, V = (factor.to(a.dtype) for factor in self.factors[index])
        columns = (delta @ U) * (a @ V)
        return columns.unflatten(-1, (self.count, -1)).sum(-1, dtype=sum_dtype(columns))

    def operations(self, layers: Sequence[LinearLayer]) -> int:
        return sum(len(U) * U.shape[1] + len(V) * V.shape[1] for U, V in self.factors)


def truncated(matrix: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation U Vᵀ of a matrix, by a randomised singular value decomposition.

    Halko, Martinsson & Tropp 2011, algorithm 4.4, with 8 spare directions and two power iterations.

    Returns:
        U [out, k] with orthonormal columns times singular values, V [in, k] with orthonormal
        columns, where k = min(rank, out, in).
    """
    device, matrix = matrix.device, at_exact_device(matrix)
    k = min(rank, *matrix.shape)
    spare = min(k + 8, *matrix.shape)
    generator = torch.Generator(matrix.device).manual_seed(seed)
    start = torch.randn(matrix.shape[1], spare, dtype=matrix.dtype, device=matrix.device, generator=generator)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    U, values, Vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return ((basis @ U[:, :k]) * values[:k]).to(device), Vt[:k].T.contiguous().to(device)


def inner_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """⟨left, right⟩ along the last dimension; overwrites `left`."""
    product = left.mul_(right)
    return product.sum(-1, dtype=sum_dtype(product))


def sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    """In which numbers of a tensor are summed: float32, or its own dtype if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)
