"""Queries one by one, and many concepts on the same query rows, as the gradient index takes them.

A concept's query is Σ_q w_q G_q over its query examples q, and what the index takes of it is linear in the
gradients: Σ_q w_q y(G_q), with y as in `compress_query`. Here are the y(G_q) of each pair of a concept and a query
example. Concepts that share an example, as SAE features often do, share its forward pass, and the inputs of its
layers in the eigenbasis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch

from concept_audit.influence.curvature import LayerCurvature
from concept_audit.influence.projection import LayerProjection
from concept_audit.influence.queries import Quantity, Rows
from concept_audit.model.batches import Batch, batches_by_length
from concept_audit.model.budgets import gradient_tokens_per_batch
from concept_audit.model.gradients import GradientPass, Visit
from concept_audit.model.linear import LinearLayer
from concept_audit.model.load import LanguageModel
from concept_audit.model.shared_forward import SharedForward

NARROW_BYTES = 1 << 30
"""Of curvature in the dtype of the passes, kept from one batch to the next; what finds no room is made anew."""


@dataclass(frozen=True)
class _Narrow:
    """A layer's curvature in the dtype of the passes: what rounding leaves of a gradient there is not worth more.

    Attributes:
        outputs: Q_S [out, out].
        inverse: (Λ + λ)⁻¹ [out, in], 0 where Λ + λ is 0.
        left, right: query maps of the projection, Uᵀ [left, out] and V [in, right].
    """

    outputs: torch.Tensor
    inverse: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.outputs.nbytes + self.inverse.nbytes + self.left.nbytes + self.right.nbytes


class SingleQueries:
    """Collects y(G), the kept numbers of Uᵀ [(Q_Sᵀ G Q_A) / (Λ + λ)] V, of single queries, layer by layer.

    Tokens are turned into the eigenbasis instead of a gradient, which has more directions than a query has tokens.
    Layers that read the same input have to share its eigenbasis.

    Args:
        count: of the queries.
        damping: λ as a share of each layer's mean eigenvalue.
    """

    def __init__(
        self,
        lm: LanguageModel,
        layers: Sequence[LinearLayer],
        count: int,
        curvatures: Callable[[int], LayerCurvature],
        projections: Callable[[int], LayerProjection],
        damping: float,
    ):
        self._lm, self._layers, self._count = lm, layers, count
        self._curvatures, self._projections, self._damping = curvatures, projections, damping
        self._parts: dict[int, torch.Tensor] = {}
        self._narrow: dict[int, _Narrow] = {}
        self._room = NARROW_BYTES

    def visitors(self, batch: Batch, places: Sequence[Sequence[int]]) -> list[Visit]:
        """What takes the gradients of one batch, for each of several backward passes.

        Args:
            places: for each pass, where the rows of the batch stand among the queries.
        """
        turned: dict[int, torch.Tensor] = {}

        def inputs(index: int, a: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
            source = self._layers[index].source
            if source not in turned:
                if len(places) == 1:
                    turned.clear()  # layers with the same inputs follow each other
                turned[source] = torch.where(batch.real[..., None], a, 0) @ vectors.to(a.dtype)
            return turned[source]

        def visitor(mine: Sequence[int]) -> Visit:
            def visit(index: int, a: torch.Tensor, delta: torch.Tensor) -> None:
                c, p = self._curvatures(index), self._projections(index)
                if c.complete:
                    narrow = self._in(delta.dtype, index, c, p)
                    found = _turned(inputs(index, a, c.inputs), delta, narrow, c.eigenvalues.dtype)
                else:
                    real = torch.where(batch.real[..., None], a, 0)
                    products = map(_product, real, delta, repeat(c.product_dtype(a.dtype)))
                    found = [c.between(p.query_left, p.query_right, each, self._damping) for each in products]
                numbers = torch.stack([between.flatten() for between in found])
                if index not in self._parts:
                    self._parts[index] = numbers.new_zeros(self._count, len(p.places))
                self._parts[index][list(mine)] = numbers[:, p.places]

            return visit

        return [visitor(mine) for mine in places]

    def _in(self, dtype: torch.dtype, index: int, c: LayerCurvature, p: LayerProjection) -> _Narrow:
        """A layer's curvature in the dtype of a pass."""
        known = self._narrow.get(index)
        if known is not None and known.inverse.dtype == dtype:
            return known
        damped = c.eigenvalues + self._damping * c.eigenvalues.mean()
        inverse = damped.reciprocal().masked_fill_(damped <= 0, 0)
        made = _Narrow(*(part.to(dtype) for part in (c.outputs, inverse, p.query_left.T, p.query_right)))
        if made.nbytes <= self._room:
            self._room -= made.nbytes
            self._narrow[index] = made
        return made

    def numbers(self) -> torch.Tensor:
        """[queries, numbers], zero in layers that no gradient has reached; in the dtype of the curvature."""
        found = []
        for index in range(len(self._layers)):
            if index in self._parts:
                found.append(self._parts[index])
            else:
                kept = len(self._projections(index).places)
                found.append(torch.zeros(self._count, kept, dtype=self._lm.wide_dtype, device=self._lm.device))
        return torch.cat(found, dim=1)


def _turned(inputs: torch.Tensor, delta: torch.Tensor, c: _Narrow, dtype: torch.dtype) -> list[torch.Tensor]:
    """Each row's gradient between the sides, from inputs that are in the eigenbasis already.

    Args:
        dtype: of what is given.
    """
    rows = zip(inputs, delta @ c.outputs, strict=True)
    return [(c.left @ (((y.T @ x) * c.inverse) @ c.right)).to(dtype) for x, y in rows]


def _product(a: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """XᵀGY of X and Y for the gradient G = Σ_t δ_t a_tᵀ, which is never formed."""
    return lambda left, right: (delta.to(dtype) @ left.to(dtype)).T @ (a.to(dtype) @ right.to(dtype))


def compress_each(
    lm: LanguageModel,
    layers: Sequence[LinearLayer],
    quantity: Quantity,
    queries: Rows,
    curvatures: Callable[[int], LayerCurvature],
    projections: Callable[[int], LayerProjection],
    damping: float,
    budget: int | None = None,
) -> torch.Tensor:
    """As `compress_query`, for each query alone: [queries, numbers]."""
    found = SingleQueries(lm, layers, len(queries), curvatures, projections, damping)
    with GradientPass(lm, layers) as run:
        for chosen in batches_by_length(queries.spans, budget or gradient_tokens_per_batch(lm)):
            batch = queries.batch(chosen, lm)
            (visit,) = found.visitors(batch, [chosen])
            quantity(run, batch, visit)
    return found.numbers()


def compress_concepts(
    lm: LanguageModel,
    layers: Sequence[LinearLayer],
    layer: int,
    directions: torch.Tensor,
    rows: Rows,
    asked: Sequence[Sequence[int]],
    curvatures: Callable[[int], LayerCurvature],
    projections: Callable[[int], LayerProjection],
    damping: float,
    budget: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> list[torch.Tensor]:
    """As `compress_query` of −mean_t ⟨h_t, v⟩, for each concept that is asked for on each row alone.

    Args:
        layers: the tracked layers of the blocks up to `layer`.
        layer: how many blocks have run where all the concepts live.
        directions: v of each concept, [concepts, d_model].
        rows: query examples, each once.
        asked: of each row, the concepts that have it among their queries.
        budget: tokens a batch, padding included; chosen by the device if None.
        advance: told the number of pairs as they are done.

    Returns:
        for each row [len(asked[row]), numbers], in that order; NaN where a row has no response tokens.
    """
    starts = [0]
    for concepts in asked:
        starts.append(starts[-1] + len(concepts))
    found = SingleQueries(lm, layers, starts[-1], curvatures, projections, damping)
    towards = -directions.to(lm.device)
    spans = rows.spans
    with SharedForward(lm, layers) as run:
        # Rows of a batch are asked for equally often, so that no backward pass carries rows for nothing.
        for often in sorted({len(concepts) for concepts in asked if len(concepts)}):
            mine = [i for i, concepts in enumerate(asked) if len(concepts) == often]
            for places in batches_by_length([spans[i] for i in mine], budget or gradient_tokens_per_batch(lm)):
                chosen = [mine[place] for place in places]
                batch = rows.batch(chosen, lm)
                turns = range(often)
                visits = found.visitors(batch, [[starts[i] + turn for i in chosen] for turn in turns])
                run.projections(batch, layer, [towards[[asked[i][turn] for i in chosen]] for turn in turns], visits)
                advance(often * len(chosen))
    numbers = found.numbers()
    return [numbers[start:end] for start, end in zip(starts[:-1], starts[1:], strict=True)]


def row_keys(rows: Rows) -> list[tuple[bytes, bytes]]:
    """What tells rows of different tokens or response apart."""
    return [(ids.tobytes(), mask.tobytes()) for ids, mask in zip(rows.ids, rows.response, strict=True)]


def distinct_rows(queries: Sequence[Rows]) -> tuple[Rows, list[list[int]], list[list[tuple[int, int]]]]:
    """The query rows of several concepts, each once.

    Args:
        queries: of each concept.

    Returns:
        the rows; the concepts that each is asked for, a concept as often as it has the row; and of each concept's
        queries, the row and the turn at which the row is asked for it.
    """
    ids: list[np.ndarray] = []
    response: list[np.ndarray] = []
    places: dict[tuple[bytes, bytes], int] = {}
    asked: list[list[int]] = []
    found: list[list[tuple[int, int]]] = []
    for concept, rows in enumerate(queries):
        mine = []
        for number, key in enumerate(row_keys(rows)):
            if key not in places:
                places[key] = len(ids)
                ids.append(rows.ids[number])
                response.append(rows.response[number])
                asked.append([])
            row = places[key]
            mine.append((row, len(asked[row])))
            asked[row].append(concept)
        found.append(mine)
    return Rows(ids, response), asked, found


def sharing(queries: Sequence[Rows]) -> list[bool]:
    """Of each concept, whether another one has one of its query rows, too."""
    keys = [set(row_keys(rows)) for rows in queries]
    asked = Counter(key for mine in keys for key in mine)
    return [any(asked[key] > 1 for key in mine) for mine in keys]


def parts_of_at_most(limit: int, places: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Places in their order, cut so that the sizes of a part come to `limit` at most; a larger one goes alone."""
    parts: list[list[int]] = []
    room = 0
    for place, size in zip(places, sizes, strict=True):
        if not parts or size > room:
            parts.append([])
            room = limit
        parts[-1].append(place)
        room -= size
    return parts
