"""Steering: a vector is added to the residual stream for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from concept_audit.model.hooks import hook_outputs
from concept_audit.model.load import LanguageModel


@contextmanager
def steered(lm: LanguageModel, layer: int, vector: torch.Tensor) -> Iterator[None]:
    """The model with a vector added to the residual stream: h_ℓ ← h_ℓ + u at every token, within the body.

    It is what a bias of block ℓ's output would do: a constant, through which gradients pass as they are.

    Args:
        layer: ℓ, how many blocks have run where it is added.
        vector: u, [d_model]; in the stream's dtype and on its device it is put here.
    """
    lm.check_layers((layer,))

    def add(
        _module: nn.Module, _inputs: tuple, output: torch.Tensor | tuple[torch.Tensor, ...]
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        stream = output[0] if isinstance(output, tuple) else output
        moved = stream + vector.to(stream)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    with lm.lock:
        handle = hook_outputs(lm.blocks[layer - 1], add)
        try:
            yield
        finally:
            handle.remove()
