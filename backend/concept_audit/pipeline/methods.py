"""What each method needs, and what has no meaning for the rows of an audit or for its options."""

from __future__ import annotations

from concept_audit.errors import ConceptError
from concept_audit.influence.options import InfluenceOptions
from concept_audit.pipeline.sources import Sources
from concept_audit.types import NOT_OF_PAIRS

NEED_QUERIES = {"concept_influence", "influence_function", "gradient_dot", "activation_similarity", "bm25"}
NEED_GRADIENTS = {"concept_influence", "influence_function", "gradient_dot"}
AT_A_LAYER = {"vector_filter", "projection_difference", "activation_similarity", "concept_influence"}


def check_options(options: InfluenceOptions) -> None:
    """Raise ConceptError for options that make no sense."""
    curvature, scoring = options.curvature, options.scoring
    wrong = []
    if curvature.damping < 0:
        wrong.append(f"--damping {curvature.damping}: must not be negative")
    if scoring.rank is not None and scoring.rank < 1:
        wrong.append(f"--rank {scoring.rank}: must be 1 or more")
    if curvature.curvature_tokens < 1:
        wrong.append(f"--curvature-tokens {curvature.curvature_tokens}: must be 1 or more")
    if scoring.unit_normalised and scoring.mode == "forward":
        wrong.append("--mode forward: does not see the norm of a gradient; leave it out, or --unit-normalised")
    if scoring.keep_tokens and scoring.mode == "forward":
        wrong.append("--mode forward: gives no token influences; leave it out, or --keep-tokens")
    if wrong:
        raise ConceptError("; ".join(wrong))


def check_rows(sources: Sources, method: str, options: InfluenceOptions) -> None:
    """Raise ConceptError for what preference pairs or rollouts have no meaning for."""
    normalised = method in NEED_GRADIENTS and options.scoring.unit_normalised
    if sources.pairs and method in NOT_OF_PAIRS:
        raise ConceptError(f"{method}: a preference pair has two responses already; use vector_filter")
    if sources.pairs and normalised:
        raise ConceptError("--unit-normalised: not of preference pairs, whose gradients are differences of two")
    if sources.weighs(options) and normalised:
        raise ConceptError(
            "--unit-normalised: not of rollouts, whose advantage is a part of the length of their gradients; leave it "
            "out, or count rows alike with --alike"
        )
