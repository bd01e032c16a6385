"""The two-sided bases of the projection: the leading directions of concept gradients, learned layer by layer.

With Y the gradient of a concept as a query asks it (see `concept_audit.influence.projection`), taken for a
Kronecker product, the bases are the leading eigenvectors of Σ Y Yᵀ and Σ Yᵀ Y over concepts, each Y of unit length.
Layers are learned in groups of blocks, as many at a time as fit into memory, with the pass repeated for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from concept_audit.influence import curvature, projection
from concept_audit.influence.curvature import LayerCurvature
from concept_audit.influence.moments import Moments, sketch_columns
from concept_audit.influence.projection import Sides
from concept_audit.model.batches import Batch
from concept_audit.model.gradients import Visit
from concept_audit.model.linear import LinearLayer
from concept_audit.model.load import LanguageModel


class SecondMoments:
    """Σ over rows of Y Yᵀ and Yᵀ Y for concept gradients, each row counted alike.

    Args:
        curvatures: of each layer.
        damping: as in the queries to come.
    """

    def __init__(
        self,
        layers: Sequence[LinearLayer],
        curvatures: Callable[[int], LayerCurvature],
        damping: float,
        lm: LanguageModel,
    ):
        self._weights = []
        for i in range(len(layers)):
            c = curvatures(i)
            self._weights.append(
                tuple(
                    basis.inward(projection.query_weights(basis, damping), lm.dtype)
                    for basis in (c.output_basis, c.input_basis)
                )
            )
        self._wide = lm.wide_dtype
        moments = Moments(self._wide, lm.device)
        self.left = [moments.of(layer.d_out, projection.LEFT) for layer in layers]
        self.right = [moments.of(layer.d_in, projection.RIGHT) for layer in layers]

    def visitor(self, batch: Batch) -> Visit:
        """Adds a batch's inputs and output gradients."""
        real = batch.real[..., None]

        def visit(index: int, a: torch.Tensor, delta: torch.Tensor) -> None:
            W_S, W_A = self._weights[index]
            wide = self._wide
            inputs, outputs = W_A(torch.where(real, a, 0)), W_S(delta)
            for x, y in zip(inputs, outputs, strict=True):
                # Y = yᵀ x for one row. Two products of tokens instead of one of weights.
                among_x, among_y = x @ x.T, y @ y.T
                scale = (among_x * among_y).sum(dtype=wide).clamp(min=torch.finfo(wide).tiny)
                self.left[index].add(y, among_x, float(1 / scale))
                self.right[index].add(x, among_y, float(1 / scale))

        return visit

    def begin_again(self) -> bool:
        """Whether the same rows are to be added once more; see `Moment.begin_again`."""
        return any([moment.begin_again() for moment in (*self.left, *self.right)])

    def sides(self, index: int) -> Sides:
        """The leading `LEFT` and `RIGHT` eigenvectors of the two moments."""
        return Sides(self.left[index].leading(projection.LEFT), self.right[index].leading(projection.RIGHT))


def moment_bytes(layer: LinearLayer, itemsize: int) -> int:
    """What `SecondMoments` holds of a layer.

    Args:
        itemsize: bytes of a number.
    """
    size = 0
    for width, count in ((layer.d_out, projection.LEFT), (layer.d_in, projection.RIGHT)):
        columns = sketch_columns(width, count)
        size += width * (columns or width) + width * (curvature.KEPT if width > curvature.WIDE else width)
    return size * itemsize
