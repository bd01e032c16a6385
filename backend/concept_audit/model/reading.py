"""What modules read of a batch: seen by running one, since no architecture says it in the same way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from concept_audit.model.hooks import hook_inputs
from concept_audit.model.load import LanguageModel

ROWS, TOKENS = 2, 8
CHANGED = 0.05
"""Of the largest change of any token's vector: less is rounding."""


@dataclass(frozen=True)
class Reading:
    """A module's input on the batch that was run.

    Attributes:
        tensor: [rows, tokens, d_in], or other dimensions before d_in, with the vectors in this order.
    """

    tensor: torch.Tensor


def readings(lm: LanguageModel, modules: Sequence[nn.Module]) -> dict[nn.Module, Reading]:
    """The modules that read every token of every row just once, with what they read.

    Modules that run several times in a pass, or never, or on some tokens (experts of a mixture), are
    left out. Two modules with one tensor read the same.
    """
    ids = torch.randint(3, lm.model.config.get_text_config().vocab_size, (ROWS, TOKENS), generator=_generator())
    seen = _run(lm, modules, ids)
    once = {module: tensors[0] for module, tensors in seen.items() if len(tensors) == 1}
    whole = {module: tensor for module, tensor in once.items() if tensor.shape[:-1] == (ROWS, TOKENS)}
    flat = {m: t for m, t in once.items() if m not in whole and t.shape[:-1].numel() == ROWS * TOKENS}
    if flat:
        whole |= _in_order(lm, flat, ids)
    return {module: Reading(whole[module]) for module in modules if module in whole}


def _in_order(
    lm: LanguageModel, flat: dict[nn.Module, torch.Tensor], ids: torch.Tensor
) -> dict[nn.Module, torch.Tensor]:
    """Those whose vectors stand in the order of the tokens: a token changes what stands at and after its place."""
    kept = dict(flat)
    for row, token in ((0, TOKENS - 1), (1, 1)):
        other = ids.clone()
        other[row, token] = 3 + (ids[row, token] - 2) % (ids.max() - 3)
        allowed = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
        allowed[row, token:] = True
        place = row * TOKENS + token
        for module, tensors in _run(lm, list(kept), other).items():
            same = len(tensors) == 1 and tensors[0].shape == flat[module].shape
            change = (tensors[0] - flat[module]).float().abs().amax(-1).flatten().cpu() if same else None
            changed = None if change is None else change > CHANGED * change.max()
            if changed is None or not changed[place] or (changed & ~allowed.flatten()).any():
                del kept[module]
    return kept


def _run(lm: LanguageModel, modules: Iterable[nn.Module], ids: torch.Tensor) -> dict[nn.Module, list[torch.Tensor]]:
    seen: dict[nn.Module, list[torch.Tensor]] = {module: [] for module in modules}

    def keep(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        seen[module].append(arguments[0])

    with lm.lock:
        handles = [hook_inputs(module, keep) for module in seen]
        try:
            with torch.no_grad():
                lm.model(input_ids=ids.to(lm.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    return seen


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
