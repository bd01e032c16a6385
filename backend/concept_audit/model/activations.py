"""The residual stream of many rows: batches by length, no deeper than asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from concept_audit.model.batches import batches_by_length, padded
from concept_audit.model.hooks import hook_outputs
from concept_audit.model.load import LanguageModel

TOKENS_PER_BATCH_CPU = 2048
TOKENS_PER_BATCH_ACCELERATOR = 16384


class _DeepEnough(Exception):
    """Ends a forward pass once the deepest layer asked for has been captured."""


@dataclass(frozen=True)
class RowActivations:
    """The residual stream of one row's response.

    Attributes:
        index: the row's place in the sequence that was passed in.
        mean: layer → float32 [d_model], the mean over the response tokens.
        streams: layer → float32 [tokens, d_model] for the layers whose every token was asked for.
    """

    index: int
    mean: dict[int, np.ndarray]
    streams: dict[int, np.ndarray]


@contextmanager
def residual_stream(
    lm: LanguageModel, layers: Sequence[int]
) -> Iterator[Callable[[torch.Tensor], dict[int, torch.Tensor]]]:
    """A function from input ids [batch, tokens] to the residual stream after each of `layers`.

    The forward pass stops at the deepest layer, so the blocks above it and the
    language-model head are never run. Rows are padded on the right: in a causal
    model no real token sees what stands to its right, so no mask is needed, and
    without one the fast attention kernels apply. Whether a graph for a backward
    pass is built is up to the caller.

    Yields:
        ids → {layer: [batch, tokens, d_model]} in the model's dtype and on its device.
        Layer n of n blocks is the stream before the final norm.
    """
    captured: dict[int, torch.Tensor] = {}
    deepest = max(layers)

    def keep(layer: int) -> Callable[[nn.Module, tuple, torch.Tensor | tuple[torch.Tensor, ...]], None]:
        def hook(_module: nn.Module, _inputs: tuple, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            captured[layer] = output[0] if isinstance(output, tuple) else output
            if layer == deepest:
                raise _DeepEnough

        return hook

    def run(input_ids: torch.Tensor) -> dict[int, torch.Tensor]:
        captured.clear()
        with suppress(_DeepEnough):
            lm.model(input_ids=input_ids, use_cache=False)
        return dict(captured)

    with lm.lock:
        handles = [hook_outputs(lm.blocks[layer - 1], keep(layer)) for layer in set(layers)]
        try:
            yield run
        finally:
            captured.clear()
            for handle in handles:
                handle.remove()


def tokens_per_batch(device: torch.device) -> int:
    """How many tokens, padding included, a batch may hold."""
    return TOKENS_PER_BATCH_CPU if device.type == "cpu" else TOKENS_PER_BATCH_ACCELERATOR


def response_activations(
    lm: LanguageModel,
    input_ids: Sequence[np.ndarray],
    response: Sequence[np.ndarray],
    layers: Sequence[int],
    stream_layers: Sequence[int] = (),
    budget: int | None = None,
) -> Iterator[list[RowActivations]]:
    """Mean response activation h_ℓ(x) of each row, batch by batch, in no particular order.

    Args:
        input_ids: one int array [tokens] a row, without padding.
        response: one bool array [tokens] a row; the tokens that the mean is over.
        layers: layers to average.
        stream_layers: layers whose activations are handed out for every token too.
        budget: tokens a batch, padding included; chosen by the device if None.

    Yields:
        the rows of one batch. A row without response tokens has means of NaN.
    """
    budget = budget or tokens_per_batch(lm.device)
    wanted = sorted({*layers, *stream_layers})
    with torch.inference_mode(), residual_stream(lm, wanted) as run:
        for batch in batches_by_length([len(ids) for ids in input_ids], budget):
            made = padded(batch, input_ids, response, lm.device)
            streams = run(made.ids)
            means = {layer: _mean(streams[layer].float(), made.response).cpu().numpy() for layer in layers}
            yield [
                RowActivations(
                    index=i,
                    mean={layer: means[layer][place] for layer in layers},
                    streams={
                        layer: streams[layer][place, : len(input_ids[i])].float().cpu().numpy()
                        for layer in stream_layers
                    },
                )
                for place, i in enumerate(batch)
            ]


def _mean(stream: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """Over the response tokens, where the stream is: the blocks of a model may lie on several devices."""
    weights = response.to(stream.device).float()
    return torch.einsum("bt,btd->bd", weights, stream) / weights.sum(1, keepdim=True)
