"""What training really does to the text of prompts: read before and after, by SAE features and in the stream.

Everything is read as a forecast reads it (`concept_audit.influence.forecast.changes`, whose zeroth order this is): the
mean over a prompt's response tokens of the stream, and of each feature's activation by the SAE's encoder; then the mean
over the prompts.

Beside each run stands one step of plain gradient descent on the mean loss of the same rows, from the same first
weights, as long as the run's own way, ‖θ_step − θ₀‖ = ‖θ_run − θ₀‖ over the weights that are trained: what their
gradient alone, without curvature and without an optimiser, has to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from concept_audit.evidence.options import Recipe
from concept_audit.evidence.training import Likelihood, Training, shorter, train, usable_rows
from concept_audit.influence.forecast import Encode
from concept_audit.influence.queries import Rows
from concept_audit.model.activations import residual_stream, tokens_per_batch
from concept_audit.model.batches import batches_by_length
from concept_audit.model.gradients import LanguageModelHead
from concept_audit.model.load import LanguageModel
from concept_audit.model.trainable import trainable

TOKENS_ENCODED_AT_ONCE = 512


@dataclass(frozen=True)
class Prompted:
    """What is read of a model.

    Attributes:
        prompts: their response tokens are read.
        layers: whose streams are told.
        encode: of an SAE; None for none.
        encoded_at: the layer that it reads.
    """

    prompts: Rows
    layers: tuple[int, ...]
    encode: Encode | None = None
    encoded_at: int | None = None


@dataclass(frozen=True)
class Reading:
    """How a model reads the prompts, or the difference of two readings.

    Attributes:
        streams: layer → float64 [d_model], the mean of the stream.
        features: float64 [features], mean activations; empty without an SAE.
    """

    streams: dict[int, np.ndarray]
    features: np.ndarray

    def less(self, other: Reading) -> Reading:
        """The change from another reading to this one."""
        streams = {layer: mean - other.streams[layer] for layer, mean in self.streams.items()}
        return Reading(streams, self.features - other.features)


@dataclass(frozen=True)
class RealChange:
    """What a run changed.

    Attributes:
        trained: the change by fine-tuning.
        stepped: the change by one plain step that is as long.
        length: ‖θ_run − θ₀‖ over the weights that are trained.
        training: the run's own report.
    """

    trained: Reading
    stepped: Reading
    length: float
    training: Training


def read(lm: LanguageModel, prompted: Prompted) -> Reading:
    """How the model reads the prompts, in one pass that is no deeper than the deepest layer."""
    at = {prompted.encoded_at} if prompted.encode is not None and prompted.encoded_at is not None else set()
    wanted = sorted({*prompted.layers, *at})
    sums: dict[int, torch.Tensor] = {}
    features: torch.Tensor | None = None
    prompts = prompted.prompts
    for chosen in batches_by_length(prompts.spans, tokens_per_batch(lm.device)):
        batch = prompts.batch(chosen, lm)
        with lm.lock, torch.no_grad(), residual_stream(lm, wanted) as run:
            streams = run(batch.ids)
        for place in range(len(chosen)):
            tokens = {
                layer: stream[place][batch.response[place]].to(lm.wide_dtype) for layer, stream in streams.items()
            }
            for layer in prompted.layers:
                mean = tokens[layer].mean(0).double().cpu()
                sums[layer] = sums[layer] + mean if layer in sums else mean
            for layer in at:
                mean = mean_activations(prompted.encode, tokens[layer])  # type: ignore[arg-type]
                features = mean if features is None else features + mean
    found = np.zeros(0) if features is None else features.numpy() / len(prompts)
    return Reading({layer: total.numpy() / len(prompts) for layer, total in sums.items()}, found)


def mean_activations(encode: Encode, stream: torch.Tensor) -> torch.Tensor:
    """The mean over tokens of feature activations: float64 [features].

    Args:
        stream: [tokens, d_model].
    """
    with torch.no_grad():
        parts = [encode(part).double().sum(0).cpu() for part in stream.split(TOKENS_ENCODED_AT_ONCE)]
    return torch.stack(parts).sum(0) / len(stream)


def real_change(
    lm: LanguageModel,
    rows: Rows,
    keys: Sequence[str],
    recipe: Recipe,
    seed: int,
    prompted: Prompted,
    advance: Callable[[int], None] = lambda rows: None,
) -> RealChange:
    """Fine-tune on rows and read the prompts; go back, take one plain step that is as long, and read them again.

    Args:
        lm: changed in place for the time being; see `concept_audit.model.trainable.private_copy`.
        rows: those to train on.
        keys: one a row, by which rows are shuffled.
        seed: of the order of the rows and of the first LoRA weights.
        advance: told the number of rows as they are done.

    Raises:
        ConceptError: no row has a response token within `recipe.max_tokens`.
    """
    objective = Likelihood(shorter(rows, recipe.max_tokens))
    usable = usable_rows(objective, len(keys), recipe)
    with trainable(lm, recipe.weights, recipe.rank, seed) as parameters:
        before = read(lm, prompted)
        start = [parameter.detach().clone() for parameter in parameters]
        training = train(lm, parameters, objective, usable, keys, recipe, seed, advance)
        trained = read(lm, prompted).less(before)
        length = _norm([parameter.detach() - first for parameter, first in zip(parameters, start, strict=True)])
        with torch.no_grad():
            for parameter, first in zip(parameters, start, strict=True):
                parameter.copy_(first)
                parameter.grad = None
        objective.add_gradient(lm, LanguageModelHead(lm), usable)
        gradients = [parameter.grad for parameter in parameters]
        slope = _norm([gradient for gradient in gradients if gradient is not None])
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None and slope:
                    parameter.sub_(length / slope * gradient)
                parameter.grad = None
        stepped = read(lm, prompted).less(before)
    return RealChange(trained, stepped, length, training)


def _norm(parts: Sequence[torch.Tensor]) -> float:
    return float(sum(float(part.double().square().sum()) for part in parts)) ** 0.5
