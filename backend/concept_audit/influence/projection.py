"""Compressed gradients: some ten thousand numbers a row, from which any concept's influence follows.

The influence of row z on a query with gradient q is ⟨G_z, (H + λI)⁻¹ q⟩. In a layer
with EK-FAC eigenvectors Q_A, Q_S and Kronecker eigenvalues a, s it is ⟨X, Y⟩ for any
positive scales, with

    X = diag(s)^-½ Q_Sᵀ G_z Q_A diag(a)^-½             what a row keeps: whitened
    Y = diag(s)^½ [(Q_Sᵀ q Q_A) / (Λ + λ)] diag(a)^½   what a query asks: nothing dropped of H⁻¹

X is close to white, so the directions that count are those of Y: the projection is
learned from the gradients of concepts drawn at random, on rows of the data.

1. **Two sides.** U and V, the leading eigenvectors of the second moments of Y's
   columns and rows: Uᵀ X V has `left` × `right` numbers. For a row that is Σ_t (Lδ_t)(Ra_t)ᵀ
   with L and R small, cheaper than one exact score.
2. **Few layers**, whose scores together stand for those of all (`concept_audit.influence.layer_choice`).
3. **Bits.** The numbers between the sides are kept as they are, each in as many bits as it is worth
   (`concept_audit.influence.coding`): by E[x²] E[y²], what it carries of a score's variance. Most take none,
   and so layers get unequal shares.

Two-sided projections of gradients are those of LoGra (Choe et al. 2024, arXiv
2405.13954); whitening before compressing, and learning the directions from concept
targets, are this project's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from concept_audit.influence.curvature import Eigenbasis, LayerCurvature
from concept_audit.influence.queries import Gradients, Rows
from concept_audit.influence.scoring import SquaredNorms
from concept_audit.model.batches import Batch, batches_by_length, halving
from concept_audit.model.budgets import gradient_tokens_per_batch
from concept_audit.model.gradients import GradientPass, Visit
from concept_audit.model.linear import LinearLayer
from concept_audit.model.load import LanguageModel

LEFT, RIGHT = 384, 64
"""Directions kept of a layer's output and of its input; of the numbers between them few are kept."""
FLOOR = 1e-4
"""Eigenvalues count as this share of their mean at least, so that whitening stays finite."""


@dataclass(frozen=True)
class LayerProjection:
    """The projection of one layer's gradients.

    Attributes:
        row_left: L [out, left], to multiply δ with.
        row_right: R [in, right], to multiply a with.
        query_left: [out, left] in the own coordinates of the curvature's side.
        query_right: [in, right], likewise.
        places: int64 [kept], which of the left × right numbers between the sides are kept.
    """

    row_left: torch.Tensor
    row_right: torch.Tensor
    query_left: torch.Tensor
    query_right: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True)
class Sides:
    """The two-sided bases of one layer: U [out, left] and V [in, right] in whitened coordinates,
    which are turned as the own coordinates of the curvature's sides are."""

    left: torch.Tensor
    right: torch.Tensor


@dataclass(frozen=True)
class CompressedRow:
    """A row of the index.

    Attributes:
        index: its place among the rows.
        numbers: float32 [kept numbers]; NaN where the row has no loss.
        squares: float32 [blocks], ‖∇θL(z)‖² over the tracked layers of each block, Euclidean as in
            `score_rows`: a concept's norm is the root of the sum over the blocks that it reaches. NaN where
            the row has no loss, and of preference pairs.
    """

    index: int
    numbers: np.ndarray
    squares: np.ndarray


@dataclass(frozen=True)
class RowConcepts:
    """One direction a row, of unit length, at one layer: what projections are learned from.

    Attributes:
        layer: how many blocks have run where the directions live.
        directions: float32 [rows, d_model].
    """

    layer: int
    directions: torch.Tensor

    def __call__(self, stream: torch.Tensor) -> torch.Tensor:
        return torch.einsum("rtd,rd->rt", stream, self.directions.to(stream))


def _scales(basis: Eigenbasis) -> torch.Tensor:
    """Square roots of eigenvalues, none near zero; ones where all are zero, as there is nothing to whiten."""
    mean = basis.mean
    return (basis.values + FLOOR * mean).sqrt() if mean > 0 else torch.ones_like(basis.values)


def query_weights(basis: Eigenbasis, damping: float) -> torch.Tensor:
    """√a / (a + √damping · mean a): one side's share of H^½ (H + λI)⁻¹, taken for a Kronecker product."""
    return _scales(basis) / (basis.values + damping**0.5 * basis.mean).clamp(min=1e-30)


def row_maps(curvature: LayerCurvature, sides: Sides) -> tuple[torch.Tensor, torch.Tensor]:
    """L [out, left] and R [in, right]: a row's whitened gradient between the two sides is LᵀG R."""
    left, right = curvature.output_basis, curvature.input_basis
    return (
        left.outward(left.scaled(1 / _scales(left), sides.left)),
        right.outward(right.scaled(1 / _scales(right), sides.right)),
    )


def sample_maps(curvature: LayerCurvature, sides: Sides, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As `row_maps`, for the gradient of a drawn concept, with H taken for a Kronecker product."""
    left, right = curvature.output_basis, curvature.input_basis
    return (
        left.outward(left.scaled(query_weights(left, damping), sides.left)),
        right.outward(right.scaled(query_weights(right, damping), sides.right)),
    )


def query_maps(curvature: LayerCurvature, sides: Sides) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, left] and [in, right]: what a query's solved gradient is multiplied with, in the sides' own coordinates."""
    left, right = curvature.output_basis, curvature.input_basis
    return (left.scaled(_scales(left), sides.left), right.scaled(_scales(right), sides.right))


class TwoSided:
    """Collects Lᵀ (Σ_t δ_t a_tᵀ) R of each row, layer by layer.

    Args:
        maps: L and R by the layer's index; of other layers nothing is collected.
        put: takes a layer's index and [rows, left × right] in float32, in the order of the batch.
    """

    def __init__(self, maps: Mapping[int, tuple[torch.Tensor, torch.Tensor]], put: Callable[[int, torch.Tensor], None]):
        self._maps, self._put = maps, put

    def visitor(self, batch: Batch) -> Visit:
        real = batch.real[..., None]

        def visit(index: int, a: torch.Tensor, delta: torch.Tensor) -> None:
            if index not in self._maps:
                return
            left, right = self._maps[index]
            inputs = torch.where(real, a @ right, 0)
            self._put(index, ((delta @ left).mT @ inputs).flatten(1))

        return visit


def compress_query(
    gradients: Gradients,
    curvatures: Callable[[int], LayerCurvature],
    projections: Callable[[int], LayerProjection],
    damping: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A query's numbers: float32 [numbers].

    Args:
        gradients: of the kept layers that the query reaches, the first of those of the index.
        damping: λ as a share of each layer's mean eigenvalue.
        dtype: in which gradients are turned into the eigenbasis.
    """
    found = []
    for i, gradient in enumerate(gradients):
        c, p = curvatures(i), projections(i)
        narrow = gradient.to(c.product_dtype(dtype))
        between = c.between(p.query_left, p.query_right, _product(narrow), damping)
        found.append(between.flatten()[p.places].float())
    return torch.cat(found)


def _product(gradient: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda left, right: left.T.to(gradient) @ gradient @ right.to(gradient)


def compress_rows(
    lm: LanguageModel,
    layers: Sequence[LinearLayer],
    projections: Mapping[int, LayerProjection],
    rows: Rows,
    budget: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[list[CompressedRow]]:
    """The numbers of every row, batch by batch, in no particular order.

    Args:
        layers: the tracked ones, which a row's norms are of.
        projections: of the layers that are kept, by their index; with row maps in the model's dtype.
        budget: tokens a batch, padding included; chosen by the device if None.
        say: told when a batch is halved for want of memory.
    """
    kept = sorted(projections)
    ends = np.cumsum([0, *(len(projections[index].places) for index in kept)])
    spans_of = {index: slice(int(a), int(b)) for index, a, b in zip(kept, ends[:-1], ends[1:], strict=True)}
    spans = rows.spans
    scorable = rows.scorable
    first = layers[0].block
    blocks = layers[-1].block - first + 1
    for i in sorted(set(range(len(rows))) - set(scorable)):
        yield [CompressedRow(i, np.full(ends[-1], np.nan, np.float32), np.full(blocks, np.nan, np.float32))]
    with GradientPass(lm, layers) as run:

        def compress(chosen: Sequence[int]) -> list[CompressedRow]:
            batch = rows.batch(chosen, lm)
            numbers = torch.zeros(len(chosen), int(ends[-1]), device=lm.device)
            squares = torch.zeros(len(chosen), blocks, dtype=lm.wide_dtype, device=lm.device)
            norms = SquaredNorms(layers)

            def put(index: int, values: torch.Tensor) -> None:
                numbers[:, spans_of[index]] = values[:, projections[index].places].float()

            maps = {index: (p.row_left, p.row_right) for index, p in projections.items()}
            inner = TwoSided(maps, put).visitor(batch)

            def visit(index: int, a: torch.Tensor, delta: torch.Tensor) -> None:
                inner(index, a, delta)
                squares[:, layers[index].block - first] += norms(index, a, delta)

            losses = run.losses(batch, visit)
            for found in (numbers, squares):
                found[~torch.isfinite(losses)] = torch.nan
            values, own = numbers.cpu().numpy(), squares.float().cpu().numpy()
            return [CompressedRow(i, values[place], own[place]) for place, i in enumerate(chosen)]

        for places in batches_by_length([spans[i] for i in scorable], budget or gradient_tokens_per_batch(lm)):
            yield from halving([scorable[place] for place in places], compress, say, lm.device)
