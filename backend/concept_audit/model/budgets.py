"""How many tokens a batch may hold that a model is differentiated on."""

from __future__ import annotations

from concept_audit.model.load import LanguageModel

TOKENS_PER_BATCH_CPU = 512
TOKENS_PER_BATCH_ACCELERATOR = 8192
GRAPH_BYTES = 24 << 30
"""Of what the backward pass of a batch keeps on an accelerator: of a large model it holds fewer tokens."""
LARGE_GRAPH_BYTES_CPU = 8 << 30
"""The same on a CPU, of a batch that is larger than usual."""
GRAPH_NUMBERS = 22
"""Numbers a token and block that a backward pass keeps, in widths of the residual stream.

Counted for Llama's block with a gated MLP of 8/3 the width; what else there is has the same size.
"""
LARGE = 4
"""Times as many tokens on a CPU, where larger batches are faster, of work that keeps little or is soon over."""


def graph_bytes(lm: LanguageModel, blocks: int) -> int:
    """Bytes a token that a backward pass through so many blocks keeps, by count and not measured."""
    return lm.dtype.itemsize * lm.d_model * GRAPH_NUMBERS * blocks


def gradient_tokens_per_batch(lm: LanguageModel) -> int:
    """How many tokens, padding included, a batch may hold when it also goes backward."""
    if lm.device.type == "cpu":
        return TOKENS_PER_BATCH_CPU
    return _within(GRAPH_BYTES, lm, TOKENS_PER_BATCH_ACCELERATOR)


def large_tokens_per_batch(lm: LanguageModel) -> int:
    """As `gradient_tokens_per_batch`, where nothing is kept for going back, or rows are few and their graph soon goes."""
    if lm.device.type == "cpu":
        return _within(LARGE_GRAPH_BYTES_CPU, lm, LARGE * TOKENS_PER_BATCH_CPU)
    return gradient_tokens_per_batch(lm)


def _within(room: int, lm: LanguageModel, most: int) -> int:
    """So many tokens, or as many as keep that many bytes, but no fewer than a CPU's batch has."""
    return max(TOKENS_PER_BATCH_CPU, min(most, room // graph_bytes(lm, len(lm.blocks))))
