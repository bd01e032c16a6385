"""The tokens that a direction of the residual stream makes more and less likely."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from concept_audit.model.load import LanguageModel
from concept_audit.model.split import at_hand
from concept_audit.progress import Stage

TOKENS = 10
CELLS_AT_ONCE = 1 << 25
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm")


def logit_effects(
    lm: LanguageModel, directions: np.ndarray, token_text: Callable[[int], str], stage: Stage
) -> tuple[list[list[str]], list[list[str]]]:
    """Per direction the tokens whose logits it raises most, and lowers most.

    The direction is read by the final norm's gain and the unembedding alone, as if nothing lay
    between (the logit lens; nostalgebraist 2020): blocks above its layer are left out.

    Args:
        directions: float32 [directions, d_model].
        token_text: token id → its text.
        stage: told the directions done.

    Returns:
        promoted and suppressed: `TOKENS` texts for each direction, none for a direction of zeros or a
        model without an unembedding.
    """
    head = lm.model.get_output_embeddings()
    empty: list[list[str]] = [[] for _ in directions]
    if head is None:
        stage.advance(len(directions))
        return empty, [list(none) for none in empty]
    weight = at_hand(head).detach()
    gain = _final_gain(lm).to(weight.device)
    promoted, suppressed = [], []
    step = max(1, CELLS_AT_ONCE // weight.shape[0])
    dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
    with torch.inference_mode():
        for start in range(0, len(directions), step):
            block = torch.from_numpy(directions[start : start + step]).to(weight.device, dtype)
            logits = (block * gain.to(dtype)) @ weight.to(dtype).T
            count = min(TOKENS, logits.shape[1])
            up, down = logits.topk(count).indices.tolist(), (-logits).topk(count).indices.tolist()
            for direction, ups, downs in zip(block, up, down, strict=True):
                live = bool(direction.any())
                promoted.append([token_text(t) for t in ups] if live else [])
                suppressed.append([token_text(t) for t in downs] if live else [])
            stage.advance(len(block))
    return promoted, suppressed


def _final_gain(lm: LanguageModel) -> torch.Tensor:
    """The gain of the norm before the unembedding: [d_model]; ones where there is none."""
    for module in lm.model.modules():
        for name in FINAL_NORMS:
            norm = getattr(module, name, None)
            if not isinstance(norm, nn.Module) or getattr(norm, "weight", None) is None:
                continue
            if any(child is lm.blocks for child in module.children()):
                # Gemma's norms multiply by one plus their weight.
                return at_hand(norm).detach() + ("gemma" in type(norm).__name__.lower())
    return torch.ones(lm.d_model)
