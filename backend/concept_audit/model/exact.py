"""Where sums that must leave no trace of their order are taken: in float64, on a device that has it.

CUDA and the CPU compute in float64 themselves. Apple's MPS has neither float64 nor the
decompositions of matrices (eigenvectors, QR, singular values): there, what needs them
is computed on the CPU, whose memory such a machine shares, and what comes out goes back.
"""

from __future__ import annotations

import torch

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Types of devices that have neither float64 nor decompositions of matrices."""


def exact_device(device: torch.device) -> torch.device:
    """Where float64 and the decompositions of matrices are computed for a device: itself, or the CPU."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def at_exact_device(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, in its own dtype, where float64 and the decompositions of matrices are computed."""
    return tensor.to(exact_device(tensor.device))


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, on the device if that has it, else on the CPU."""
    return at_exact_device(tensor).double()
