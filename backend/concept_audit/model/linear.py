"""The linear layers whose weights an influence score is about, found in any architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from concept_audit.errors import ModelError
from concept_audit.model.adapters import ADAPTER_ADVICE, adapter_kind, is_inactive, is_lora
from concept_audit.model.coverage import check_blocks
from concept_audit.model.load import LanguageModel
from concept_audit.model.quantised import is_quantised, quantisation
from concept_audit.model.reading import Reading, readings
from concept_audit.model.split import check_whole

Layers = Literal["linear", "lora"]
"""Which weights count: every linear layer's, or the low-rank matrices of an adapter alone."""


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
        ModelError: LoRA weights are asked for, and the model has none; or ``auto``, and its adapter is of
            another kind.
    """
    has_lora = any(is_lora(name) for name, _ in lm.blocks.named_modules())
    if weights == "lora" and not has_lora:
        raise ModelError(f"--weights lora: {lm.name} has no LoRA weights; leave the option out, or take linear")
    if weights == "auto":
        kind = adapter_kind(lm.model)
        if kind is not None and not has_lora:
            raise ModelError(
                f"{lm.name}: its adapter ({kind}) has no LoRA weights in the blocks, and no others are attributed to; "
                "pass --weights linear to attribute to the weights of its base"
            )
        return "lora" if has_lora else "linear"
    return weights


def linear_layers(
    lm: LanguageModel, first: int, last: int, weights: Layers = "linear", partial: bool = False
) -> list[LinearLayer]:
    """The linear layers of blocks `first` to `last`, counted from 1, in the order of the model.

    Args:
        weights: ``lora`` for the low-rank matrices of an adapter alone, ``linear`` for all but these.
        partial: do without the weights of these blocks that are in no such layer, or in one that does not
            see every token of a row once (an expert of a mixture sees those routed to it).

    Raises:
        ModelError: the blocks hold no such layer; their weights are quantised; the model is shared out over several
            devices; or, unless `partial`, more than a hundredth of their weights would be left out.
    """
    check_whole(lm.name, lm.model)
    blocks = list(enumerate(lm.blocks[first - 1 : last], start=first))
    paths = {id(module): name for name, module in lm.model.named_modules()}
    if weights == "linear" and any(is_quantised(module) for _, block in blocks for module in block.modules()):
        raise ModelError(
            f"{lm.name}: its weights are quantised ({quantisation(lm.model)}), so they have no gradient to attribute "
            f"to; {ADAPTER_ADVICE}"
        )
    found = [
        (paths[id(module)], number, module)
        for number, block in blocks
        for name, module in block.named_modules()
        if _is_linear(module) and is_lora(name) == (weights == "lora") and not is_inactive(block, name)
    ]
    seen = readings(lm, [module for _, _, module in found])
    kept = [(layer, seen[layer[2]]) for layer in found if layer[2] in seen]
    if not partial:
        check_blocks(lm, first, last, weights == "lora", {id(module.get_parameter("weight")) for module in seen})
    if not kept:
        raise ModelError(
            f"{lm.name}: blocks {first} to {last} have no linear layers "
            f"{'of an adapter ' if weights == 'lora' else ''}to attribute to; influence methods need some "
            "(vector_filter and projection_difference do without)"
        )
    sources = _sources([reading for _, reading in kept])
    return [
        LinearLayer(name, number, module, *_widths(module), source)
        for ((name, number, module), _), source in zip(kept, sources, strict=True)
    ]


def n_weights(layers: Sequence[LinearLayer]) -> int:
    """How many weights the layers have."""
    return sum(layer.d_in * layer.d_out for layer in layers)


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    # PEFT's layers are wrappers around an nn.Linear, which is found by itself.
    return isinstance(module, (nn.Linear, Conv1D)) and not hasattr(module, "base_layer") and not is_quantised(module)


def _widths(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def _sources(read: Sequence[Reading]) -> list[int]:
    """Which layers read the same tensor: for each the first that does."""
    first: dict[int, int] = {}
    return [first.setdefault(id(reading.tensor), index) for index, reading in enumerate(read)]
