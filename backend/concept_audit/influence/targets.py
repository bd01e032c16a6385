"""What an influence score is about: a concept in the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Projection:
    """⟨h_t, v⟩ at every token: f of Kowal et al. 2026, section 3, for a probe or an SAE feature's decoder.

    Attributes:
        layer: how many blocks have run where v lives.
        direction: float32 [d_model], of unit length.
    """

    layer: int
    direction: np.ndarray

    def __call__(self, stream: torch.Tensor) -> torch.Tensor:
        return stream @ torch.from_numpy(self.direction).to(stream)


@dataclass(frozen=True)
class FeatureActivation:
    """An SAE feature's own activation at every token, through its encoder.

    Where the feature does not fire it has no gradient.

    Attributes:
        layer: where the SAE reads.
        sae: the SAELens module.
        feature: the feature's number.
    """

    layer: int
    sae: Any
    feature: int

    def __call__(self, stream: torch.Tensor) -> torch.Tensor:
        parameter = self.sae.W_dec
        encoded = self.sae.encode(stream.to(parameter.device, parameter.dtype))
        return encoded[..., self.feature].to(stream)
