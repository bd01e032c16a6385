"""Which weights a score would be silent about.

θ are the weights of linear layers. What else a model learns with (experts kept as one
tensor, an adapter on the embeddings) is counted here, and where it is much, scores
without it are refused: a ranking by 3% of a model must not look like one by the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set

from torch import nn

from concept_audit.errors import ModelError
from concept_audit.model.adapters import adapter_weights
from concept_audit.model.load import LanguageModel

SMALL_SHARE = 0.01
"""Of the weights, what may be left out without a word: routers, short convolutions, state matrices."""
SHOWN = 4
_ADVICE = (
    "Pass --partial to attribute to the other weights alone, or rank with vector_filter or projection_difference, "
    "which need no gradients"
)


def check_blocks(lm: LanguageModel, first: int, last: int, lora: bool, tracked: Set[int]) -> None:
    """Refuse scores that would leave out much of some blocks.

    Counted are weights of two or more dimensions: not norms and biases.

    Args:
        first, last: the blocks, counted from 1.
        lora: only the weights of adapters count; else all but these.
        tracked: ids of the parameters that are attributed to.

    Raises:
        ModelError: more than `SMALL_SHARE` is left out; names what, and how much.
    """
    adapted = adapter_weights(lm.model)
    of_adapters = {id(weight) for weight in adapted.values()}
    weights = {
        name: weight
        for block in lm.blocks[first - 1 : last]
        for name, weight in block.named_parameters(_path(lm.model, block))
        if _counts(name, weight) and (id(weight) in of_adapters) == lora
    }
    _check(
        weights,
        tracked,
        f"{lm.name}: influence would leave out %share of the {'adapter ' if lora else ''}weights of blocks {first} "
        f"to {last} (%names): only linear layers that see each token of a row once are attributed to, not the "
        f"experts of a mixture or other kinds of weights. {_ADVICE}",
    )


def check_outside(lm: LanguageModel, loss: bool) -> None:
    """Refuse scores that would leave out much of what an adapter trains outside the blocks.

    Args:
        loss: whether the query is a loss, which depends on the language-model head; a concept does not.

    Raises:
        ModelError: more than `SMALL_SHARE` of the adapter's weights is left out; names what, and how much.
    """
    adapted = {name: weight for name, weight in adapter_weights(lm.model).items() if weight.ndim > 1}
    inside = {id(weight) for weight in lm.blocks.parameters()}
    head = lm.model.get_output_embeddings()
    beyond = set() if loss or head is None else {id(weight) for weight in head.parameters()}
    weights = {name: weight for name, weight in adapted.items() if id(weight) not in beyond}
    _check(
        weights,
        inside,
        f"{lm.name}: its adapter also trains weights outside the blocks (%names: %share of its weights), and "
        f"influence would leave them out. {_ADVICE}",
    )


def _check(weights: Mapping[str, nn.Parameter], tracked: Set[int], sentence: str) -> None:
    missing = {name: weight.numel() for name, weight in weights.items() if id(weight) not in tracked}
    total = sum(weight.numel() for weight in weights.values())
    if sum(missing.values()) <= SMALL_SHARE * total:
        return
    kinds: dict[str, int] = {}
    for name, numel in missing.items():
        kind = re.sub(r"\.\d+(?=\.)", ".*", name)
        kinds[kind] = kinds.get(kind, 0) + numel
    largest = sorted(kinds, key=lambda kind: -kinds[kind])
    names = ", ".join(largest[:SHOWN]) + (f" and {len(largest) - SHOWN} more" if len(largest) > SHOWN else "")
    share = sum(missing.values()) / total
    shown = f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
    raise ModelError(sentence.replace("%share", shown).replace("%names", names))


def _counts(name: str, weight: nn.Parameter) -> bool:
    # Experts keep their biases as matrices, one row an expert.
    return weight.ndim > 1 and "bias" not in name.rsplit(".", 1)[-1]


def _path(model: nn.Module, block: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is block)
