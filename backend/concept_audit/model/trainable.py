"""Weights to be trained for a while, after which the model is as it was, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from concept_audit.model.linear import LinearLayer, linear_layers, resolve_weights
from concept_audit.model.load import LanguageModel, find_blocks
from concept_audit.model.options import Trained
from concept_audit.model.precision import converted

_ADAPTER = "evidence"


def private_copy(lm: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """A copy that no other thread sees, so that it may be trained while the model itself is in use."""
    with lm.lock:
        model = converted(lm.model, dtype, private=True)
    return replace(lm, model=model, blocks=find_blocks(model), lock=threading.RLock(), copies={})


@contextmanager
def trainable(lm: LanguageModel, what: Trained, rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
    """The parameters that fine-tuning changes; at the end they are gone, or what they were.

    Args:
        what: ``lora`` for the LoRA weights of an adapter, or new ones on every linear layer of the
            blocks where the model is no adapter (Hu et al. 2021, arXiv 2106.09685, with α = 2 × rank, so
            that the factor α/r is 2 at any rank); ``all`` for the linear layers of the blocks themselves.
        rank: of new LoRA weights.
        seed: of their first values.

    Raises:
        ModelError: the blocks have no linear layers, or, with ``all``, much else.
    """
    own_adapter = what == "lora" and resolve_weights(lm, "auto") == "lora"
    layers = linear_layers(lm, 1, lm.n_layers, "lora" if own_adapter else "linear", partial=what == "lora")
    if what == "lora" and not own_adapter:
        with _new_adapter(lm, layers, rank, seed) as parameters:
            yield parameters
    else:
        with weights_of(layers) as parameters:
            yield parameters


@contextmanager
def weights_of(layers: Sequence[LinearLayer]) -> Iterator[list[nn.Parameter]]:
    """The weights of chosen layers, open for training; put back at the end."""
    parameters = [layer.module.get_parameter("weight") for layer in layers]
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield parameters
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, before, strict=True):
                parameter.requires_grad_(False)
                parameter.grad = None
                parameter.copy_(values)


@contextmanager
def _new_adapter(
    lm: LanguageModel, layers: Sequence[LinearLayer], rank: int, seed: int
) -> Iterator[list[nn.Parameter]]:
    from peft import LoraConfig, inject_adapter_in_model

    known = set(vars(lm.model))
    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[layer.name for layer in layers],
        # GPT-2's layers keep their weight as [in, out].
        fan_in_fan_out=any(layer.transposed for layer in layers),
    )
    try:
        with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
            torch.manual_seed(seed)
            inject_adapter_in_model(settings, lm.model, adapter_name=_ADAPTER)
        parameters = [p for p in lm.model.parameters() if p.requires_grad]
        for parameter in parameters:
            # PEFT makes them float32, and then converts every input that they read.
            parameter.data = parameter.data.to(lm.dtype)
        yield parameters
    finally:
        _remove_adapter(lm.model)
        for name in set(vars(lm.model)) - known:
            delattr(lm.model, name)
        lm.model.requires_grad_(False).eval()


def _remove_adapter(model: nn.Module) -> None:
    """Put the layers back that an adapter was wrapped around; they were never changed."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)
