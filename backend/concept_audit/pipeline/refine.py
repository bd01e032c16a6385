"""The second stage of a ranking from the gradient index: exact scores of its first rows, and of a control.

shards/influence/<ranking>/exact/plan.safetensors    the index's scores, and the rows to score, as they come
shards/influence/<ranking>/exact/<number>.safetensors    exact scores of one piece, and their token influences

The first rows come first, then the control, then the other rows that were selected; then, for as long as too few of the
true top are thought to be among them, further rows as the index ranks them. A piece is complete or absent; what is
there is never scored again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from concept_audit.influence.pairs import score_with_pairs
from concept_audit.influence.scoring import plan as scoring_plan
from concept_audit.influence.scoring import score_rows
from concept_audit.influence.two_stages import recall
from concept_audit.model.memory import free_bytes
from concept_audit.model.options import ModelSource
from concept_audit.pipeline.engine import Worker
from concept_audit.pipeline.kept_queries import (
    EXACT,
    GRAPH_SHARE,
    OWN,
    Opened,
    influence_shards,
    open_query,
    query_file,
)
from concept_audit.pipeline.sampling import as_rows
from concept_audit.pipeline.sources import Sources
from concept_audit.progress import Progress
from concept_audit.sampling import first_shuffled
from concept_audit.store.examples import has_loss, read_examples
from concept_audit.store.partition import ListedPartition
from concept_audit.store.queries import content_hashes
from concept_audit.store.shard_store import RowShards, ShardSet, intact, is_there, read_tensors

SELECTED_SHARE, LEAST_SELECTED = 0.03, 100
"""Of the rows, those that are scored exactly for their place in the index's ranking; and how many at least."""
CONTROL_SHARE, LEAST_CONTROL, MOST_CONTROL = 0.5, 50, 500
"""Rows drawn from the rest, as a share of the selected ones: what they say is not surer for ever more of them."""
PIECE = 50
"""Rows of a piece: a first answer, and what is lost when the work is stopped."""
SEED = 0
GROWTH, FURTHER_GROWTH = 1.5, 1.15
"""So much more has to be scored before the ranking is put in order anew: that takes a pass over all rows."""
TOP, GOAL = 50, 0.98
"""Scoring goes on until such a share of so many rows of the true top is thought to be found."""
FURTHER_SHARE = 1.0
"""Of the selected rows, so many further ones are scored at most."""
KEPT = ("approximate", "selected", "control")
"""What is kept of a plan."""


@dataclass(frozen=True)
class Plan:
    """Which rows are scored exactly, in which order.

    Attributes:
        approximate: the index's scores, float64 [rows]; NaN where a row has none.
        selected: the rows that it ranks first, best first, int64.
        control: drawn at random from the others, int64.
    """

    approximate: np.ndarray
    selected: np.ndarray
    control: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, draw: Callable[[np.ndarray, int], Iterable[int]]) -> Plan:
        """A plan for the index's scores.

        Args:
            draw: given which rows are not selected, bool [rows], and a number, draws so many of them.
        """
        order = np.argsort(-scores, kind="stable")
        order = order[~np.isnan(scores[order])]
        selected, rest = np.split(order, [min(len(order), max(LEAST_SELECTED, round(SELECTED_SHARE * len(scores))))])
        among = np.zeros(len(scores), bool)
        among[rest] = True
        wanted = min(max(LEAST_CONTROL, round(CONTROL_SHARE * len(selected))), MOST_CONTROL, len(rest))
        return cls(scores, selected, np.array(list(draw(among, wanted)), np.int64))

    @cached_property
    def further(self) -> np.ndarray:
        """Rows that are scored where too little of the true top is found, best first."""
        order = np.argsort(-self.approximate, kind="stable")
        planned = np.isnan(self.approximate)
        planned[self.selected] = planned[self.control] = True
        return order[~planned[order]][: round(FURTHER_SHARE * len(self.selected))]

    @cached_property
    def pieces(self) -> list[np.ndarray]:
        """The rows of each piece, as they are scored."""
        parts = (self.selected[:PIECE], self.control, self.selected[PIECE:], self.further)
        return [part[start : start + PIECE] for part in parts for start in range(0, len(part), PIECE)]

    @property
    def certain(self) -> int:
        """So many rows are scored whatever comes out."""
        return len(self.selected) + len(self.control)

    def steps(self) -> list[int]:
        """After how many pieces the ranking is worth putting in order anew; the last one is all of them.

        One step is where the rows that are certain end.
        """
        sizes = np.cumsum([len(piece) for piece in self.pieces])
        with_control, all_certain = (
            int(np.searchsorted(sizes, rows)) + 1
            for rows in (min(PIECE, len(self.selected)) + len(self.control), self.certain)
        )
        steps = [min(1, len(sizes))]
        for number in range(2, len(sizes)):
            growth = GROWTH if number < all_certain else FURTHER_GROWTH
            grown = number > with_control and sizes[number - 1] >= growth * sizes[steps[-1] - 1]
            if number in (with_control, all_certain) or grown:
                steps.append(number)
        return steps if steps[-1] == len(sizes) else [*steps, len(sizes)]

    def wanted(self, done: int) -> int:
        """How many rows are to be scored, as far as is known once so many are: those of the next step at least."""
        ends = np.cumsum([len(piece) for piece in self.pieces])[np.array(self.steps()) - 1]
        return next((int(end) for end in ends if end >= self.certain and end > done), done)

    def enough(self, exact: np.ndarray, done: int) -> bool:
        """Whether no further rows have to be scored once so many are.

        Args:
            exact: float64 [rows], NaN where there is none.
        """
        if done < self.certain or done == self.certain + len(self.further):
            return done >= self.certain
        found = recall(self.approximate, exact, TOP)
        return bool(np.isnan(found.value) or found.value >= GOAL * TOP)


def plan(sources: Sources, ranking: int, approximate: Callable[[], np.ndarray]) -> Plan:
    """The plan of a ranking's second stage, made when it is first asked for, and kept.

    Args:
        approximate: gives the index's scores, float64 [rows].
    """
    path = _directory(sources, ranking) / "plan.safetensors"
    if intact(path):
        there = read_tensors(path)
        return Plan(*(there[name].numpy() for name in KEPT))

    def draw(among: np.ndarray, wanted: int) -> list[int]:
        return sources.read(
            lambda cursor: first_shuffled(filter(lambda key: among[key[1]], content_hashes(cursor)), SEED, wanted)
        )

    found = Plan.of(approximate(), draw)
    kept = {name: getattr(found, name) for name in KEPT}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in kept.items()}
    sources.layout.shards.write_tensors(path, tensors, {"seed": SEED})
    return found


@dataclass(frozen=True)
class ExactScores:
    """Exact scores of some rows by a query that is kept.

    Attributes:
        tokens: the rows as the model reads them.
        query: where the query is.
        scores: to be made.
        rows: of each piece.
        beta: of the DPO loss, where rows are preference pairs.
    """

    tokens: RowShards
    query: Path
    scores: ShardSet
    rows: tuple[tuple[int, ...], ...]
    model: ModelSource
    beta: float = 0.0

    @property
    def outputs(self) -> tuple[ShardSet, ...]:
        return (self.scores,)

    def open(self, worker: Worker) -> tuple[Opened, int | None, Worker]:
        opened = open_query(self.query, worker.model(self.model))
        memory = int(GRAPH_SHARE * free_bytes(opened.lm.device))
        longest = scoring_plan(opened.lm, opened.layers, opened.queries, memory).longest
        return opened, None if opened.unit_normalised else longest, worker

    def run(self, opening: tuple[Opened, int | None, Worker], number: int) -> None:
        opened, longest, worker = opening
        rows = read_examples(self.tokens, self.rows[number])
        scores = np.full(len(rows), np.nan)
        kept: dict[str, torch.Tensor] = {}
        score = partial(
            score_rows,
            opened.lm,
            opened.layers,
            opened.queries,
            unit_normalised=opened.unit_normalised,
            longest=longest,
            say=worker.say,
        )
        for batch in score_with_pairs(score, as_rows(rows), self.beta):
            for found in batch:
                scores[found.index] = found.scores[0]
                if found.tokens is not None and has_loss(rows[found.index]):
                    kept[f"tokens.{rows[found.index].example_id}"] = torch.from_numpy(found.tokens[:, 0].copy())
            worker.advance(len(batch))
        ids = torch.tensor(self.rows[number], dtype=torch.int64)
        self.scores.write_tensors(number, {"ids": ids, "scores": torch.from_numpy(scores), **kept})


def exact_scores(sources: Sources, ranking: int, planned: Plan, progress: Progress) -> Iterator[tuple[int, np.ndarray]]:
    """Score the rows of a plan, or what is missing of them; the query has to be kept.

    Who has `Plan.enough` asks for no more.

    Yields:
        after each of the plan's steps that had something to do, after the rows that are certain, and after the last,
        how many rows of the plan are done; and the exact scores so far, float64 [rows], NaN where there is none, and of
        rollouts not weighed.
    """
    tokens = sources.shards("tokens")
    shards = influence_shards(sources.layout.shards, ranking, tokens.partition)
    exact = np.full(len(planned.approximate), np.nan)
    done, before = 0, 0
    everything = [tuple(map(int, piece)) for piece in planned.pieces]
    for step in planned.steps():
        partition = ListedPartition(tuple(len(piece) for piece in everything[:step]))
        pieces = ShardSet(sources.layout.shards, shards.kind, f"{shards.key}/{EXACT}", partition)
        idle = not pieces.missing()
        if not idle:
            pieced = tuple(everything[:step])
            work = ExactScores(tokens, query_file(shards), pieces, pieced, sources.model_source, sources.beta)
            sizes = {number: partition.size(number) for number in range(step)}
            sources.driver(progress).finish(work, "Exact scores, best rows first", sizes)
        for number in range(before, step):
            kept = read_tensors(pieces.path(number))
            exact[kept["ids"].numpy()] = kept["scores"].numpy()
            done += len(kept["ids"])
        before = step
        if is_there(shards.file(OWN)):
            # Rows that are queries are scored by the others, whoever selected them.
            own = read_tensors(shards.file(OWN))
            exact[own["ids"].numpy()] = own["scores"].numpy()
        if not idle or done == planned.certain or step == len(everything):
            yield done, exact.copy()


def _directory(sources: Sources, ranking: int) -> Path:
    shards = influence_shards(sources.layout.shards, ranking, sources.shards("tokens").partition)
    return shards.file(EXACT)
