"""A query of which each layer's gradient is kept in whichever form is small: whole, or as factors of a low rank.

A query's gradient has no more independent directions than its examples have tokens, and with the curvature applied
most of its norm lies in few of them: G ≈ U Vᵀ by a truncated singular value decomposition, of the least rank that
keeps `SHARE` of ‖G‖² in each layer. What is lost altogether is told by `retained`; by Cauchy and Schwarz no score
is off by more than √(1 − retained) · ‖G‖ · ‖∇θL(z)‖.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from concept_audit.influence.curvature import LayerCurvature
from concept_audit.influence.queries import (
    Gradients,
    Quantity,
    Rows,
    inner_product,
    precondition,
    query_gradient,
    sum_dtype,
    truncated,
)
from concept_audit.model.block_groups import LayerGroup, block_groups
from concept_audit.model.linear import LinearLayer
from concept_audit.model.load import LanguageModel
from concept_audit.model.memory import room_on

SHARE = 1 - 1e-6
"""Of a layer's squared norm, that factors are to keep."""
MOST = 256
"""Rank of factors at most, whatever share they keep."""
SMALL = 1 << 16
"""Gradients of so many numbers are kept whole."""
GROUP_BYTES = 2 << 30
"""Of whole gradients in memory at one time; one block's are always taken."""

Form = tuple[torch.Tensor] | tuple[torch.Tensor, torch.Tensor]
"""A layer's gradient: G [out, in] alone, or U [out, rank] and V [in, rank]."""


class ReducedQuery:
    """One query gradient, ready to score rows with; see `PreparedQueries`.

    Args:
        forms: of each layer.
        retained: the share of the squared norm that they keep.
    """

    def __init__(self, forms: Sequence[Form], retained: float = 1.0):
        self.forms, self.count, self.retained = list(forms), 1, np.array([retained])

    def token_scores(self, index: int, a: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        left, *right = (part.to(a.dtype) for part in self.forms[index])
        if not right:
            return inner_product(torch.nn.functional.linear(a, left), delta)[..., None]
        columns = (delta @ left) * (a @ right[0])
        return columns.sum(-1, keepdim=True, dtype=sum_dtype(columns))

    def operations(self, layers: Sequence[LinearLayer]) -> int:
        return sum(part.numel() for form in self.forms for part in form)

    def gradient(self) -> Gradients:
        """G of every layer, whole."""
        return [form[0] if len(form) == 1 else form[0] @ form[1].T for form in self.forms]


def reduced(gradient: torch.Tensor, seed: int = 0) -> tuple[Form, float]:
    """A layer's gradient in the smaller form, and the squared norm that it keeps.

    Factors that would not halve what is kept are not worth their loss.
    """
    whole = float(gradient.square().sum(dtype=torch.float64 if gradient.device.type == "cpu" else None))
    (n, m), halved = gradient.shape, gradient.numel() / 2
    most = min(MOST, int(halved / (n + m)))
    if n * m > SMALL and most:
        U, V = truncated(gradient, most, seed)
        kept = U.square().sum(0).cumsum(0)  # V has orthonormal columns
        enough = int((kept < SHARE * whole).sum()) + 1
        if enough <= most or most == MOST:
            rank = min(enough, most)
            return (U[:, :rank].contiguous(), V[:, :rank].contiguous()), min(float(kept[rank - 1]), whole)
    return (gradient,), whole


class Reducing:
    """Puts a query together from the gradients of its layers, in their order.

    Args:
        dtype: in which the query is to be kept.
        step: called before each layer.
    """

    def __init__(self, dtype: torch.dtype, step: Callable[[], None] = lambda: None):
        self._dtype, self._step = dtype, step
        self._forms: list[Form] = []
        self._kept = self._whole = 0.0

    def add(self, gradients: Gradients) -> None:
        """Take the gradients of further layers."""
        for gradient in gradients:
            self._step()
            form, kept = reduced(gradient)
            self._forms.append(tuple(part.to(self._dtype) for part in form))  # type: ignore[arg-type]
            self._kept += kept
            self._whole += float(gradient.square().sum())

    def query(self) -> ReducedQuery:
        """The query of all layers so far."""
        return ReducedQuery(self._forms, min(1.0, self._kept / self._whole) if self._whole > 0 else 1.0)


def solved_by_blocks(
    lm: LanguageModel,
    layers: Sequence[LinearLayer],
    quantity: Quantity,
    parts: Sequence[tuple[Rows, Sequence[float]]],
    curvatures: Callable[[int], LayerCurvature],
    damping: float,
    dtype: torch.dtype,
    budget: int | None = None,
    step: Callable[[], None] = lambda: None,
) -> tuple[ReducedQuery, list[ReducedQuery]]:
    """(H + λI)⁻¹ of a query's gradient, a few blocks at a time, so that it is never whole in memory.

    Args:
        parts: query examples with their weights, such as those of each sign.
        curvatures: of each layer.
        damping: λ as a share of each layer's mean eigenvalue.
        dtype: in which the queries are kept.
        budget: tokens a batch, padding included; chosen by the device if None.
        step: called every second or so; what it raises ends the work.

    Returns:
        of all parts together, and of each.
    """
    total, each = Reducing(dtype, step), [Reducing(dtype, step) for _ in parts]
    # Of each part the gradient before and after the curvature is applied, and their sum.
    size = lm.wide_dtype.itemsize * (len(parts) + 2)
    for group in block_groups(layers, lambda layer: size * layer.d_in * layer.d_out, room_on(lm.device, GROUP_BYTES)):
        found = [solved_group(lm, group, quantity, part, curvatures, damping, budget, step) for part in parts]
        total.add(found[0] if len(found) == 1 else [sum(same[1:], same[0]) for same in zip(*found, strict=True)])
        if len(parts) > 1:
            for reducing, gradients in zip(each, found, strict=True):
                reducing.add(gradients)
    whole = total.query()
    return whole, [whole] if len(parts) == 1 else [reducing.query() for reducing in each]


def solved_group(
    lm: LanguageModel,
    group: LayerGroup,
    quantity: Quantity,
    part: tuple[Rows, Sequence[float]],
    curvatures: Callable[[int], LayerCurvature],
    damping: float,
    budget: int | None = None,
    step: Callable[[], None] = lambda: None,
) -> Gradients:
    """(H + λI)⁻¹ of a query's gradient in some blocks; as `solved_by_blocks`."""
    within = group.within(curvatures)

    def stepping(index: int) -> LayerCurvature:
        step()
        return within(index)

    gradients = query_gradient(lm, group.layers, quantity, *part, budget, lambda done: step())
    return precondition(gradients, stepping, damping)
