"""The counterfactual runs: which there are, and doing them, each a unit that is whole or absent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from concept_audit.evidence.judge import Judge
from concept_audit.evidence.measures import answered_rows, measure, projections
from concept_audit.evidence.options import Recipe
from concept_audit.evidence.preferences import Preference, reference_margins, sides_of
from concept_audit.evidence.steering import Steering
from concept_audit.evidence.training import Likelihood, Objective, minimised, shorter
from concept_audit.influence.queries import Rows
from concept_audit.model.chat import ChatRenderer
from concept_audit.model.linear import resolve_weights
from concept_audit.model.load import LanguageModel
from concept_audit.model.options import ModelSource
from concept_audit.model.pairs import exchanged
from concept_audit.model.precision import resolve_precision
from concept_audit.model.steering import steered
from concept_audit.model.trainable import private_copy
from concept_audit.pipeline.engine import Worker, missing_of
from concept_audit.pipeline.options import key
from concept_audit.pipeline.sources import Sources
from concept_audit.pipeline.validation.options import CONCEPT, RANDOM, VERSION, ResolvedOptions
from concept_audit.pipeline.validation.setting import Setting, digest
from concept_audit.pipeline.validation.shared import Arms, Shared, read_shared, write_shared
from concept_audit.progress import Progress
from concept_audit.sampling import shuffled
from concept_audit.store.evidence import Units, read_unit, units_of, write_unit
from concept_audit.store.shard_store import ShardSet


@dataclass(frozen=True)
class Run:
    """One fine-tuning run, to be done or done.

    Attributes:
        kind: ``base``, ``whole``, ``removal``, ``swap``, ``rewrite``, ``retention``, ``steer`` or ``subset``.
        method: the candidate whose top rows are removed, swapped, rewritten or retained; of runs that steer
            ``concept`` or ``random``; empty for the other kinds.
        share: of the rows that are removed, swapped, rewritten, retained or drawn; of runs that steer, how strongly.
        number: of the subset; 0 for the other kinds.
        seed: of the training.
        rows: places of the rows to train on, in order.
        swapped: of them, the preference pairs whose sides are exchanged.
        rewritten: of them, those whose response is another.
    """

    kind: str
    method: str
    share: float
    number: int
    seed: int
    rows: tuple[int, ...]
    swapped: tuple[int, ...] = ()
    rewritten: tuple[int, ...] = ()


def plan(setting: Setting, scores: dict[str, np.ndarray], options: ResolvedOptions) -> list[Run]:
    """Every run of a validation, the cheapest to learn from first.

    Args:
        scores: candidate → float64 [rows].
    """
    pool = setting.ids
    everything = tuple(pool.tolist())
    runs = [Run("base", "", 0.0, 0, 0, ())]
    for seed in range(options.seeds):
        if seed < options.whole_seeds:
            runs.append(Run("whole", "", 1.0, 0, seed, everything))
        for share in options.shares if options.removed else ():
            count = max(1, round(share * len(pool)))
            for method in (RANDOM, *options.removed):
                if method == RANDOM:
                    order = pool[shuffled([f"random:{i}" for i in pool.tolist()], seed)]
                else:
                    # Rows without a score cannot be flagged, so they come last.
                    worth = np.where(np.isfinite(scores[method][pool]), scores[method][pool], -np.inf)
                    order = pool[np.argsort(-worth, kind="stable")]
                top = set(order[:count].tolist())
                rest = tuple(i for i in pool.tolist() if i not in top)
                runs.append(Run("removal", method, share, 0, seed, rest))
                if setting.pairs:
                    runs.append(Run("swap", method, share, 0, seed, everything, tuple(sorted(top))))
                if options.rewrite:
                    runs.append(Run("rewrite", method, share, 0, seed, everything, rewritten=tuple(sorted(top))))
                if options.retention:
                    runs.append(Run("retention", method, share, 0, seed, tuple(sorted(top))))
        for strength in options.strengths if options.steer else ():
            runs += [Run("steer", method, strength, 0, seed, everything) for method in (RANDOM, CONCEPT)]
    size = max(1, round(options.subset_share * len(pool)))
    for number in range(options.subsets):
        order = pool[shuffled([f"subset:{i}" for i in pool.tolist()], number)]
        drawn = tuple(sorted(order[:size].tolist()))
        for seed in range(options.subset_seeds):
            runs.append(Run("subset", "", options.subset_share, number, seed, drawn))
    return runs


def done_runs(
    sources: Sources,
    setting: Setting,
    runs: Sequence[Run],
    arms: Arms,
    options: ResolvedOptions,
    lm: LanguageModel,
    progress: Progress,
) -> list[dict[str, Any]]:
    """What each run measured; runs that are done already are read.

    The others are work of the audit's engine, a run a shard.
    """
    dtype = precision_of(lm, options.recipe)
    common = shared_by_runs(sources, setting, options, lm, dtype)
    units = [key(common, run.seed, run.rows, *_beside_rows(run, arms)) for run in runs]
    # Runs of two methods that chose the same rows are one.
    distinct = dict(zip(reversed(units), reversed(runs), strict=True))
    names = tuple(dict.fromkeys(units))
    shared = sources.layout.shards.path("evidence", "shared", f"{key(common)}.safetensors")
    work = TrainingRuns(
        units_of(sources.layout, names),
        sources.model_source,
        shared,
        tuple(distinct[name] for name in names),
        options.recipe,
        str(dtype).removeprefix("torch."),
        options.answer_tokens,
        options.draws,
        sources.beta if sources.pairs else None,
    )
    if missing := missing_of(work):
        trained = {place for number in missing for place in work.runs[number].rows}
        write_shared(sources.layout.shards, shared, setting, trained, arms)
    try:
        sources.driver(progress).finish(work, "Counterfactual runs", dict.fromkeys(range(len(names)), 1), "runs")
    finally:
        sources.layout.shards.delete([shared])
    found = {name: read_unit(sources.layout, name) or {} for name in names}
    if options.judge_url and options.judge_model:
        judge = Judge(options.judge_url, options.judge_model, options.judge_behaviour or setting.concept.name)
        _judge(sources, setting, units, found, judge, options.draws, progress)
    return [found[name] for name in units]


def _beside_rows(run: Run, arms: Arms) -> list[Any]:
    """What a run depends on beside its rows, its seed and what all share."""
    if run.swapped:
        return [run.swapped]
    if run.rewritten:
        texts = digest(part for row in run.rewritten for part in arms.rewritten[row])
        return ["rewritten", run.rewritten, texts]
    added = _added(run, arms.steering)
    return [] if added is None else ["steered", digest([added])]


def _added(run: Run, steering: Steering | None) -> np.ndarray | None:
    """What a run adds to the residual stream while it trains: float32 [d_model]; None for nothing."""
    if run.kind != "steer" or steering is None:
        return None
    return steering.at_random(run.share, run.seed) if run.method == RANDOM else steering.vector(run.share)


@dataclass(frozen=True)
class TrainingRuns:
    """Trains and measures; each run is a shard of its own, and any process may do it.

    Attributes:
        units: what comes out, one file a run.
        shared: the file of what all runs train and measure on.
        runs: in the order of the units.
        precision: of the weights that are trained on.
        answer_tokens, draws: of the answers that are measured.
        beta: of the DPO loss, which is minimised where rows are preference pairs; None where they are none.
    """

    units: Units
    model: ModelSource
    shared: Path
    runs: tuple[Run, ...]
    recipe: Recipe
    precision: str
    answer_tokens: int
    draws: int
    beta: float | None = None

    @property
    def outputs(self) -> tuple[ShardSet, ...]:
        return (self.units,)

    def open(self, worker: Worker) -> tuple[Worker, LanguageModel, Shared]:
        copy = private_copy(worker.model(self.model), getattr(torch, self.precision))
        return worker, copy, read_shared(self.shared)

    def run(self, opened: tuple[Worker, LanguageModel, Shared], number: int) -> None:
        worker, lm, shared = opened
        run = self.runs[number]
        words = f"{run.kind} {run.method}".strip()
        worker.advance(0, words)
        made = one_run(lm, shared, run, self, lambda: worker.advance(0, words))
        self.units.write(number, {"seed": run.seed, "n_rows": len(run.rows), **made})
        worker.advance(1)


def one_run(
    lm: LanguageModel, setting: Shared, run: Run, options: TrainingRuns, step: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Train on a run's rows, measure, and put the model back, also where it is left in the middle.

    Args:
        step: told of each step; what it raises leaves the run, of which nothing is kept.
    """
    keys = list(map(str, run.rows))
    if not run.rows:
        training, measured = None, measure(lm, setting.held_out, options.answer_tokens, options.draws, step)
    else:
        objective, added = _objective(lm, setting, run, options), _added(run, setting.arms.steering)
        during = None if added is None else steered(lm, setting.held_out.layer, torch.from_numpy(added))
        with minimised(lm, objective, keys, options.recipe, run.seed, lambda rows: step(), during) as training:
            measured = measure(lm, setting.held_out, options.answer_tokens, options.draws, step)
    made = [np.asarray(ids, np.int64) for ids in measured.answers]
    step()
    # What is said, as the model that was not trained reads it.
    own = answered_rows(setting.held_out.prompts * options.draws, made)
    text = projections(lm, own, setting.held_out.layer, setting.held_out.direction)
    renderer = ChatRenderer(lm.tokenizer, lm.context)
    return {
        "own": measured.own,
        "text": text.tolist(),
        "shown": measured.shown,
        "preference": measured.preference,
        "loss": measured.loss,
        "answers": [renderer.decode(ids) for ids in made],
        "training": asdict(training) if training else None,
    }


def _objective(lm: LanguageModel, setting: Shared, run: Run, options: TrainingRuns) -> Objective:
    """What a run minimises; the model, which is not trained yet, is the reference of its pairs."""
    swapped, rewritten = set(run.swapped), {i: setting.arms.rewritten[i] for i in run.rewritten}
    made = [rewritten.get(i, (setting.rows.ids[i], setting.rows.response[i])) for i in run.rows]
    made = [exchanged(*row) if i in swapped else row for i, row in zip(run.rows, made, strict=True)]
    rows = Rows([ids for ids, _ in made], [mask for _, mask in made])
    if options.beta is None:
        return Likelihood(shorter(rows, options.recipe.max_tokens))
    sides = sides_of(rows, options.recipe.max_tokens)
    return Preference(sides, reference_margins(lm, sides), options.beta)


def _judge(
    sources: Sources,
    setting: Setting,
    units: Sequence[str],
    found: dict[Any, dict[str, Any]],
    judge: Judge,
    draws: int,
    progress: Progress,
) -> None:
    """Add the judge's scores to the units; each unit's are kept once they are complete."""
    with progress.stage("Judging the answers", len(found), "runs") as stage:
        for name in dict.fromkeys(units):
            kept = f"judge-{key(judge.url, judge.model, judge.behaviour, found[name]['answers'])}"
            judged = read_unit(sources.layout, kept)
            if judged is None:
                pairs = zip(setting.prompts * draws, found[name]["answers"], strict=True)
                judged = {"judge": [judge.score(prompt, answer) for prompt, answer in pairs]}
                write_unit(sources.layout, kept, judged)
                stage.advance()
            else:
                stage.skip(1)
            found[name] = {**found[name], **judged}


def precision_of(lm: LanguageModel, recipe: Recipe) -> torch.dtype:
    if recipe.precision != "auto":
        return getattr(torch, recipe.precision)
    # Weights that are trained themselves need the precision that small steps are made in.
    new_adapter = recipe.weights == "lora" and resolve_weights(lm, "auto") == "linear"
    return getattr(torch, resolve_precision("auto", lm.dtype, lm.device)) if new_adapter else lm.wide_dtype


def shared_by_runs(
    sources: Sources, setting: Setting, options: ResolvedOptions, lm: LanguageModel, dtype: torch.dtype
) -> dict[str, Any]:
    """What every run depends on, beside its rows and its seed."""
    held = setting.held_out
    return {
        "version": VERSION,
        "recipe": asdict(options.recipe),
        "precision": str(dtype),
        "model": lm.fingerprint,
        "data": sources.data,
        "layer": held.layer,
        "held_out": digest([held.direction, *held.prompts, *held.shown.ids, *held.plain.ids, *held.natural.ids]),
        "answer_tokens": options.answer_tokens,
        "draws": options.draws,
        **({"beta": sources.beta} if sources.pairs else {}),
    }
