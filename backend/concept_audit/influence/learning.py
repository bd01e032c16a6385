"""Learning the projection of gradients from concepts that are drawn.

The formulas are in `concept_audit.influence.projection`. Here are the passes over a sample of the rows that
feed them: some concepts for the two sides, the rows' own gradients for the size of each number between
the sides and for the layers that are kept, and more concepts for what is asked of each number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from concept_audit.influence import projection
from concept_audit.influence.coding import allocate, order_and_packing
from concept_audit.influence.curvature import LayerCurvature
from concept_audit.influence.layer_choice import LayerChoice, choose_layers
from concept_audit.influence.pairs import weighted_sequences
from concept_audit.influence.projection import RowConcepts, Sides, TwoSided
from concept_audit.influence.queries import Rows
from concept_audit.influence.sides import SecondMoments, moment_bytes
from concept_audit.model.batches import batches_by_length
from concept_audit.model.block_groups import LayerGroup, block_groups
from concept_audit.model.budgets import gradient_tokens_per_batch
from concept_audit.model.gradients import GradientPass
from concept_audit.model.linear import LinearLayer
from concept_audit.model.load import LanguageModel
from concept_audit.model.memory import room_on
from concept_audit.progress import Progress
from concept_audit.store.packing import Packing

SIDE_BYTES = 3 << 30
"""What the moments behind the two-sided bases may take; the pass is repeated for the blocks that find no room."""
Directions = Mapping[int, np.ndarray]
"""Layer → float32 [rows, d_model]: which direction a row is asked for there; NaN for one drawn at random."""
AT_RANDOM: Directions = MappingProxyType({})
SCALE = 1e3
"""Concept gradients are small: they are scaled, so that their squares are far from underflow."""
LOSS = -1
"""The kind of a concept that is a row's loss; others are of the layer that they live at."""
COMPARED, COMPARED_CONCEPTS = torch.bfloat16, 128
"""In which numbers of rows and concepts are held while the layers' scores are compared, and on how many concepts."""


@dataclass(frozen=True)
class Learner:
    """What the projection of one model's gradients is learned with.

    Attributes:
        lm: in the precision of the index.
        layers: the tracked ones.
        curvatures: of each layer, by its index.
        concept_layers: where concepts may live.
        damping: of the queries to come.
        seed: of the concepts that are drawn.
        beta: of the DPO loss, where rows are preference pairs.
    """

    lm: LanguageModel
    layers: Sequence[LinearLayer]
    curvatures: Callable[[int], LayerCurvature]
    concept_layers: Sequence[int]
    damping: float
    seed: int
    progress: Progress
    beta: float = 0.0

    def sides(self, rows: Rows, asked: Directions = AT_RANDOM) -> list[Sides]:
        """The two-sided bases of each layer, learned for as many blocks at a time as find room.

        Args:
            rows: single sequences; a concept is drawn on each.
            asked: those that are not drawn at random.
        """
        itemsize = self.lm.wide_dtype.itemsize
        room = room_on(self.lm.device, SIDE_BYTES)
        groups = list(block_groups(self.layers, lambda layer: moment_bytes(layer, itemsize), room))
        found = []
        for number, group in enumerate(groups, start=1):
            named = "Two-sided bases" + (f", {number} of {len(groups)}" if len(groups) > 1 else "")
            moments = SecondMoments(group.layers, group.within(self.curvatures), self.damping, self.lm)
            self._gradients(rows, asked, moments, 1, named, layers=group.layers)
            if moments.begin_again():
                self._gradients(rows, asked, moments, 1, f"{named}, once more", layers=group.layers)
            with self.progress.stage("Eigenvectors of the bases", len(group.layers), "layers") as stage:
                for i in range(len(group.layers)):
                    found.append(moments.sides(i))
                    stage.advance()
        return found

    def numbers(
        self,
        sides: Sequence[Sides],
        rows: Rows,
        own: Rows,
        row_bytes: int,
        asked: Directions = AT_RANDOM,
        agreement: float = 1.0,
        origins: Sequence[int] = (),
    ) -> KeptNumbers:
        """Which numbers between the sides are kept, and in how many bits.

        Args:
            rows: single sequences, a concept is drawn on each; they may come more than once.
            own: rows whose own gradients tell how large each number is, as they are: of a preference pair that of
                the pair, in which much of its sides' cancels out.
            row_bytes: of each row, all layers together.
            asked: concepts that are not drawn at random.
            agreement: of the layers that are kept with all, as in `choose_layers`.
            origins: which of `own` each of the first of `rows` is, or is a side of; -1 for none.
        """
        ends = np.cumsum([0, *(s.left.shape[1] * s.right.shape[1] for s in sides)])
        if agreement < 1:
            of_own = [torch.zeros(len(own), int(b - a), dtype=COMPARED) for a, b in pairwise(ends)]
            squares = self._mean_squares(sides, own, ends, of_own)
            choice = self._choice(sides, rows, asked, of_own, agreement, origins)
            del of_own
            self.progress.say(
                f"Kept are {len(choice.places)} of {len(sides)} layers, whose scores agree to {choice.agreement:.3f} "
                "with those of all"
            )
        else:
            squares = self._mean_squares(sides, own, ends)
            choice = LayerChoice(list(range(len(sides))))
        group = LayerGroup.of(self.layers, choice.places)
        squares = torch.cat([squares[ends[place] : ends[place + 1]] for place in choice.places])
        wanted = self._concept_squares(sides, group, rows, asked)
        bits = allocate(squares * wanted, 8 * row_bytes)
        kept = bits > 0
        order, packing = order_and_packing(bits[kept])
        sizes = [int(ends[place + 1] - ends[place]) for place in choice.places]
        places = [mine.nonzero()[:, 0] for mine in kept.split(sizes)]
        return KeptNumbers(choice, places, squares[kept].sqrt(), (squares * wanted)[kept], order, packing)

    def _choice(
        self,
        sides: Sequence[Sides],
        rows: Rows,
        asked: Directions,
        of_own: Sequence[torch.Tensor],
        agreement: float,
        origins: Sequence[int],
    ) -> LayerChoice:
        """The layers that are kept, from the scores of rows on the first of the concepts that are drawn.

        Args:
            of_own: the rows' numbers between the sides, of each layer [rows, left × right].
        """
        count = min(len(rows), COMPARED_CONCEPTS)
        some = Rows(rows.ids[:count], rows.response[:count])
        of_concepts = [torch.zeros(count, numbers.shape[1], dtype=COMPARED) for numbers in of_own]

        def take(chosen: Sequence[int], batch: Mapping[int, torch.Tensor]) -> None:
            for index, values in batch.items():
                of_concepts[index][chosen] = values.to("cpu", COMPARED)

        everything = LayerGroup.of(self.layers, range(len(self.layers)))
        self._between(sides, everything, some, asked, 3, "Scores of each layer", take)
        scores = np.stack(
            [(x.float() @ y.float().T).numpy() for x, y in zip(of_own, of_concepts, strict=True)]
        )  # [layers, rows, concepts]
        counted = np.ones(scores.shape[1:], bool)
        for concept, row in enumerate(origins[:count]):
            if row >= 0:
                counted[row, concept] = False
        kinds = np.array([LOSS if kind is None else kind for kind in self._kinds(count)])
        return choose_layers(scores, kinds, agreement, counted)

    def _concept_squares(
        self, sides: Sequence[Sides], group: LayerGroup, rows: Rows, asked: Directions
    ) -> torch.Tensor:
        """E[y²] of drawn concepts' gradients between the sides, each of unit length over the layers of a group.

        Returns:
            float32 [numbers of these layers].
        """
        sizes = [sides[place].left.shape[1] * sides[place].right.shape[1] for place in group.places]
        squares = [torch.zeros(size, device=self.lm.device) for size in sizes]

        def take(_chosen: Sequence[int], batch: Mapping[int, torch.Tensor]) -> None:
            lengths = torch.stack([values.square().sum(1) for values in batch.values()]).sum(0)
            weights = 1 / lengths.clamp(min=torch.finfo(torch.float32).tiny)
            for index, values in batch.items():
                squares[index] += weights @ values.square()

        self._between(sides, group, rows, asked, 2, "Concepts drawn to learn the projection", take)
        return torch.cat(squares).cpu() / max(len(rows), 1)

    def _between(
        self,
        sides: Sequence[Sides],
        group: LayerGroup,
        rows: Rows,
        asked: Directions,
        salt: int,
        name: str,
        take: Callable[[Sequence[int], Mapping[int, torch.Tensor]], None],
    ) -> None:
        """Show drawn concepts' gradients between the sides, a batch at a time.

        Args:
            group: of which layers.
            take: given which of the rows, and by a layer's place in the group float32 [rows, left × right], scaled;
                layers that the concepts do not reach are left out, and so are batches that reach none.
        """
        dtype = self.lm.dtype
        curvatures = group.within(self.curvatures)
        both = (projection.sample_maps(curvatures(i), sides[at], self.damping) for i, at in enumerate(group.places))
        maps = {i: (left.to(dtype), right.to(dtype)) for i, (left, right) in enumerate(both)}
        batch: dict[int, torch.Tensor] = {}
        mine: list[int] = []

        def put(index: int, values: torch.Tensor) -> None:
            batch[index] = values.float() * SCALE

        def next_batch(chosen: Sequence[int] = ()) -> None:
            """What was put belongs to the batch before; all of it is there once the next one begins."""
            if batch:
                take(list(mine), batch)
            batch.clear()
            mine[:] = chosen

        self._gradients(rows, asked, TwoSided(maps, put), salt, name, next_batch, group.layers)
        next_batch()

    def _mean_squares(
        self, sides: Sequence[Sides], rows: Rows, ends: np.ndarray, kept: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """E[x²] of rows' own gradients between the sides: float32 [numbers of all layers].

        Args:
            kept: of each layer [rows, left × right], where the numbers themselves are put.
        """
        dtype, device = self.lm.dtype, self.lm.device
        rows_maps = (projection.row_maps(self.curvatures(i), s) for i, s in enumerate(sides))
        maps = {i: (left.to(dtype), right.to(dtype)) for i, (left, right) in enumerate(rows_maps)}
        squares, counted = torch.zeros(int(ends[-1]), device=device), 0
        parts = weighted_sequences(rows, self.beta)
        spans, places = parts.rows.spans, [np.flatnonzero(parts.owner == row).tolist() for row in range(len(rows))]
        # Between the sides there are too many numbers to hold a pair's side back: both go in one batch.
        lengths = [len(mine) * max(spans[i] for i in mine) for mine in places]
        owner, weights = torch.empty(0), torch.empty(0)
        chosen: list[int] = []

        def put(index: int, values: torch.Tensor) -> None:
            of_rows = torch.zeros(int(owner[-1]) + 1, values.shape[1], device=device)
            of_rows.index_add_(0, owner, weights * values.float())
            squares[ends[index] : ends[index + 1]] += of_rows.square().sum(0)
            if kept is not None:
                kept[index][chosen] = of_rows.to("cpu", kept[index].dtype)

        collect = TwoSided(maps, put)
        name = "Gradients of rows between the bases"
        with self.progress.stage(name, len(rows), "rows") as stage, GradientPass(self.lm, self.layers) as run:
            for chosen in batches_by_length(lengths, gradient_tokens_per_batch(self.lm)):
                mine = [i for row in chosen for i in places[row]]
                owner = torch.tensor([n for n, row in enumerate(chosen) for _ in places[row]], device=device)
                weights = torch.from_numpy(parts.weights[mine]).float().to(device)[:, None]
                batch = parts.rows.batch(mine, self.lm)
                run.losses(batch, collect.visitor(batch))
                counted += len(chosen)
                stage.advance(len(chosen))
        return squares.cpu() / max(counted, 1)

    def _kinds(self, count: int) -> list[int | None]:
        """At which layer the concept on each of so many rows is drawn; None for the row's loss, one in eight."""
        layers = self.concept_layers
        return [None if i % 8 == 7 else layers[(i - i // 8) % len(layers)] for i in range(count)]

    def _concepts(self, rows: Rows, asked: Directions, salt: int) -> Iterator[tuple[list[int], RowConcepts | None]]:
        """Batches of rows, each with concepts at one of the layers, or with their loss."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + salt)
        kinds = self._kinds(len(rows))
        spans, budget = rows.spans, gradient_tokens_per_batch(self.lm)
        for kind in dict.fromkeys(kinds):
            mine = [i for i, k in enumerate(kinds) if k == kind]
            for places in batches_by_length([spans[i] for i in mine], budget):
                chosen = [mine[place] for place in places]
                directions = torch.randn(len(chosen), self.lm.d_model, generator=generator)
                if kind is not None and kind in asked:
                    given = torch.from_numpy(asked[kind][chosen])
                    known = given.isfinite().all(1)
                    directions[known] = given[known]
                unit = torch.nn.functional.normalize(directions, dim=1).to(self.lm.device)
                yield chosen, None if kind is None else RowConcepts(kind, unit)

    def _gradients(
        self,
        rows: Rows,
        asked: Directions,
        collector: Any,
        salt: int,
        name: str,
        began: Callable[[list[int]], None] = lambda chosen: None,
        layers: Sequence[LinearLayer] | None = None,
    ) -> None:
        """Show a collector the gradients of concepts on rows, in all layers or in some."""
        tracked = self.layers if layers is None else layers
        with self.progress.stage(name, len(rows), "rows") as stage, GradientPass(self.lm, tracked) as run:
            for chosen, concept in self._concepts(rows, asked, salt):
                batch = rows.batch(chosen, self.lm)
                began(chosen)
                if concept is None:
                    run.losses(batch, collector.visitor(batch))
                else:
                    run.values(batch, concept, collector.visitor(batch))
                stage.advance(len(chosen))


@dataclass(frozen=True)
class KeptNumbers:
    """What is kept of the numbers between the two sides.

    Attributes:
        choice: which of the tracked layers, and what their scores count.
        places: of each of these int64 [kept], which numbers.
        spread: float32 [kept of these layers], the root mean square of each over rows.
        importance: float32 [kept of these layers], E[x²] E[y²] of each.
        order: int64 [packed numbers], which of the kept are packed, and in which order.
        packing: in how many bits.
    """

    choice: LayerChoice
    places: list[torch.Tensor]
    spread: torch.Tensor
    importance: torch.Tensor
    order: torch.Tensor
    packing: Packing

    @property
    def ends(self) -> torch.Tensor:
        """Where each layer's numbers end: int64 [layers]."""
        return torch.tensor([len(places) for places in self.places]).cumsum(0)
