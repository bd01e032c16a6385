"""Gradients through frozen weights: what each linear layer read, and what its output was told.

For a linear layer y_t = W a_t the gradient of any quantity is Σ_t δ_t a_tᵀ with
δ_t its gradient with respect to y_t. A `GradientPass` runs the model forward and
backward and hands out a and δ of every tracked layer; no weight gradient is ever
formed, and the backward pass ends at the first tracked layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from concept_audit.errors import ModelError
from concept_audit.model.activations import residual_stream
from concept_audit.model.batches import Batch
from concept_audit.model.exact import at_exact_device
from concept_audit.model.hooks import hook_inputs, hook_outputs
from concept_audit.model.linear import LinearLayer
from concept_audit.model.load import LanguageModel
from concept_audit.model.precision import check_precision
from concept_audit.model.quantised import is_quantised, passes_gradients, quantised_modules

LOGITS_AT_ONCE = 1 << 24
"""Logits in memory at one time: 64 MiB in float32."""

Visit = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Takes a layer's index, its inputs a [rows, tokens, d_in] and output gradients δ [rows, tokens, d_out]."""


class ResidualTarget(Protocol):
    """A quantity of the residual stream, such as the projection onto a direction.

    Attributes:
        layer: how many blocks have run where it is read.
    """

    @property
    def layer(self) -> int: ...

    def __call__(self, stream: torch.Tensor) -> torch.Tensor:
        """From h [rows, tokens, d_model] to a value a token [rows, tokens]."""


class _HeadReached(Exception):
    """Ends a forward pass before the language-model head."""


def response_span(response: np.ndarray) -> int:
    """How many of a row's tokens matter to its loss and its targets: those up to its last response token."""
    places = np.flatnonzero(response)
    return int(places[-1]) + 1 if len(places) else 0


def supervised(batch: Batch) -> torch.Tensor:
    """bool [rows, tokens]: positions whose next token is a response token."""
    mask = torch.zeros_like(batch.response)
    mask[:, :-1] = batch.response[:, 1:]
    return mask


class LanguageModelHead:
    """Losses from the input of the language-model head, at supervised positions only.

    Logits are formed a few positions at a time, each with its gradient, and thrown
    away: what is kept is a vector of d_model numbers a position. A head that is more
    than a matrix (an adapter on it, quantised weights) is run as the module that it is.
    Models that do more to their logits than their head does (soft caps, scales) are
    recognised, and their own code does it.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        head = lm.model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{lm.name}: has no language-model head, so rows have no loss")
        self.module = head
        self._matrix = type(head) is nn.Linear and not is_quantised(head)
        self._whole = self._is_whole()

    def inputs(self, batch: Batch) -> torch.Tensor:
        """The head's input at supervised positions, row by row: [positions, d_model]."""
        hidden: list[torch.Tensor] = []

        def hook(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            hidden.append(arguments[0])
            raise _HeadReached

        handle = hook_inputs(self.module, hook)
        try:
            self._lm.model(input_ids=batch.ids, use_cache=False)
        except _HeadReached:
            pass
        finally:
            handle.remove()
        return hidden[0][supervised(batch)]

    def token_losses(self, batch: Batch, draw: torch.Tensor | None = None) -> torch.Tensor:
        """Negative log-likelihood at each supervised position, row by row: [positions].

        Args:
            draw: None takes the row's own next tokens. Numbers in [0, 1), one a position, take the
                tokens that they draw from the model's own predictions instead.
        """
        labels = batch.ids[:, 1:][supervised(batch)[:, :-1]]
        if not self._whole:
            logits = self._own_logits(batch)
            if draw is not None:
                labels = drawn(logits.detach(), draw)
            return F.cross_entropy(logits, labels, reduction="none")
        if not self._matrix:
            return _ModuleLoss.apply(self.inputs(batch), self.module, self._step(), labels, draw)
        return _HeadLoss.apply(self.inputs(batch), self.module.weight, self.module.bias, labels, draw)

    def _step(self) -> int:
        """Positions whose logits are in memory at one time."""
        return max(1, LOGITS_AT_ONCE // self._lm.model.config.get_text_config().vocab_size)

    def token_losses_plainly(self, batch: Batch) -> torch.Tensor:
        """As `token_losses`, in operations that PyTorch's forward mode knows: [positions]."""
        labels = batch.ids[:, 1:][supervised(batch)[:, :-1]]
        logits = self._own_logits(batch)
        return logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]

    def _own_logits(self, batch: Batch) -> torch.Tensor:
        """The model's own logits at supervised positions: [positions, vocabulary]."""
        mask = supervised(batch)
        handle = hook_inputs(self.module, lambda _module, arguments: (arguments[0][mask][None], *arguments[1:]))
        try:
            return self._lm.model(input_ids=batch.ids, use_cache=False).logits[0].to(self._lm.wide_dtype)
        finally:
            handle.remove()

    def _is_whole(self) -> bool:
        """Whether the head's output is the model's logits, also where it is large and a soft cap would bend it."""
        seen: list[torch.Tensor] = []

        def after(_module: nn.Module, _arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen.append(output)

        handles = [
            hook_inputs(self.module, lambda _module, arguments: (1000 * arguments[0], *arguments[1:])),
            hook_outputs(self.module, after),
        ]
        try:
            with self._lm.lock, torch.no_grad():
                ids = torch.tensor([[1, 2, 3]], device=self._lm.device)
                logits = self._lm.model(input_ids=ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return len(seen) == 1 and torch.equal(logits.float().nan_to_num(), seen[0].float().nan_to_num())


class GradientPass:
    """Runs batches forward and backward; hooks stay on the tracked layers until it is closed.

    Args:
        layers: the layers to hand out.

    Use it as a context manager, with gradients enabled.

    Raises:
        ModelError: the model computes in float16, or a quantised layer passes no gradient on.
    """

    def __init__(self, lm: LanguageModel, layers: Sequence[LinearLayer]):
        self._lm = lm
        self._layers = layers
        self._visit: Visit | None = None
        self._handles: list[RemovableHandle] = []
        self._trainable: list[nn.Parameter] = []
        self._head: LanguageModelHead | None = None
        self._shape: torch.Size | None = None

    def __enter__(self) -> Self:
        check_precision(self._lm.name, self._lm.model)
        self._trainable = [p for p in self._lm.model.parameters() if p.requires_grad]
        for parameter in self._trainable:
            parameter.requires_grad_(False)
        for index, layer in enumerate(self._layers):
            self._handles.append(hook_outputs(layer.module, self._hook(index)))
        self._handles += [
            hook_outputs(module, passes_gradients(self._lm.name, name))
            for name, module in quantised_modules(self._lm.model)
        ]
        return self

    def __exit__(self, *_exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter in self._trainable:
            parameter.requires_grad_(True)

    @property
    def head(self) -> LanguageModelHead:
        """The language-model head, looked at when first needed."""
        if self._head is None:
            self._head = LanguageModelHead(self._lm)
        return self._head

    def losses(
        self,
        batch: Batch,
        visit: Visit,
        draw: torch.Tensor | None = None,
        power: float = 1.0,
        check: Callable[[torch.Tensor], None] = lambda losses: None,
    ) -> torch.Tensor:
        """Losses of a batch; their gradients go to `visit`.

        Args:
            batch: rows, best cut at their `response_span`.
            draw: see `LanguageModelHead.token_losses`.
            power: a row of n supervised positions has Σ_t nll_t / n^power differentiated: 1 for the
                mean negative log-likelihood L(z), 1/2 for a Fisher sample of L(z).
            check: given the result before anything is differentiated; may raise.

        Returns:
            [rows], the mean negative log-likelihood of each row; NaN without supervised positions.
        """
        mask = supervised(batch)
        counts = mask.sum(1)
        with self._differentiating(batch):
            nll = self.head.token_losses(batch, draw)
            owners = mask.nonzero()[:, 0]
            sums = torch.zeros(len(counts), dtype=nll.dtype, device=nll.device)
            losses = sums.index_add_(0, owners, nll.detach()) / counts
            check(losses)
            weights = (1 / counts.to(nll.dtype).clamp(min=1) ** power)[owners]
            self._backward((nll * weights).sum(), visit)
        return losses

    def values(self, batch: Batch, target: ResidualTarget, visit: Visit) -> torch.Tensor:
        """Mean of a target over the response tokens of each row; the gradients go to `visit`.

        Returns:
            [rows].
        """
        mask = batch.response
        with self._differentiating(batch), residual_stream(self._lm, [target.layer]) as run:
            stream = run(batch.ids)[target.layer]
            wide = target(stream.to(self._lm.wide_dtype))
            means = torch.where(mask, wide, 0).sum(1) / mask.sum(1)
            self._backward(means.sum(), visit)
        return means.detach()

    @contextmanager
    def _differentiating(self, batch: Batch) -> Iterator[None]:
        """While it lasts, what runs through the tracked layers is this batch."""
        with self._lm.lock, torch.enable_grad():
            self._shape = batch.ids.shape
            try:
                yield
            finally:
                self._shape = None

    def _backward(self, value: torch.Tensor, visit: Visit) -> None:
        if not value.requires_grad:
            return  # no tracked layer can reach it
        self._visit = visit
        try:
            value.backward()
        finally:
            self._visit = None

    def _hook(self, index: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor | None]:
        def forward(
            _module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> torch.Tensor | None:
            if self._shape is None or not torch.is_grad_enabled():
                return None
            shape = self._shape
            inputs = self._by_row(arguments[0].detach(), index, shape)
            replaced = None
            if not output.requires_grad:
                # The first tracked layers: the graph begins at what they put out.
                output = replaced = output.detach().requires_grad_()

            def backward(gradient: torch.Tensor) -> None:
                if self._visit is not None:
                    with torch.no_grad():
                        self._visit(index, inputs, self._by_row(gradient, index, shape))

            output.register_hook(backward)
            return replaced

        return forward

    def _by_row(self, vectors: torch.Tensor, index: int, shape: torch.Size) -> torch.Tensor:
        """[rows, tokens, width], from vectors that some models keep as [rows × tokens, width]."""
        if vectors.shape[:-1].numel() != shape.numel():
            raise ModelError(
                f"{self._lm.name}: the linear layer {self._layers[index].name} does not see each token of a row once, "
                "so its influence cannot be told apart by row; use vector_filter or projection_difference"
            )
        return vectors.reshape(*shape, -1)


def drawn(logits: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """Tokens drawn from softmax(logits) by inverting its distribution function.

    Args:
        logits: [positions, vocabulary].
        draw: [positions], in [0, 1): the same numbers draw the same tokens in any batch.

    Returns:
        int64 [positions], on the device of the logits.
    """
    cumulative = torch.softmax(at_exact_device(logits), -1, dtype=torch.float64).cumsum(-1)
    reached = draw.to(cumulative)[:, None] * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, reached, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return places.to(logits.device)


class _LossOfVectors(torch.autograd.Function):
    """nll_t of vectors h_t, whose gradient ∂nll_t/∂h_t `forward` finds on the way and keeps."""

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None, None


class _HeadLoss(_LossOfVectors):
    """nll_t = −log softmax(W h_t + b)[label_t], with ∂nll_t/∂h_t found on the way."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        draw: torch.Tensor | None,
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden)
        step = max(1, LOGITS_AT_ONCE // len(weight))
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            logits = F.linear(hidden[part], weight, bias).to(wide)
            chosen = labels[part] if draw is None else drawn(logits, draw[part])
            chosen = chosen[:, None]
            at_label = logits.gather(1, chosen)
            normaliser = logits.logsumexp(1, keepdim=True)
            losses[part] = (normaliser - at_label)[:, 0]
            probabilities = logits.sub_(normaliser).exp_()
            probabilities.scatter_add_(1, chosen, torch.full_like(at_label, -1.0))
            gradient[part] = probabilities.to(hidden.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses


class _ModuleLoss(_LossOfVectors):
    """As `_HeadLoss`, for a head that is any module: its own derivative, some positions at a time."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        head: nn.Module,
        step: int,
        labels: torch.Tensor,
        draw: torch.Tensor | None,
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            with torch.enable_grad():
                vectors = hidden[part].detach().requires_grad_()
                logits = head(vectors).to(wide)
                chosen = labels[part] if draw is None else drawn(logits.detach(), draw[part])
                nll = F.cross_entropy(logits, chosen, reduction="none")
                (gradient[part],) = torch.autograd.grad(nll.sum(), vectors)
            losses[part] = nll.detach()
        ctx.save_for_backward(gradient)
        return losses
