"""What a validation tries, and how thoroughly."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from concept_audit.errors import ConceptError
from concept_audit.evidence.options import Recipe
from concept_audit.influence.options import InfluenceOptions
from concept_audit.types import METHODS, NOT_OF_PAIRS, OF_FEATURES, LabelledExample

VERSION = 2
"""Counted up when units of an earlier version would not be the same."""
RANDOM = "random"
CONCEPT = "concept"
"""What runs that steer add: the concept's direction, or a random one."""
STRENGTHS = (2.0,)
"""Of steering, unless others are asked for."""


@dataclass(frozen=True)
class Candidate:
    """A method as it is put to the test.

    Attributes:
        name: what the results call it; unique.
        method: one of `METHODS`, or ``random``.
        options: how its influence is computed.
    """

    name: str
    method: str
    options: InfluenceOptions = field(default_factory=InfluenceOptions)


@dataclass(frozen=True)
class ValidateOptions:
    """What is tried, and how thoroughly.

    What is None takes the value of `FULL`, or of `QUICK` with ``quick``.

    Attributes:
        methods: methods to test, or candidates with options of their own, on the command line
            concept_influence,concept_influence:unit_normalised:damping=1,bm25; None for all; ``random`` is always added.
        removed: of these, the ones whose top rows are removed, and retained, in runs of their own (each costs
            2 × shares × seeds runs, of preference pairs 3 ×, since they are swapped too, and random as many); the others are compared by LDS, labels and
            agreement alone. None for all of them (quick: vector_filter), empty for none.
        retention: whether there are runs on the top rows alone too.
        rewrite: also train on all rows, of which the top ones have the audited model's own responses in place of theirs.
        rewrite_url: an OpenAI-compatible endpoint that gives these responses instead (its key: OPENAI_API_KEY);
            prompts of the data go there.
        rewrite_model: the model's name there.
        rewrite_budget: requests that may be sent there in one go.
        steer: also train on all rows while the concept is added to the residual stream, which the weights then need
            not learn (preventative steering); nothing is added when the model is measured.
        strengths: of steering, in standard deviations of the concept over the rows (2 moves an average row to
            where, of normally spread rows, one in 44 stands).
        shares: of the rows that are removed or retained, between 0 and 1.
        seeds: repetitions (3, quick: 6), of the order of the rows, the first LoRA weights, and what is removed at random.
        whole_seeds: of these, the ones that train on all rows too. A removal is compared with a removal at random
            seed by seed, which needs none; runs on all rows tell how far there is to go.
        subsets: random subsets for the linear datamodelling score (LDS; 30, quick: none); 0 leaves it out.
        subset_seeds: repetitions of each (1).
        subset_share: their share of the rows (0.5, quick: 0.1).
        recipe: of the fine-tuning.
        answer_tokens: own answers are cut at this many tokens (64, quick: 24).
        draws: own answers to each held-out prompt (4, quick: 2); 1 takes the likeliest, whose every word hangs on near ties.
        pool_rows: train on at most this many rows, drawn once for all runs; None for every row (quick: 96). Runs that see all of
            few rows differ by what was removed alone; runs that stop early differ by which rows came first, too.
        natural_rows: training rows that are withheld from every run to measure the loss on.
        held_out: labelled examples to measure on; None takes half of a probe's labels, and the methods rank by
            the other half.
        origin: metadata field that tells where a row comes from (on the command line FIELD=VALUE[,VALUE...], with
            its values for rows that show the behaviour).
        positive: its values for rows that show the behaviour.
        topic: metadata field within whose values rows are compared too.
        first_order: random subsets for `first_order`, the cheap version of LDS; 0 leaves it out.
        judge_url: an OpenAI-compatible endpoint that judges the answers, such as http://localhost:8000/v1 (its key:
            OPENAI_API_KEY).
        judge_model: the judge's name there.
        judge_behaviour: what they are judged for; None for the concept's name.
        quick: the reduced recipe: few and short rows, one method removed; minutes on a laptop.
    """

    methods: tuple[str | Candidate, ...] | None = None
    removed: tuple[str, ...] | None = None
    retention: bool | None = None
    rewrite: bool = False
    rewrite_url: str | None = None
    rewrite_model: str | None = None
    rewrite_budget: int = 1000
    steer: bool = False
    strengths: tuple[float, ...] = STRENGTHS
    shares: tuple[float, ...] = (0.1,)
    seeds: int | None = None
    whole_seeds: int | None = None
    subsets: int | None = None
    subset_seeds: int | None = None
    subset_share: float | None = None
    recipe: Recipe | None = None
    answer_tokens: int | None = None
    draws: int | None = None
    pool_rows: int | None = None
    natural_rows: int | None = None
    held_out: tuple[LabelledExample, ...] | None = None
    origin: str | None = None
    positive: tuple[str, ...] = ()
    topic: str | None = None
    first_order: int = 0
    judge_url: str | None = None
    judge_model: str | None = None
    judge_behaviour: str | None = None
    quick: bool = False


@dataclass(frozen=True, kw_only=True)
class ResolvedOptions(ValidateOptions):
    """`ValidateOptions` that leave nothing open, and that make sense; see there for what they mean."""

    methods: tuple[Candidate, ...]
    removed: tuple[str, ...]
    retention: bool
    seeds: int
    whole_seeds: int
    subsets: int
    subset_seeds: int
    subset_share: float
    recipe: Recipe
    answer_tokens: int
    draws: int
    natural_rows: int


FULL: dict[str, Any] = {
    "methods": tuple(method for method in METHODS if method not in OF_FEATURES),
    "retention": True,
    "seeds": 3,
    "subsets": 30,
    "subset_seeds": 1,
    "subset_share": 0.5,
    "recipe": Recipe(),
    "answer_tokens": 64,
    "draws": 4,
    "natural_rows": 32,
}
QUICK: dict[str, Any] = {
    "methods": ("concept_influence", "vector_filter", "activation_similarity", "bm25"),
    "removed": ("vector_filter",),
    "retention": False,
    "seeds": 6,
    "whole_seeds": 1,
    "subsets": 0,
    "subset_seeds": 1,
    "subset_share": 0.1,
    "recipe": Recipe(rank=8, learning_rate=2e-3, batch=12, max_tokens=96),
    "pool_rows": 96,
    "answer_tokens": 24,
    "draws": 2,
    "natural_rows": 12,
}
"""For a laptop: 96 rows, cut at 96 tokens, and the default method's removal with as many seeds as fit. No
LDS: as few subsets as fit would tell nothing."""


@dataclass(frozen=True)
class Cost:
    """What a validation takes, before any of it is done.

    Attributes:
        runs: trainings, each of which is measured as well.
        rows: rows that a training sees, at most, counted each time.
        answers: responses that are made anew, at most; those that are kept from before are not taken off.
    """

    runs: int
    rows: int
    answers: int = 0


def cost_of(options: ValidateOptions, n_rows: int, pairs: bool = False) -> Cost:
    """What a validation of so many rows takes; runs that are done already are not taken off.

    Raises:
        ConceptError: as `resolved`.
    """
    made = resolved(options, pairs)
    # Pairs are swapped as well as removed.
    kinds = 1 + pairs + made.rewrite + made.retention
    arms = (len(made.removed) + 1) * len(made.shares) * kinds if made.removed else 0
    # The concept is added, and a random direction.
    arms += 2 * len(made.strengths) if made.steer else 0
    runs = made.whole_seeds + made.seeds * arms + made.subsets * made.subset_seeds
    pool = min(n_rows, made.pool_rows or n_rows)
    rows = pool * made.recipe.epochs
    if made.recipe.max_steps is not None:
        rows = min(rows, made.recipe.max_steps * made.recipe.batch)
    answers = pool if made.rewrite else 0
    if made.rewrite_url:
        # One set of rows a method, whatever the seed, and one a seed at random.
        tops = sum(max(1, round(share * pool)) for share in made.shares)
        answers = min(pool, (len(made.removed) + made.seeds) * tops)
    return Cost(runs, rows, answers)


def resolved(options: ValidateOptions, pairs: bool = False) -> ResolvedOptions:
    """The options with every value that was left open filled in, checked.

    Args:
        pairs: whether the rows are preference pairs.

    Raises:
        ConceptError: a value is out of range, or a method is unknown.
    """
    usual = QUICK if options.quick else FULL
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    filled: dict[str, Any] = {name: usual.get(name) if value is None else value for name, value in given.items()}
    if pairs and options.methods is None:
        filled["methods"] = tuple(method for method in filled["methods"] if method not in NOT_OF_PAIRS)
    candidates = tuple(m if isinstance(m, Candidate) else Candidate(m, m) for m in filled["methods"])
    names = [candidate.name for candidate in candidates]
    if given["removed"] is None and (options.methods is not None or filled["removed"] is None):
        filled["removed"] = tuple(names)
    filled["rewrite"] = options.rewrite or bool(options.rewrite_url)
    seeds = filled["seeds"]
    filled["whole_seeds"] = seeds if filled["whole_seeds"] is None else min(filled["whole_seeds"], seeds)
    filled["methods"] = candidates
    made = ResolvedOptions(**filled)
    wrong = []
    unknown = [c.method for c in candidates if c.method not in (*METHODS, RANDOM)]
    if unknown:
        wrong.append(f"--methods {', '.join(unknown)}: unknown; choose from {', '.join(METHODS)}")
    if len(set(names)) < len(names) or not names:
        wrong.append("--methods: name at least one, and each once")
    for share in (*made.shares, made.subset_share):
        if not 0 < share < 1:
            wrong.append(f"--share {share:g}: must be more than 0 and less than 1, such as 0.1 for a tenth")
    for name, least in (("seeds", 1), ("subset_seeds", 1), ("subsets", 0), ("answer_tokens", 1), ("draws", 1)):
        if getattr(made, name) < least:
            wrong.append(f"--{name.replace('_', '-')} {getattr(made, name)}: must be {least} or more")
    if made.pool_rows is not None and made.pool_rows < 2:
        wrong.append(f"--rows {made.pool_rows}: must be 2 or more")
    if bool(made.judge_url) != bool(made.judge_model):
        wrong.append("--judge-url and --judge-model go together: give both, or neither")
    wrong += _wrong_arms(made, pairs)
    if bool(made.origin) != bool(made.positive):
        wrong.append("--origin and --positive go together: the field, and its values for the behaviour")
    if pairs and made.first_order:
        wrong.append("--first-order: one step on single responses, and these rows are preference pairs; leave it out")
    lost = [name for name in made.removed if name not in names]
    if lost:
        wrong.append(f"removed: {', '.join(lost)} is not among the methods {', '.join(names)}")
    if wrong:
        raise ConceptError("; ".join(wrong))
    made.recipe.check()
    if RANDOM not in names:
        candidates = (*candidates, Candidate(RANDOM, RANDOM))
    return replace(made, methods=candidates, removed=tuple(name for name in made.removed if name != RANDOM))


def _wrong_arms(made: ResolvedOptions, pairs: bool) -> list[str]:
    """What makes no sense of the runs that rewrite or steer."""
    wrong = []
    if bool(made.rewrite_url) != bool(made.rewrite_model):
        wrong.append("--rewrite-url and --rewrite-model go together: give both, or neither")
    if made.rewrite and pairs:
        wrong.append("--rewrite: a preference pair has two responses, and these rows are pairs; leave it out")
    if made.rewrite and not made.removed:
        wrong.append(
            "--rewrite: rows that a method would remove are rewritten, and none is removed; name one in --removed"
        )
    if made.rewrite_budget < 1:
        wrong.append(f"--rewrite-budget {made.rewrite_budget}: must be 1 or more")
    if made.steer and pairs:
        wrong.append(
            "--steer: has been thought out for the loss of single responses, and these rows are preference pairs; leave "
            "it out"
        )
    if made.strengths != STRENGTHS and not made.steer:
        wrong.append("--strength: is of runs that steer; give --steer too")
    if not made.strengths or len(set(made.strengths)) < len(made.strengths):
        wrong.append("--strength: name at least one, and each once")
    for strength in made.strengths:
        if not 0 < strength < 1e6:
            wrong.append(f"--strength {strength:g}: must be more than 0, such as 2")
    return wrong
