"""What training on rows would do to the residual stream on prompts, to first order.

With g = Σ_z ∇θL(z) over some rows z, a step to the optimum of their loss under a quadratic penalty with the curvature
H moves the weights by Δθ = −(H + λI)⁻¹ g, and the stream by J Δθ, where J is the derivative of the stream with
respect to the weights (Koh & Liang 2017, arXiv 1703.04730, equation 2, applied to a quantity of the stream as by Kowal
et al. 2026, arXiv 2602.14869). J Δθ at every layer is one forward pass with dual numbers; no gradient of any concept
is formed, so all concepts cost as much as one.

For a concept f that is read off the stream, with G_f = (H + λI)⁻¹ ∇θ(−f) the query of its influence,

    ∇f · Δθ = −∇f · (H + λI)⁻¹ g = Σ_z ⟨∇L(z), G_f⟩,

the sum of the rows' exact concept-influence scores on the same prompts. All of it is linear in g.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from concept_audit.influence.fitting import Fisher, accumulate
from concept_audit.influence.queries import Gradients, Rows
from concept_audit.influence.scoring import dual_weights
from concept_audit.model.activations import residual_stream
from concept_audit.model.batches import Batch, batches_by_length
from concept_audit.model.budgets import large_tokens_per_batch
from concept_audit.model.gradients import Visit
from concept_audit.model.linear import LinearLayer
from concept_audit.model.load import LanguageModel
from concept_audit.model.precision import wide_product

CELLS_AT_ONCE = 1 << 24
"""Features times tokens that are encoded at one time."""
Encode = Callable[[torch.Tensor], torch.Tensor]
"""From the stream [tokens, d_model] to the activations of SAE features [tokens, features]."""


class GradientSum:
    """Σ_z weight_z ∇θL(z) over the rows of passes, one matrix [out, in] a tracked layer.

    It takes the room of the tracked weights, in float32 or wider.

    Args:
        weights: of each row of a pass.

    Attributes:
        sums: the matrices.
        added: places of the rows that have been added; a row whose loss is not finite is not among them.
    """

    def __init__(self, layers: Sequence[LinearLayer], weights: Sequence[float], dtype: torch.dtype, device: Any):
        self.sums: Gradients = [torch.zeros(layer.d_out, layer.d_in, dtype=dtype, device=device) for layer in layers]
        self.added: set[int] = set()
        self._weights = weights

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"sum.{i}": matrix for i, matrix in enumerate(self.sums)}

    def visitor(self, batch: Batch) -> Visit:
        weights = [self._weights[i] for i in batch.rows]

        def visit(index: int, a: torch.Tensor, delta: torch.Tensor) -> None:
            total = self.sums[index]
            scale = torch.tensor(weights, dtype=delta.dtype, device=delta.device)[:, None, None]
            total += wide_product((delta * scale).flatten(0, 1).T, a.flatten(0, 1), total.dtype)

        return visit

    def count(self, batch: Batch) -> None:
        self.added.update(batch.rows)


def gradient_sum(
    lm: LanguageModel,
    layers: Sequence[LinearLayer],
    rows: Rows,
    weights: Sequence[float],
    owners: Sequence[int],
    advance: Callable[[int], None] = lambda rows: None,
    say: Callable[[str], None] = lambda text: None,
    budget: int | None = None,
) -> tuple[Gradients, set[int]]:
    """Σ_z weight_z ∇θL(z): one pass forward and backward, in which no row's gradient is in memory.

    Args:
        rows: single sequences.
        weights: one a sequence; 1 for a row, those of `pair_weight` for the sides of a pair.
        owners: the row of the data that each sequence is of. Where a side of a pair has no finite loss the other
            counts for nothing either.
        advance: told the number of sequences as they are done.
        say: told of sequences that are left out since their loss is not finite, and of halved batches.
        budget: tokens a batch, padding included; chosen by the device if None.

    Returns:
        the sum; and the owners that are in it.
    """
    total = GradientSum(layers, weights, lm.wide_dtype, lm.device)
    data = Fisher("empirical")
    accumulate(lm, layers, total, rows, [""] * len(rows), data, advance, say, budget, "the forecast is")
    torn = {owners[i] for i in range(len(rows)) if i not in total.added}
    halves = [i for i in sorted(total.added) if owners[i] in torn]
    if halves:
        undo = GradientSum(layers, [-weights[i] for i in halves], lm.wide_dtype, lm.device)
        undo.sums = total.sums
        part = Rows([rows.ids[i] for i in halves], [rows.response[i] for i in halves])
        accumulate(lm, layers, undo, part, [""] * len(part), data, budget=budget)
    return total.sums, {owners[i] for i in total.added} - torn


@dataclass(frozen=True)
class PromptChange:
    """How the text of one prompt is read after a step of the weights, to first order.

    Attributes:
        index: its place among the prompts.
        streams: layer → float32 [d_model], the change of the mean over its response tokens.
        features: float32 [features], the change of the mean activation of SAE features; None without an SAE.
    """

    index: int
    streams: dict[int, np.ndarray]
    features: np.ndarray | None


def changes(
    lm: LanguageModel,
    layers: Sequence[LinearLayer],
    step: Gradients,
    prompts: Rows,
    at: Collection[int],
    encode: Encode | None = None,
    encoded_at: int | None = None,
    budget: int | None = None,
) -> Iterator[list[PromptChange]]:
    """J Δθ: one pass in forward mode over the prompts, no deeper than the deepest layer.

    Args:
        layers: the tracked layers.
        step: Δθ, one matrix a tracked layer.
        prompts: their response tokens are what is read.
        at: layers whose change is told.
        encode: of an SAE; its derivative is taken at the tokens that the features are read from.
        encoded_at: the layer that it reads.

    Yields:
        the prompts of one batch.
    """
    wanted = sorted({*at, *([encoded_at] if encode is not None and encoded_at is not None else [])})
    for chosen in batches_by_length(prompts.spans, budget or large_tokens_per_batch(lm)):
        batch = prompts.batch(chosen, lm)
        # While the weights are dual nobody else may run the model.
        with lm.lock, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            with dual_weights(layers, step), residual_stream(lm, wanted) as run:
                pairs = {layer: forward_ad.unpack_dual(stream) for layer, stream in run(batch.ids).items()}
            streams = {
                layer: (primal, torch.zeros_like(primal) if tangent is None else tangent)
                for layer, (primal, tangent) in pairs.items()
            }
        found = []
        for place, i in enumerate(chosen):
            mask = batch.response[place]
            means = {
                layer: streams[layer][1][place][mask].to(lm.wide_dtype).mean(0).cpu().numpy().astype(np.float32)
                for layer in at
            }
            features = None
            if encode is not None and encoded_at is not None:
                stream, along = (part[place][mask].to(lm.wide_dtype) for part in streams[encoded_at])
                features = mean_derivative(encode, stream, along).cpu().numpy().astype(np.float32)
            found.append(PromptChange(i, means, features))
        yield found


def mean_derivative(encode: Encode, stream: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """The mean over tokens of the derivative of feature activations at h along δh: [features].

    A feature that does not fire at a token has none there, as of `FeatureActivation`. The encoder is differentiated
    backward and what comes out, which is linear in the weights of its outputs, once more: some encoders' own
    functions know no forward mode.

    Args:
        stream, along: h and δh [tokens, d_model].
    """
    with torch.enable_grad():
        total: torch.Tensor | None = None
        step = len(stream)
        start = 0
        while start < len(stream):
            h = stream[start : start + step].detach().requires_grad_()
            activations = encode(h)
            if activations.numel() > CELLS_AT_ONCE and len(h) > 1:
                step = max(1, CELLS_AT_ONCE // activations.shape[-1])
                continue
            weights = torch.zeros_like(activations, requires_grad=True)
            (backward,) = torch.autograd.grad(activations, h, weights, create_graph=True)
            (forward,) = torch.autograd.grad(backward, weights, along[start : start + step].to(backward))
            summed = forward.sum(0)
            total = summed if total is None else total + summed
            start += len(h)
    if total is None:
        raise ValueError("no token to read")
    return (total / len(stream)).detach()
