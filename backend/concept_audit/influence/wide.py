"""Leading eigenvectors of wide covariances, and what squared gradients are in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from concept_audit.influence import curvature
from concept_audit.influence.curvature import Eigenbasis, check_finite, squared_in_basis
from concept_audit.model.exact import at_exact_device, in_float64
from concept_audit.model.linear import LinearLayer

SPARE = 64
"""Directions beside those that are kept, so that the last of them are found as well."""
ITERATIONS = 8
RESIDUAL = 1e-3
"""Iteration ends when ‖M V − V Λ‖ is this share of ‖Λ‖, in Frobenius norms."""


def side_eigenbasis(covariance: torch.Tensor) -> Eigenbasis:
    """All eigenvectors of a covariance, or the leading ones if it is wider than `WIDE`; raises as `eigenbasis`."""
    wide = len(covariance) > curvature.WIDE
    return leading_eigenbasis(covariance, curvature.KEPT) if wide else curvature.eigenbasis(covariance)


def leading_eigenbasis(covariance: torch.Tensor, kept: int) -> Eigenbasis:
    """The leading eigenvectors of a positive semidefinite matrix M, and the mean of its other eigenvalues.

    Randomised subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4) in the matrix's dtype, with a
    Rayleigh–Ritz step in float64 each time. Directions of which the eigenvalues are close to one another may be
    mixed: nothing depends on them one by one, as what they are multiplied with is measured anew in their basis.

    Args:
        kept: how many vectors; `covariance` has at least two rows more.

    Returns:
        vectors in bfloat16, to be made orthonormal by `orthonormal` where they are read; values in the dtype of M,
        those of the vectors, largest first, and the mean of the rest.

    Raises:
        ModelError: the matrix holds numbers that are not finite.
    """
    check_finite(covariance)
    matrix = at_exact_device(covariance)
    n, spare = len(matrix), min(len(matrix), kept + SPARE)
    generator = torch.Generator().manual_seed(n)
    start = torch.randn(n, spare, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(ITERATIONS):
        image = matrix @ basis
        small = in_float64(basis.T @ image)
        values, turn = torch.linalg.eigh((small + small.T) / 2)
        values, turn = values.flip(0)[:kept], turn.flip(1)[:, :kept].to(matrix)
        # The residual is orthogonal to the basis: its square is what the image has beside the Ritz values.
        beside = float((image @ turn).square().sum()) - float(values.square().sum())
        if beside <= RESIDUAL**2 * float(values.square().sum()):
            break
        previous, basis = basis, torch.linalg.qr(image).Q
    else:
        basis = previous  # the one that `turn` is of
    rest = ((matrix.diagonal().sum(dtype=torch.float64) - values.sum()) / (n - kept)).clamp(min=0)
    found = torch.cat([values.clamp(min=0), rest[None].to(values)])
    return Eigenbasis((basis @ turn).bfloat16().to(covariance.device), found.to(covariance))


def orthonormal(vectors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Vectors as they were before they were rounded to bfloat16, but for a turn of their span: [n, k].

    One Newton–Schulz step, Q ← Q (3 I − QᵀQ) / 2, takes the products of vectors that are orthonormal to ε to 3ε²/4.
    """
    wide = vectors.to(dtype)
    return 1.5 * wide - 0.5 * (wide @ (wide.T @ wide))


def squared_with_rest(
    inputs: torch.Tensor, gradients: torch.Tensor, Q_A: torch.Tensor, Q_S: torch.Tensor
) -> torch.Tensor:
    """Σ over rows of (Q_Sᵀ G_z Q_A)², and of the squares of what a side's vectors leave out, as last row and column.

    Args:
        inputs: a, [rows, tokens, in].
        gradients: δ, [rows, tokens, out].
        Q_A, Q_S: eigenvectors [in, k] and [out, k], in the dtype in which this is computed.

    Returns:
        [out or kept + 1, in or kept + 1].
    """
    a_along, delta_along = inputs.to(Q_A) @ Q_A, gradients.to(Q_S) @ Q_S
    total = squared_in_basis(a_along, delta_along)
    rest_in, rest_out = (len(Q) > Q.shape[1] for Q in (Q_A, Q_S))
    among_a, among_delta = (x.to(Q_A) @ x.mT.to(Q_A) for x in (inputs, gradients))
    if rest_in:
        rows = ((among_a @ delta_along) * delta_along).sum((0, 1)) - total.sum(1)
        total = torch.cat([total, rows.clamp(min=0)[:, None]], 1)
    if rest_out:
        columns = ((among_delta @ a_along) * a_along).sum((0, 1)) - total[:, : a_along.shape[-1]].sum(0)
        if rest_in:
            columns = torch.cat([columns, ((among_a * among_delta).sum() - total.sum() - columns.sum())[None]])
        total = torch.cat([total, columns.clamp(min=0)[None]])
    return total


def wide_form(layers: Sequence[LinearLayer]) -> str | None:
    """What tells factors that keep leading eigenvectors alone from others; None if no side of the layers is wide."""
    if all(max(layer.d_in, layer.d_out) <= curvature.WIDE for layer in layers):
        return None
    return f"{curvature.KEPT} leading eigenvectors of those wider than {curvature.WIDE}"
