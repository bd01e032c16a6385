"""Leading eigenvectors of second moments, without the moments of wide vectors ever in memory.

A second moment M = Σ w Vᵀ K V of vectors V [tokens, d], K positive semidefinite, is met with a Gaussian test
matrix Ω [d, p] while it grows: Z = M Ω needs no M. From Z alone comes the best positive semidefinite matrix
with the same range (Nyström; Tropp, Yurtsever, Udell & Cevher 2017, arXiv 1706.05736, algorithm 3),

    M ≈ Z_ν (Ωᵀ Z_ν)⁻¹ Z_νᵀ − ν I,   Z_ν = Z + ν Ω,

with a shift ν of the size of rounding, so that the matrix that is inverted has a Cholesky factor. Where the
spectrum of M falls slowly, a Gaussian Ω is not enough: M is met a second time, with Ω an orthonormal basis of the
first Z (one step of subspace iteration; Halko, Martinsson & Tropp 2011, section 4.5).
"""

from __future__ import annotations

from typing import Protocol

import torch

from concept_audit.errors import ModelError
from concept_audit.influence import curvature
from concept_audit.model.exact import at_exact_device, in_float64

OVERSAMPLING = 2
SPARE = 16
"""A sketch of k directions has `OVERSAMPLING` k + `SPARE` columns."""


class Moment(Protocol):
    """A sum of second moments of vectors."""

    def add(self, vectors: torch.Tensor, among: torch.Tensor, weight: float) -> None:
        """Add weight · Vᵀ K V of vectors V [tokens, d] and a kernel K [tokens, tokens]."""

    def begin_again(self) -> bool:
        """Whether a second pass over the same vectors is of use; if not, what it adds is not counted."""

    def leading(self, count: int) -> torch.Tensor:
        """The eigenvectors of the `count` largest eigenvalues, largest first: [d, count], or [d, d] if d is less."""


class Moments:
    """Makes moments; sketches of one shape share their test matrix.

    Args:
        dtype: of the sums.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._dtype, self._device = dtype, device
        self._tests: dict[tuple[int, int], torch.Tensor] = {}

    def of(self, width: int, count: int) -> Moment:
        """A moment of vectors of some width, of which `count` eigenvectors will be asked for."""
        columns = sketch_columns(width, count)
        if columns is None:
            return WholeMoment(width, self._dtype, self._device)
        if (width, columns) not in self._tests:
            generator = torch.Generator().manual_seed(width)
            test = torch.randn(width, columns, generator=generator, dtype=self._dtype)
            self._tests[width, columns] = test.to(self._device)
        return SketchedMoment(self._tests[width, columns])


def sketch_columns(width: int, count: int) -> int | None:
    """Columns of the sketch of a moment; None where the moment itself is kept, which is no wider or not wide."""
    columns = OVERSAMPLING * count + SPARE
    return columns if width > max(curvature.WIDE, columns) else None


class WholeMoment:
    """M itself: [d, d]."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device):
        self.total = torch.zeros(width, width, dtype=dtype, device=device)
        self._complete = False

    def add(self, vectors: torch.Tensor, among: torch.Tensor, weight: float) -> None:
        if not self._complete:
            # Where one side of a layer is wide and the other is not, only one of the two comes in the wide dtype.
            dtype, wide = torch.promote_types(vectors.dtype, among.dtype), self.total.dtype
            turned = (vectors.T.to(dtype) @ among.to(dtype)).to(wide)
            self.total.addmm_(turned, vectors.to(wide), alpha=weight)

    def begin_again(self) -> bool:
        self._complete = True
        return False

    def leading(self, count: int) -> torch.Tensor:
        vectors = torch.linalg.eigh(at_exact_device(self.total + self.total.T) / 2).eigenvectors
        return vectors.flip(1)[:, :count].contiguous().to(self.total.device)


class SketchedMoment:
    """Z = M Ω: [d, columns]; `begin_again` and `leading` raise ModelError where numbers are not finite.

    Args:
        test: Ω, in the dtype of the sums.
    """

    def __init__(self, test: torch.Tensor):
        self._test = test
        self._sketch = torch.zeros_like(test)

    def add(self, vectors: torch.Tensor, among: torch.Tensor, weight: float) -> None:
        # Ωᵀ Z has to stay positive semidefinite, which products in bfloat16 would not leave it.
        wide = vectors.to(self._sketch)
        self._sketch.addmm_(wide.T, among.to(wide) @ (wide @ self._test), alpha=weight)

    def begin_again(self) -> bool:
        self._test = torch.linalg.qr(self._sound(self._sketch)).Q.to(self._sketch)
        self._sketch = torch.zeros_like(self._sketch)
        return True

    def leading(self, count: int) -> torch.Tensor:
        sketch, test = self._sound(self._sketch), in_float64(self._test)
        size = sketch.norm()
        shift = torch.finfo(self._sketch.dtype).eps * size.clamp(min=torch.finfo(torch.float64).tiny)
        while True:
            shifted = sketch + shift * test
            core = test.T @ shifted
            factor, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
            if not failed:
                break
            shift = shift * 10  # rounding of the sums was larger than thought
        root = torch.linalg.solve_triangular(factor, shifted.T, upper=False).T
        # Vectors, largest first; the shift moves all eigenvalues alike.
        vectors = torch.linalg.svd(root, full_matrices=False).U[:, :count]
        return vectors.to(self._sketch).contiguous()

    def _sound(self, sketch: torch.Tensor) -> torch.Tensor:
        """In float64.

        Raises:
            ModelError: it holds numbers that are not finite.
        """
        if not torch.isfinite(sketch).all():
            raise ModelError(
                "the gradients of concepts overflow in the model's precision, so no projection can be learned; build "
                "the index with --precision float32 or bfloat16"
            )
        return in_float64(sketch)
