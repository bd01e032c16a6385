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

**Wide sides.** Where a side is wider than `WIDE`, its `KEPT` leading eigenvectors are kept, and all directions
orthogonal to them are taken for alike. With Q_S and Q_A now the kept ones, R_S = I − Q_S Q_Sᵀ and R_A = I − Q_A Q_Aᵀ,

    H = (Q_S ⊗ Q_A) diag(Λ) (Q_S ⊗ Q_A)ᵀ + Σ_i λ_i· q_i q_iᵀ ⊗ R_A + Σ_j λ_·j R_S ⊗ q_j q_jᵀ + λ_·· R_S ⊗ R_A

where λ_i·, λ_·j and λ_·· are means of the squared gradients over the directions that they stand for: the trace of H,
and so the damping, is what it would be with all eigenvectors. Λ has them as its last column and row, and the
eigenvalues of A and S have the mean of the rest as their last number. Memory and disk take `KEPT` vectors a side in
bfloat16 instead of its width's square.

Which gradients: L(z) is the *mean* negative log-likelihood of a row's n response
tokens. The **sampled** Fisher draws every label from the model's own prediction and
weighs the sum of the tokens' gradients with 1/√n, so that its expectation is the
Gauss–Newton matrix of L; the **empirical** Fisher takes the gradients of L(z) itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from concept_audit.errors import ModelError
from concept_audit.model.exact import in_float64

WIDE = 2048
"""Where a layer's input or output has more numbers than this, nothing as large as their square is kept of it."""
KEPT = 1024
"""Eigenvectors kept of such a side."""


@dataclass(frozen=True)
class Eigenbasis:
    """Eigenvectors and eigenvalues of a covariance; see `concept_audit.influence.wide` for how wide ones are found.

    A basis has coordinates of its own: those along its eigenvectors where it has them all, else the model's.

    Attributes:
        vectors: [n, k], one a column.
        values: [n], ascending, none below 0; where k < n, [k + 1]: of the kept vectors, and the mean of the rest.
    """

    vectors: torch.Tensor
    values: torch.Tensor

    @property
    def complete(self) -> bool:
        """Whether every eigenvector is kept."""
        return self.vectors.shape[0] == self.vectors.shape[1]

    @property
    def sizes(self) -> torch.Tensor:
        """How many directions each eigenvalue stands for."""
        n, kept = self.vectors.shape
        sizes = torch.ones_like(self.values)
        return sizes if self.complete else torch.cat([sizes[:-1], sizes.new_full((1,), n - kept)])

    @property
    def mean(self) -> torch.Tensor:
        """The mean of all n eigenvalues."""
        return self.values.mean() if self.complete else (self.values * self.sizes).sum() / len(self.vectors)

    def scaled(self, weights: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Σ_i weight_i q_i q_iᵀ M, from own coordinates to own coordinates.

        Args:
            weights: one for each eigenvalue.
            matrix: [n, m].
        """
        if self.complete:
            return weights[:, None] * matrix
        along = (weights[:-1] - weights[-1])[:, None] * (self.vectors.T @ matrix)
        return weights[-1] * matrix + self.vectors @ along

    def outward(self, matrix: torch.Tensor) -> torch.Tensor:
        """From own coordinates to the model's: [n, m]."""
        return self.vectors @ matrix if self.complete else matrix

    def inward(self, weights: torch.Tensor, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        """A map of vectors [..., n] in the model's coordinates to own ones, along each eigenvector by its weight.

        Args:
            dtype: of the vectors to come, if every eigenvector is kept.
        """
        if self.complete:
            whole = (self.vectors * weights).to(dtype)
            return lambda x: x @ whole
        Q, rest, more = self.vectors, weights[-1], weights[:-1] - weights[-1]
        return lambda x: rest * x.to(Q) + ((x.to(Q) @ Q) * more) @ Q.T


@dataclass(frozen=True)
class LayerCurvature:
    """The curvature of one layer's weights: Q_S ⊗ Q_A diag(eigenvalues) (Q_S ⊗ Q_A)ᵀ, or with wide sides as above.

    Attributes:
        inputs: Q_A [in, in], or its leading eigenvectors.
        outputs: Q_S [out, out], likewise.
        eigenvalues: [out, in]; a row or column for each value of the sides.
        input_values, output_values: the eigenvalues of A and S, as of an `Eigenbasis`.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    eigenvalues: torch.Tensor
    input_values: torch.Tensor
    output_values: torch.Tensor

    @property
    def input_basis(self) -> Eigenbasis:
        """Of A."""
        return Eigenbasis(self.inputs, self.input_values)

    @property
    def output_basis(self) -> Eigenbasis:
        """Of S."""
        return Eigenbasis(self.outputs, self.output_values)

    @property
    def complete(self) -> bool:
        """Whether both sides have all their eigenvectors."""
        return self.input_basis.complete and self.output_basis.complete

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which gradients are multiplied with the eigenvectors: their own dtype, if nothing is to be subtracted."""
        return dtype if self.complete else torch.promote_types(dtype, self.eigenvalues.dtype)

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
        Q_S, Q_A = self.outputs, self.inputs
        if self.complete:
            rotated = damped_quotient(Q_S.T @ gradient @ Q_A, self.eigenvalues, damping)
            return Q_S @ rotated @ Q_A.T
        core, left, right, rest = self._inverse(damping)
        along = Q_S.T @ gradient
        found = rest * gradient
        found += Q_S @ (left[:, None] * along + (core * (along @ Q_A)) @ Q_A.T)
        found += ((gradient @ Q_A) * right) @ Q_A.T
        return found

    def between(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        damping: float,
    ) -> torch.Tensor:
        """Lᵀ [(H + λI)⁻¹ G] R: [left, right].

        Args:
            left, right: L [out, left] and R [in, right], in the own coordinates of the two sides.
            product: gives XᵀGY for X [out, ...] and Y [in, ...].
            damping: as in `solve`.
        """
        Q_S, Q_A = self.outputs, self.inputs
        if self.complete:
            solved = damped_quotient(product(Q_S, Q_A).to(self.eigenvalues), self.eigenvalues, damping)
            return left.T @ (solved @ right)
        core, left_rest, right_rest, rest = self._inverse(damping)
        L, R = self.output_basis.outward(left), self.input_basis.outward(right)
        products = product(torch.cat([Q_S, L], 1), torch.cat([Q_A, R], 1)).to(self.eigenvalues)
        rows, columns = Q_S.shape[1], Q_A.shape[1]
        inner, beside = products[:rows, :columns], products[:rows, columns:]
        below, corner = products[rows:, :columns], products[rows:, columns:]
        within = left_rest[:, None] * beside + (core * inner) @ (Q_A.T @ R)
        return rest * corner + (L.T @ Q_S) @ within + (below * right_rest) @ (Q_A.T @ R)

    def token_products(
        self, a: torch.Tensor, delta: torch.Tensor, a_query: torch.Tensor, delta_query: torch.Tensor, damping: float
    ) -> torch.Tensor:
        """δ_tᵀ [(H + λI)⁻¹ G] a_t of each token, with G = Σ_t δ'_t a'_tᵀ the gradient of a query: [tokens].

        Args:
            a, delta: inputs [tokens, in] and output gradients [tokens, out].
            a_query, delta_query: a' and δ', likewise.
            damping: as in `solve`.
        """
        dtype = self.product_dtype(a.dtype)
        wide = torch.promote_types(a.dtype, torch.float32)
        Q_S, Q_A = self.outputs.to(dtype), self.inputs.to(dtype)
        a, delta, a_query, delta_query = (x.to(dtype) for x in (a, delta, a_query, delta_query))
        a_along, delta_along, a_asked, delta_asked = a @ Q_A, delta @ Q_S, a_query @ Q_A, delta_query @ Q_S
        X = (delta_asked.T @ a_asked).to(self.eigenvalues)
        if self.complete:
            asked = damped_quotient(X, self.eigenvalues, damping).to(dtype)
            return ((delta_along @ asked) * a_along).sum(-1, dtype=wide)
        core, left, right, rest = self._inverse(damping)
        among_a, among_delta = a @ a_query.T, delta @ delta_query.T
        found = ((delta_along @ (core * X)) * a_along).sum(-1)
        found += (((delta_along * left) @ delta_asked.T + rest * among_delta) * among_a).sum(-1)
        found += (among_delta * ((a_along * right) @ a_asked.T)).sum(-1)
        return found

    def _inverse(self, damping: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """C [out kept, in kept], l [out kept], r [in kept] and a number c, of which (H + λI)⁻¹G is made:

        Q_S (C ∘ Q_Sᵀ G Q_A) Q_Aᵀ + Q_S diag(l) Q_Sᵀ G + G Q_A diag(r) Q_Aᵀ + c G.
        """
        sizes = self.output_basis.sizes, self.input_basis.sizes
        numbers = len(self.outputs) * len(self.inputs)
        mean = (sizes[0] @ self.eigenvalues.to(sizes[0]) @ sizes[1].to(sizes[0]) / numbers).to(self.eigenvalues)
        damped = self.eigenvalues + damping * mean
        inverse = torch.where(damped > 0, 1 / torch.where(damped > 0, damped, 1), 0)
        # Of a side with all its vectors there is no rest, and what stands for it makes no difference.
        pad = int(self.input_basis.complete), int(self.output_basis.complete)
        inverse = torch.nn.functional.pad(inverse, (0, pad[0], 0, pad[1]))
        left, right, rest = inverse[:-1, -1], inverse[-1, :-1], inverse[-1, -1]
        return inverse[:-1, :-1] - left[:, None] - right + rest, left - rest, right - rest, rest


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
    check_finite(covariance)
    wide = in_float64(covariance)
    values, vectors = torch.linalg.eigh((wide + wide.T) / 2)
    return Eigenbasis(vectors.to(covariance), values.clamp(min=0).to(covariance))


def check_finite(covariance: torch.Tensor) -> None:
    """Raise ModelError if a covariance holds numbers that are not finite."""
    if not torch.isfinite(covariance).all():
        raise ModelError(
            "the model's inputs or gradients overflow in its precision, so no curvature can be fitted; build the "
            "audit with --dtype float32 or bfloat16, or rank with --curvature identity"
        )


def kfac_eigenvalues(inputs: Eigenbasis, outputs: Eigenbasis) -> torch.Tensor:
    """Eigenvalues of S ⊗ A in its own eigenbasis: [out, in], or one for each pair of the sides' values."""
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
