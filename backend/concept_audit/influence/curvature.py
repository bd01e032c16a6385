"""Eigenvalue-corrected Kronecker factors of the Fisher information (EK-FAC).

For a linear layer with gradient G_z = Σ_t δ_t a_tᵀ on row z, the Fisher information
of its weights is F = E_z[vec(G_z) vec(G_z)ᵀ]. K-FAC (Martens & Grosse 2015, arXiv
1503.05671; for sequences the "expand" setting of Eschenhagen et al. 2023, arXiv
2311.00636) takes it for S ⊗ A, with

    A = mean over tokens of a_t a_tᵀ          [in, in], up to each row's last response token
    S = mean over rows of Σ_t δ_t δ_tᵀ        [out, out]

EK-FAC (George et al. 2018, arXiv 1806.03884; for influence functions Grosse et al.
2023, arXiv 2308.03296, section 3.1) keeps the eigenvectors Q_A and Q_S of both and
measures the eigenvalues anew:

    Λ = mean over rows of (Q_Sᵀ G_z Q_A)²     [out, in], squared number by number.

Different layers are taken for independent.

Which gradients: L(z) is the *mean* negative log-likelihood of a row's n response
tokens. The **sampled** Fisher draws every label from the model's own prediction and
weighs the sum of the tokens' gradients with 1/√n, so that its expectation is the
Gauss–Newton matrix of L; the **empirical** Fisher takes the gradients of L(z) itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from concept_audit.errors import ModelError
from concept_audit.model.exact import in_float64

WIDE = 2048
"""Where a layer's input or output has more numbers than this, nothing as large as their square is held."""


@dataclass(frozen=True)
class Eigenbasis:
    """Eigenvectors and eigenvalues of a covariance.

    Attributes:
        vectors: [n, n], one a column.
        values: [n], ascending, none below 0.
    """

    vectors: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class LayerCurvature:
    """The curvature of one layer's weights: Q_S ⊗ Q_A diag(eigenvalues) (Q_S ⊗ Q_A)ᵀ.

    Attributes:
        inputs: Q_A [in, in].
        outputs: Q_S [out, out].
        eigenvalues: [out, in].
        input_values, output_values: [in] and [out], the eigenvalues of A and S.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    eigenvalues: torch.Tensor
    input_values: torch.Tensor
    output_values: torch.Tensor

    def solve(self, gradient: torch.Tensor, damping: float) -> torch.Tensor:
        """(H + λI)⁻¹ applied to a gradient, with λ = `damping` × the mean eigenvalue.

        Where H + λI is 0 the pseudo-inverse is meant, and the gradient goes to 0: with damping in layers
        whose curvature is exactly 0, such as A of a fresh LoRA adapter, on whose weights no row has a
        gradient while B is 0; without damping in every direction that no row's gradient has.

        Args:
            gradient: [..., out, in].

        Returns:
            the same shape.
        """
        rotated = self.outputs.T @ gradient @ self.inputs
        rotated = damped_quotient(rotated, self.eigenvalues, damping)
        return self.outputs @ rotated @ self.inputs.T


def damped_quotient(rotated: torch.Tensor, eigenvalues: torch.Tensor, damping: float) -> torch.Tensor:
    """rotated / (Λ + λ) with λ = `damping` × the mean of Λ, and 0 where Λ + λ is 0: [..., out, in]."""
    damped = eigenvalues + damping * eigenvalues.mean()
    return torch.where(damped > 0, rotated / torch.where(damped > 0, damped, 1), 0)


def eigenbasis(covariance: torch.Tensor) -> Eigenbasis:
    """Eigendecomposition of a symmetric matrix, computed in float64; in the dtype and on the device of the matrix.

    Rounding may make the smallest eigenvalues of a covariance negative; they count as 0.

    Raises:
        ModelError: the matrix holds numbers that are not finite.
    """
    if not torch.isfinite(covariance).all():
        raise ModelError(
            "the model's inputs or gradients overflow in its precision, so no curvature can be fitted; build the "
            "audit with --dtype float32 or bfloat16, or rank with --curvature identity"
        )
    wide = in_float64(covariance)
    values, vectors = torch.linalg.eigh((wide + wide.T) / 2)
    return Eigenbasis(vectors.to(covariance), values.clamp(min=0).to(covariance))


def kfac_eigenvalues(inputs: Eigenbasis, outputs: Eigenbasis) -> torch.Tensor:
    """Eigenvalues of S ⊗ A in its own eigenbasis: [out, in]."""
    return outputs.values[:, None] * inputs.values[None, :]


def squared_in_basis(inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Σ over rows of (Q_Sᵀ G_z Q_A)², from inputs and output gradients that are in the basis already.

    Args:
        inputs: a Q_A, [rows, tokens, in].
        gradients: δ Q_S, [rows, tokens, out].

    Returns:
        [out, in].
    """
    wide = torch.promote_types(inputs.dtype, torch.float32)
    total = torch.zeros(gradients.shape[-1], inputs.shape[-1], dtype=wide, device=inputs.device)
    # One row's gradient in memory at a time.
    for a, delta in zip(inputs, gradients, strict=True):
        row = (delta.T @ a).to(wide)
        total.addcmul_(row, row)
    return total
