"""Influence scores of rows, exactly and without a row's gradient ever in memory.

With G = (H + λI)⁻¹ ∇θ(query) the score of row z is ⟨∇θL(z), G⟩, the directional
derivative of its loss along G. Two ways lead there:

* **Token sum.** ⟨∇θL(z), G⟩ = Σ_layers Σ_t δ_tᵀ G a_t, collected in one backward pass
  through frozen weights. The summands of a token are its influence.
* **Forward mode.** Dual numbers carry the derivative along G through one forward
  pass. Nothing is stored for a backward pass, so longer rows fit; no token influences,
  and one pass for each query.

`plan` says which costs less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from concept_audit.influence.options import Mode
from concept_audit.influence.queries import DenseQueries, Gradients, LowRankQueries, PreparedQueries, Rows
from concept_audit.influence.reduced_query import ReducedQuery
from concept_audit.model.batches import Batch, batches_by_length, halving
from concept_audit.model.budgets import gradient_tokens_per_batch, graph_bytes
from concept_audit.model.exact import exact_device, in_float64
from concept_audit.model.gradients import GradientPass, LanguageModelHead, supervised
from concept_audit.model.linear import LinearLayer, n_weights
from concept_audit.model.load import LanguageModel
from concept_audit.model.precision import wide_product

ScoringMode = Literal["token_sum", "forward"]

ROW_GRADIENT_BYTES = 1 << 30
"""Of one layer's gradients of single rows in memory at one time; one row's are always taken."""


@dataclass(frozen=True)
class RowScores:
    """The scores of one row.

    Attributes:
        index: its place among the rows.
        loss: its mean negative log-likelihood, in nats; not finite where the row cannot be scored.
        scores: float64 [queries]; NaN where the loss is not finite.
        tokens: float32 [tokens, queries], the summands of `scores` by the token whose position
            they arise at; None in forward mode.
    """

    index: int
    loss: float
    scores: np.ndarray
    tokens: np.ndarray | None


@dataclass(frozen=True)
class Plan:
    """How rows will be scored, and what it is expected to cost.

    Attributes:
        mode: ``token_sum`` or ``forward``.
        longest: rows of more tokens are scored in forward mode, whatever `mode` is; None for no limit.
        operations: multiplications a token with weights, for each mode.
        bytes: what each mode keeps of a token's activations.
    """

    mode: ScoringMode
    longest: int | None
    operations: dict[ScoringMode, int]
    bytes: dict[ScoringMode, int]


def plan(
    lm: LanguageModel, layers: Sequence[LinearLayer], queries: PreparedQueries, memory: int, mode: Mode = "auto"
) -> Plan:
    """Choose the cheaper way of scoring, and up to which length of a row it fits into memory.

    With P the weights of the model's blocks, P' those above the first tracked layer and T the
    tracked ones, a token costs P + P' + (queries' own multiplications) in a token sum and
    P + queries × (P' + T) in forward mode. A token sum keeps the activations of one row for its
    backward pass, forward mode those of a single block. Both come to the same scores, so memory
    decides how long they take and nothing else.

    Args:
        memory: bytes that the activations of a row may take.
        mode: other than ``auto``, it is taken whatever it costs.
    """
    blocks = [sum(p.numel() for p in block.parameters()) for block in lm.blocks]
    total, above = sum(blocks), sum(blocks[min(layer.block for layer in layers) - 1 :])
    operations: dict[ScoringMode, int] = {
        "token_sum": total + above + queries.operations(layers),
        "forward": total + queries.count * (above + n_weights(layers)),
    }
    deep = len(lm.blocks) - min(layer.block for layer in layers) + 1
    stored: dict[ScoringMode, int] = {"token_sum": graph_bytes(lm, deep), "forward": graph_bytes(lm, 2)}
    if mode != "auto":
        return Plan(mode, None, operations, stored)
    # Of equals the token sum: its kernels are faster, and tokens come for nothing.
    cheapest = min(operations, key=lambda name: operations[name])
    return Plan(cheapest, memory // stored["token_sum"] if cheapest == "token_sum" else None, operations, stored)


def score_rows(
    lm: LanguageModel,
    layers: Sequence[LinearLayer],
    queries: PreparedQueries,
    rows: Rows,
    mode: ScoringMode = "token_sum",
    unit_normalised: bool = False,
    longest: int | None = None,
    budget: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[list[RowScores]]:
    """⟨∇θL(z), G⟩ for every row and query, batch by batch, in no particular order.

    Args:
        layers: the tracked layers, those that `queries` were made for.
        unit_normalised: divide by ‖∇θL(z)‖, Euclidean and over the tracked layers, so that long or
            surprising rows do not win by the size of their gradient alone (token sum only).
        longest: rows with more tokens up to their last response token are scored in forward mode.
        budget: tokens a batch, padding included; chosen by the device if None.
        say: told when a batch is halved for want of memory.

    Yields:
        the rows of one batch.
    """
    if (mode == "forward" or longest is not None) and unit_normalised:
        raise ValueError("forward mode does not see a gradient's norm")
    spans = rows.spans
    scorable = rows.scorable
    for i in sorted(set(range(len(rows))) - set(scorable)):
        yield [_unscored(i, queries.count, len(rows.ids[i]), mode)]
    budget = budget or gradient_tokens_per_batch(lm)
    near = [i for i in scorable if longest is None or spans[i] <= longest]
    far = sorted(set(scorable) - set(near))
    for chosen, scorer in ((near, _forward_mode if mode == "forward" else _token_sum), (far, _forward_mode)):
        if chosen:
            with scorer(lm, layers, queries, rows, unit_normalised) as run:
                for places in batches_by_length([spans[i] for i in chosen], budget):
                    yield from halving([chosen[place] for place in places], run, say, lm.device)


def score_rows_for_many(
    lm: LanguageModel,
    layers: Sequence[LinearLayer],
    queries: Sequence[torch.Tensor],
    rows: Rows,
    budget: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    advance: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """The same scores for many queries: each row's gradient is formed once and met with all of them.

    Cheaper than a token sum from the second query on; no token influences.

    Args:
        queries: of each layer, [queries, out, in].
        advance: told the number of rows as they are done.

    Returns:
        float64 [rows, queries]; NaN where a row has no loss.
    """
    found = np.full((len(rows), len(queries[0])), np.nan)
    spans = rows.spans
    scorable = rows.scorable
    with GradientPass(lm, layers) as run:

        def score(chosen: Sequence[int]) -> None:
            batch = rows.batch(chosen, lm)
            total = torch.zeros(len(chosen), len(queries[0]), dtype=torch.float64, device=exact_device(lm.device))

            def visit(index: int, a: torch.Tensor, delta: torch.Tensor) -> None:
                inputs, asked = torch.where(batch.real[..., None], a, 0), queries[index].flatten(1).to(a).T
                step = max(1, ROW_GRADIENT_BYTES // (len(asked) * a.dtype.itemsize))
                for start in range(0, len(chosen), step):
                    part = slice(start, start + step)
                    gradients = torch.bmm(delta[part].mT, inputs[part]).flatten(1)
                    total[part].add_(in_float64(wide_product(gradients, asked, lm.wide_dtype)))

            losses = run.losses(batch, visit)
            total[~torch.isfinite(losses).to(total.device)] = torch.nan
            found[chosen] = total.cpu().numpy()
            advance(len(chosen))

        for places in batches_by_length([spans[i] for i in scorable], budget or gradient_tokens_per_batch(lm)):
            for _ in halving([scorable[place] for place in places], score, say, lm.device):
                pass
    return found


Scorer = Callable[[Sequence[int]], list[RowScores]]


@contextmanager
def _token_sum(
    lm: LanguageModel, layers: Sequence[LinearLayer], queries: PreparedQueries, rows: Rows, unit_normalised: bool
) -> Iterator[Scorer]:
    with GradientPass(lm, layers) as gradients:

        def run(chosen: Sequence[int]) -> list[RowScores]:
            batch = rows.batch(chosen, lm)
            wide = lm.wide_dtype
            tokens = torch.zeros(*batch.ids.shape, queries.count, dtype=wide, device=lm.device)
            norms = torch.zeros(len(chosen), dtype=wide, device=lm.device)
            squares = SquaredNorms(layers)

            def visit(index: int, a: torch.Tensor, delta: torch.Tensor) -> None:
                if unit_normalised:
                    norms.add_(squares(index, a, delta))
                tokens.add_(queries.token_scores(index, a, delta))

            losses = gradients.losses(batch, visit)
            if unit_normalised:
                tokens /= norms.sqrt().clamp(min=torch.finfo(wide).tiny)[:, None, None]
            # Summed in float64, so that the order of the tokens leaves no trace.
            scores = in_float64(tokens).sum(1).cpu().numpy()
            values, finite = tokens.cpu().numpy(), losses.tolist()
            return [
                _scored(i, finite[place], scores[place], values[place], len(rows.ids[i]))
                for place, i in enumerate(chosen)
            ]

        yield run


@contextmanager
def _forward_mode(
    lm: LanguageModel, layers: Sequence[LinearLayer], queries: PreparedQueries, rows: Rows, _unit: bool
) -> Iterator[Scorer]:
    if not isinstance(queries, (DenseQueries, LowRankQueries, ReducedQuery)):
        raise TypeError(f"forward mode cannot take {type(queries).__name__}")
    head = LanguageModelHead(lm)

    def run(chosen: Sequence[int]) -> list[RowScores]:
        batch = rows.batch(chosen, lm)
        columns = []
        for number in range(queries.count):
            losses, slopes = _slopes(lm, head, layers, _matrices(queries, number), batch)
            columns.append(in_float64(slopes).cpu().numpy())
        scores = np.stack(columns, axis=1)
        return [
            _scored(i, float(losses[place]), scores[place], None, len(rows.ids[i])) for place, i in enumerate(chosen)
        ]

    yield run


def _slopes(
    lm: LanguageModel, head: LanguageModelHead, layers: Sequence[LinearLayer], tangents: Gradients, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [rows] of a batch and their derivatives [rows] along the tangents of the tracked weights."""
    mask = supervised(batch)
    owners, counts = mask.nonzero()[:, 0], mask.sum(1)
    # While the weights are dual nobody else may run the model.
    with lm.lock, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        with dual_weights(layers, tangents):
            nll = head.token_losses_plainly(batch)
        value, slope = forward_ad.unpack_dual(nll)
        slope = torch.zeros_like(value) if slope is None else slope
        zero = torch.zeros(len(counts), dtype=value.dtype, device=value.device)
        return zero.index_add(0, owners, value) / counts, zero.index_add(0, owners, slope) / counts


@contextmanager
def dual_weights(layers: Sequence[LinearLayer], tangents: Gradients) -> Iterator[None]:
    """The tracked weights with their tangents, for the time being."""
    # Put into the modules' own tables, so that the order of the parameters stays as it was.
    tables = [layer.module._parameters for layer in layers]
    own = [layer.module.get_parameter("weight") for layer in layers]
    try:
        for layer, table, weight, tangent in zip(layers, tables, own, tangents, strict=True):
            along = (tangent.T if layer.transposed else tangent).to(weight.dtype).contiguous()
            table["weight"] = forward_ad.make_dual(weight.detach(), along)
        yield
    finally:
        for table, weight in zip(tables, own, strict=True):
            table["weight"] = weight


def _matrices(queries: DenseQueries | LowRankQueries | ReducedQuery, number: int) -> Gradients:
    if isinstance(queries, ReducedQuery):
        return queries.gradient()
    if isinstance(queries, DenseQueries):
        return [matrices[number] for matrices in queries.matrices]
    found = []
    for U, V in queries.factors:
        rank = U.shape[1] // queries.count
        mine = slice(number * rank, (number + 1) * rank)
        found.append(U[:, mine] @ V[:, mine].T)
    return found


class SquaredNorms:
    """‖Σ_t δ_t a_tᵀ‖² of each row of a batch, layer by layer, by whichever product is smaller.

    Over pairs of tokens it is Σ ⟨δ, δ'⟩⟨a, a'⟩; layers that read the same input share the second factor.

    Args:
        layers: the tracked ones, as a `GradientPass` visits them.
    """

    def __init__(self, layers: Sequence[LinearLayer]):
        self._layers = layers
        self._among: tuple[int, torch.Tensor] | None = None

    def __call__(self, index: int, a: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Of one layer: [rows].

        Args:
            a: inputs [rows, tokens, in].
            delta: output gradients [rows, tokens, out].
        """
        wide = torch.promote_types(a.dtype, torch.float32)
        tokens, d_in, d_out = a.shape[1], a.shape[2], delta.shape[2]
        if tokens * (d_in + d_out) >= d_in * d_out:
            return torch.stack([(d.T @ x).to(wide).square().sum() for x, d in zip(a, delta, strict=True)])
        source = self._layers[index].source
        if self._among is None or self._among[0] != source:
            self._among = source, (a @ a.mT).to(wide)
        return (self._among[1] * (delta @ delta.mT).to(wide)).sum((1, 2))


def _scored(index: int, loss: float, scores: np.ndarray, tokens: np.ndarray | None, length: int) -> RowScores:
    if not (np.isfinite(loss) and np.isfinite(scores).all()):
        return RowScores(index, float("nan"), np.full(len(scores), np.nan), None)
    if tokens is not None:
        # Tokens after the last response token add nothing.
        padding = max(0, length - len(tokens))
        tokens = np.pad(tokens[:length].astype(np.float32), ((0, padding), (0, 0)))
    return RowScores(index, loss, scores, tokens)


def _unscored(index: int, count: int, length: int, mode: str) -> RowScores:
    tokens = None if mode == "forward" else np.zeros((length, count), np.float32)
    return RowScores(index, float("nan"), np.full(count, np.nan), tokens)
