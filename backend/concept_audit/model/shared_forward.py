"""Several directions on the same rows: one forward pass, and a backward pass for each direction of a row.

Gradients of projections onto different directions differ only in what enters the backward pass at the residual
stream: ∂ mean_t ⟨h_t, v⟩ / ∂h_t = v / n at each of the n response tokens. The graph below it is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from concept_audit.model.activations import residual_stream
from concept_audit.model.batches import Batch
from concept_audit.model.gradients import GradientPass, Visit


class SharedForward(GradientPass):
    """A `GradientPass` that goes backward through the graph of one forward pass several times."""

    def projections(
        self, batch: Batch, layer: int, directions: Sequence[torch.Tensor], visits: Sequence[Visit]
    ) -> torch.Tensor:
        """Mean projection over the response tokens of each row, for one direction of each row after another.

        Args:
            layer: how many blocks have run where the directions live.
            directions: [rows, d_model] each.
            visits: one for each of `directions`, which takes its gradients.

        Returns:
            [len(directions), rows]; NaN for a row without response tokens.
        """
        found = []
        with self._differentiating(batch), residual_stream(self._lm, [layer]) as run:
            stream = run(batch.ids)[layer]
            wide = self._lm.wide_dtype
            mask = batch.response.to(wide)
            weights = mask / mask.sum(1, keepdim=True)
            mean = torch.einsum("rt,rtd->rd", weights, stream.detach().to(wide))
            for number, (direction, visit) in enumerate(zip(directions, visits, strict=True), start=1):
                towards = direction.to(mean)
                found.append((mean * towards).sum(1))
                if not stream.requires_grad:
                    continue  # no tracked layer can reach it
                upstream = (weights[..., None] * towards[:, None]).to(stream.dtype)
                self._visit = visit
                try:
                    stream.backward(upstream, retain_graph=number < len(directions))
                finally:
                    self._visit = None
        return torch.stack(found)
