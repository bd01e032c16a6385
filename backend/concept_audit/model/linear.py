"""The linear layers whose weights an influence score is about, found in any architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from concept_audit.errors import ModelError
from concept_audit.model.load import LanguageModel

Layers = Literal["linear", "lora"]
"""Which weights count: every linear layer's, or the low-rank matrices of an adapter alone."""
_LORA = ("lora_A", "lora_B")


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer y = W a (+ b) inside a transformer block.

    Attributes:
        name: its path in the model.
        block: how many blocks have run once it has: its weights can reach ``hidden_states[block]`` and later.
        module: an `nn.Linear`, or GPT-2's ``Conv1D``, which keeps its weight transposed.
        d_in, d_out: lengths of a and y.
        source: index, within the same list, of the first layer that reads the same input
            (query, key and value projections share one); its own index if there is none before.
    """

    name: str
    block: int
    module: nn.Module
    d_in: int
    d_out: int
    source: int

    @property
    def transposed(self) -> bool:
        """Whether the module keeps W as [in, out]."""
        return not isinstance(self.module, nn.Linear)


def resolve_weights(lm: LanguageModel, weights: Literal["auto", "linear", "lora"]) -> Layers:
    """``auto`` is what fine-tuning would train: the LoRA weights of an adapter, else every linear layer.

    Raises:
        ModelError: LoRA weights are asked for, and the model has none.
    """
    has_lora = any(_is_lora(name) for name, _ in lm.blocks.named_modules())
    if weights == "lora" and not has_lora:
        raise ModelError(f"--weights lora: {lm.name} has no LoRA weights; leave the option out, or take linear")
    if weights == "auto":
        return "lora" if has_lora else "linear"
    return weights


def linear_layers(lm: LanguageModel, first: int, last: int, weights: Layers = "linear") -> list[LinearLayer]:
    """The linear layers of blocks `first` to `last`, counted from 1, in the order of the model.

    Args:
        weights: ``lora`` for the low-rank matrices of an adapter alone, ``linear`` for all but these.

    Raises:
        ModelError: the blocks hold no such layer, or one that does not see whole rows (the
            experts of a mixture see single tokens, and whose they are is lost).
    """
    paths = {id(module): name for name, module in lm.model.named_modules()}
    found = [
        (paths[id(module)], number, module)
        for number, block in enumerate(lm.blocks[first - 1 : last], start=first)
        for name, module in block.named_modules()
        if _is_linear(module) and _is_lora(name) == (weights == "lora")
    ]
    if not found:
        raise ModelError(
            f"{lm.name}: blocks {first} to {last} have no linear layers "
            f"{'of an adapter' if weights == 'lora' else ''} to attribute to; influence methods need some "
            "(vector_filter and projection_difference do without)"
        )
    with lm.lock:
        sources = _sources(lm, [module for _, _, module in found], [name for name, _, _ in found])
    return [
        LinearLayer(name, number, module, *_widths(module), source)
        for (name, number, module), source in zip(found, sources, strict=True)
    ]


def n_weights(layers: Sequence[LinearLayer]) -> int:
    """How many weights the layers have."""
    return sum(layer.d_in * layer.d_out for layer in layers)


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    # PEFT's layers are wrappers around an nn.Linear, which is found by itself.
    return isinstance(module, (nn.Linear, Conv1D)) and not hasattr(module, "base_layer")


def _is_lora(name: str) -> bool:
    return any(part in _LORA for part in name.split("."))


def _widths(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def _sources(lm: LanguageModel, modules: Sequence[nn.Module], names: Sequence[str]) -> list[int]:
    """Which layers read the same tensor, seen on two rows of two tokens."""
    inputs: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs[index] = arguments[0]

        return hook

    handles = [module.register_forward_pre_hook(keep(i)) for i, module in enumerate(modules)]
    try:
        with torch.no_grad():
            lm.model(input_ids=torch.zeros(2, 2, dtype=torch.long, device=lm.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for index, name in enumerate(names):
        if index not in inputs or inputs[index].shape[:2] != (2, 2):
            raise ModelError(
                f"{lm.name}: the linear layer {name} does not see whole rows (a mixture of experts?), so its "
                "influence cannot be told apart by row; use vector_filter or projection_difference"
            )
    first: dict[int, int] = {}
    return [first.setdefault(id(inputs[index]), index) for index in range(len(modules))]
