"""Collecting the statistics behind the curvature, in passes over sampled rows.

The first pass collects the covariances of inputs and output gradients, the second
the squared gradients in their eigenbases. What a pass has collected can be put
away and added to what other passes over other rows have collected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from concept_audit.influence.curvature import squared_in_basis
from concept_audit.influence.options import FisherKind
from concept_audit.influence.queries import Rows
from concept_audit.influence.symmetric import from_upper, upper
from concept_audit.influence.wide import squared_with_rest
from concept_audit.model.batches import Batch, batches_by_length, halving
from concept_audit.model.budgets import gradient_tokens_per_batch
from concept_audit.model.exact import exact_device
from concept_audit.model.gradients import GradientPass, Visit, supervised
from concept_audit.model.linear import LinearLayer
from concept_audit.model.load import LanguageModel
from concept_audit.model.precision import wide_product
from concept_audit.sampling import uniform


@dataclass(frozen=True)
class Fisher:
    """Whose labels the gradients are of.

    Attributes:
        kind: ``sampled`` draws them from the model's predictions, ``empirical`` takes the data's.
        seed: of the draws; a row's draws depend on it and the row's key alone.
    """

    kind: FisherKind = "sampled"
    seed: int = 0

    @property
    def power(self) -> float:
        """How a row of n supervised positions is weighed: see `concept_audit.influence.curvature`."""
        return 0.5 if self.kind == "sampled" else 1.0

    def draw(self, keys: Sequence[str], batch: Batch) -> torch.Tensor | None:
        """Numbers that draw the labels of a batch, float64, one a supervised position; None for the data's labels."""
        if self.kind == "empirical":
            return None
        counts = supervised(batch).sum(1).tolist()
        numbers = [uniform(key, self.seed, count) for key, count in zip(keys, counts, strict=True)]
        return torch.from_numpy(np.concatenate(numbers)).to(exact_device(batch.ids.device))


class Accumulator(Protocol):
    """What a pass collects: named tensors that grow by addition."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The sums, to put away and to add to those of other rows."""

    def visitor(self, batch: Batch) -> Visit:
        """Adds a batch's inputs and output gradients."""

    def count(self, batch: Batch) -> None:
        """Counts a batch that has been added."""


class Covariances:
    """Sums of a_t a_tᵀ and δ_t δ_tᵀ over tokens, and the numbers of tokens and rows.

    Layers that read the same input share one sum. Those of an 8B model's block are 3 GB: they are put away as the upper
    halves that they are known by.
    """

    def __init__(self, layers: Sequence[LinearLayer], dtype: torch.dtype, device: torch.device):
        self._layers = layers
        self._inputs = {
            i: torch.zeros(layer.d_in, layer.d_in, dtype=dtype, device=device)
            for i, layer in enumerate(layers)
            if layer.source == i
        }
        self._outputs = {
            i: torch.zeros(layer.d_out, layer.d_out, dtype=dtype, device=device) for i, layer in enumerate(layers)
        }
        self._counts = torch.zeros(2, dtype=torch.float64)

    @classmethod
    def of(cls, layers: Sequence[LinearLayer], tensors: Mapping[str, torch.Tensor]) -> Covariances:
        """From sums that were put away, of all layers or of those that are asked for."""
        made = cls.__new__(cls)
        made._layers, made._counts = layers, tensors["counts"]
        made._inputs, made._outputs = {}, {}
        for i, layer in enumerate(layers):
            if f"inputs.{i}" in tensors:
                made._inputs[i] = from_upper(tensors[f"inputs.{i}"], layer.d_in)
            if f"outputs.{i}" in tensors:
                made._outputs[i] = from_upper(tensors[f"outputs.{i}"], layer.d_out)
        return made

    @staticmethod
    def names(layers: Sequence[LinearLayer], block: int) -> set[str]:
        """Of the tensors that the covariances of one block are made of."""
        of = [i for i, layer in enumerate(layers) if layer.block == block]
        return {"counts", *(f"outputs.{i}" for i in of), *(f"inputs.{layers[i].source}" for i in of)}

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {f"inputs.{i}": upper(tensor) for i, tensor in self._inputs.items()}
        found |= {f"outputs.{i}": upper(tensor) for i, tensor in self._outputs.items()}
        return {**found, "counts": self._counts}

    def visitor(self, batch: Batch) -> Visit:
        real = batch.real[..., None]

        def visit(index: int, a: torch.Tensor, delta: torch.Tensor) -> None:
            if index in self._inputs:
                _add_outer(self._inputs[index], torch.where(real, a, 0))
            # In the padding δ is 0 already: no loss hears of it.
            _add_outer(self._outputs[index], delta)

        return visit

    def count(self, batch: Batch) -> None:
        self._counts += torch.tensor([len(batch.rows), int(batch.real.sum())], dtype=torch.float64)

    def inputs(self, index: int) -> torch.Tensor:
        """A of a layer: [in, in], the mean over tokens."""
        return self._inputs[self._layers[index].source] / self._counts[1].item()

    def outputs(self, index: int) -> torch.Tensor:
        """S of a layer: [out, out], the mean over rows of the sum over tokens."""
        return self._outputs[index] / self._counts[0].item()


class SquaredGradients:
    """Sums over rows of (Q_Sᵀ G_z Q_A)², and of the squares of what wide sides leave out.

    Args:
        bases: Q_A and Q_S of each layer; if one of them is of a wide side, in the dtype of the sums.
    """

    def __init__(self, layers: Sequence[LinearLayer], bases: Sequence[tuple[torch.Tensor, torch.Tensor]]):
        self._layers = layers
        self._bases = bases
        self._sums = [
            torch.zeros(
                *map(_measured, (Q_S, Q_A)), dtype=torch.promote_types(Q_A.dtype, torch.float32), device=Q_A.device
            )
            for Q_A, Q_S in bases
        ]
        self._counts = torch.zeros(1, dtype=torch.float64)

    @classmethod
    def of(cls, layers: Sequence[LinearLayer], tensors: Mapping[str, torch.Tensor]) -> SquaredGradients:
        """From sums that were put away."""
        made = cls.__new__(cls)
        made._layers, made._bases, made._counts = layers, (), tensors["counts"]
        made._sums = [tensors[f"squares.{i}"] for i in range(len(layers))]
        return made

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**{f"squares.{i}": tensor for i, tensor in enumerate(self._sums)}, "counts": self._counts}

    def visitor(self, batch: Batch) -> Visit:
        rotated: dict[int, torch.Tensor] = {}

        def visit(index: int, a: torch.Tensor, delta: torch.Tensor) -> None:
            Q_A, Q_S = self._bases[index]
            source = self._layers[index].source
            if not all(len(Q) == Q.shape[1] for Q in (Q_A, Q_S)):
                self._sums[index] += squared_with_rest(a, delta, Q_A, Q_S)
                return
            if source not in rotated:
                # Layers with one input come one after the other: only the last is worth keeping.
                rotated.clear()
                rotated[source] = a.to(Q_A.dtype) @ Q_A
            self._sums[index] += squared_in_basis(rotated[source], delta.to(Q_S.dtype) @ Q_S)

        return visit

    def count(self, batch: Batch) -> None:
        self._counts += len(batch.rows)

    def eigenvalues(self, index: int) -> torch.Tensor:
        """Λ of a layer: [out, in], with means over the directions that a wide side leaves out as last row or column."""
        found, layer = self._sums[index] / self._counts[0].item(), self._layers[index]
        if found.shape[0] < layer.d_out:
            found[-1] /= layer.d_out - found.shape[0] + 1
        if found.shape[1] < layer.d_in:
            found[:, -1] /= layer.d_in - found.shape[1] + 1
        return found


def _measured(vectors: torch.Tensor) -> int:
    """How many squares are summed along a side: one for each eigenvector, and one for those that are left out."""
    width, kept = vectors.shape
    return kept if kept == width else kept + 1


class _NonFinite(Exception):
    def __init__(self, places: list[int]):
        self.places = places


def accumulate(
    lm: LanguageModel,
    layers: Sequence[LinearLayer],
    into: Accumulator,
    rows: Rows,
    keys: Sequence[str],
    fisher: Fisher,
    advance: Callable[[int], None] = lambda rows: None,
    say: Callable[[str], None] = lambda text: None,
    budget: int | None = None,
    result: str = "the curvature is fitted",
) -> None:
    """One pass over rows.

    Args:
        into: what is collected.
        keys: names of the rows, from which their labels are drawn.
        advance: told the number of rows as they are done.
        say: told of rows that are left out since their loss is not finite, and of halved batches.
        budget: tokens a batch, padding included; chosen by the device if None.
        result: what becomes of the pass, for what is said.
    """
    spans = rows.spans
    scorable = rows.scorable
    batches = batches_by_length([spans[i] for i in scorable], budget or gradient_tokens_per_batch(lm))
    with GradientPass(lm, layers) as gradients:
        for places in batches:
            chosen = [scorable[place] for place in places]
            _add_batch(gradients, into, rows, keys, fisher, chosen, lm, say, result)
            advance(len(chosen))


def _add_batch(
    gradients: GradientPass,
    into: Accumulator,
    rows: Rows,
    keys: Sequence[str],
    fisher: Fisher,
    chosen: Sequence[int],
    lm: LanguageModel,
    say: Callable[[str], None],
    result: str,
) -> None:
    attempts: list[tuple[set[int], set[int]]] = []

    def add(part: Sequence[int]) -> list[int]:
        """The rows whose loss is not finite; if there are any, nothing has been added."""
        # What an attempt had added before it ran out of memory stays: its halves leave these layers out.
        known = set().union(*(added for members, added in attempts if members > set(part)))
        added: set[int] = set()
        attempts.append((set(part), added))
        batch = rows.batch(part, lm)
        visit = into.visitor(batch)

        def once(index: int, a: torch.Tensor, delta: torch.Tensor) -> None:
            if index not in known:
                visit(index, a, delta)
                added.add(index)

        def check(losses: torch.Tensor) -> None:
            bad = (~torch.isfinite(losses)).nonzero()[:, 0].tolist()
            if bad:
                raise _NonFinite([part[place] for place in bad])

        try:
            gradients.losses(batch, once, fisher.draw([keys[i] for i in part], batch), fisher.power, check)
        except _NonFinite as found:
            return found.places
        into.count(batch)
        return []

    # No recursion: a function that holds itself holds the sums too, until the garbage collector comes by.
    def attempt(part: Sequence[int]) -> None:
        while part and (bad := add(part)):
            say(f"{len(bad)} rows have a loss that is not finite; {result} without them")
            part = [i for i in part if i not in bad]

    for _ in halving(chosen, attempt, say, lm.device):
        pass


def _add_outer(total: torch.Tensor, vectors: torch.Tensor) -> None:
    flat = vectors.flatten(0, 1)
    if flat.dtype == total.dtype:
        total.addmm_(flat.T, flat)
    else:
        total.add_(wide_product(flat.T, flat, total.dtype))
