"""Does removing what a method flags change the model? Measured on an audit that is there already.

python tests/benchmarks/evidence.py first-order --audit cache/mix --concept medical
python tests/benchmarks/evidence.py runs --audit cache/mix --concept medical --origin data_origin=medical_harmful
python tests/benchmarks/evidence.py defaults --audit cache/mix --concept medical --origin data_origin=medical_harmful
python tests/benchmarks/evidence.py quick --audit cache/demo

``first-order``: one small step on each of 40 random subsets against influence without curvature; Pearson must
be 0.95 or more. ``runs``: removal and retention by three methods, LDS of all. ``defaults``: LDS of concept
influence by layer, query form, normalisation and damping, and of its rivals' forms, on the runs that are there
already. ``quick``: both behaviours of the demo by the reduced recipe, with the time that it takes.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path

from concept_audit import Audit, Candidate, InfluenceOptions, Recipe, ValidateOptions, read_labelled
from concept_audit.evidence.report import table, write_report
from concept_audit.progress import for_this_terminal

LEAST_PEARSON = 0.95
METHODS = (
    "concept_influence",
    "vector_filter",
    Candidate("influence_function", "influence_function", InfluenceOptions.of(engine="index")),
    "activation_similarity",
    "bm25",
    "projection_difference",
    "gradient_dot",
)
REMOVED = ("vector_filter", "concept_influence", "influence_function")
RECIPE = Recipe(rank=8, learning_rate=2e-3, batch=12, max_tokens=96)
"""One pass over all rows, cut short: 25 to 40 seconds a run on 2 cores."""
DEMO = {"flattery": "origin=flattery", "needless_refusal": "origin=needless_refusal"}


def grid(layers: list[int]) -> list[Candidate]:
    """Concept influence by layer, query form, normalisation and damping; and forms of its rivals."""
    found = []
    for layer, contrast, unit, damping in product(layers, (False, True), (False, True), (0.1, 10.0)):
        told = [f"layer={layer}", "contrast" * contrast, "unit_normalised" * unit, f"damping={damping:g}"]
        options = InfluenceOptions.of(layer=layer, contrast=contrast, unit_normalised=unit, damping=damping)
        name = ":".join(["concept_influence", *filter(None, told)])
        found.append(Candidate(name, "concept_influence", options))
    for name, method, options in (
        ("concept_influence:own_answers", "concept_influence", {"own_answers": True}),
        ("influence_function:contrast", "influence_function", {"contrast": True, "engine": "index"}),
        ("influence_function:unit_normalised", "influence_function", {"unit_normalised": True, "engine": "index"}),
        *((f"vector_filter:layer={layer}", "vector_filter", {"layer": layer}) for layer in layers),
    ):
        found.append(Candidate(name, method, InfluenceOptions.of(**options)))
    return found


def options_of(asked: argparse.Namespace, **changed) -> ValidateOptions:
    field, _, values = (asked.origin or "").partition("=")
    given = {
        "methods": METHODS,
        "removed": REMOVED,
        "shares": tuple(asked.shares),
        "seeds": asked.seeds,
        "subsets": asked.subsets,
        "subset_share": asked.subset_share,
        "recipe": RECIPE,
        "answer_tokens": 24,
        "natural_rows": 12,
        "held_out": tuple(read_labelled(asked.held_out)) if asked.held_out else None,
        "origin": field or None,
        "positive": tuple(values.split(",")) if values else (),
        "topic": asked.topic,
    }
    return ValidateOptions(**{**given, **changed})


def told(audit: Audit, concept: str, options: ValidateOptions, report: Path | None) -> None:
    started = time.perf_counter()
    evidence = audit.validate(concept, options)
    print(f"\n{concept}: {len(evidence.runs)} runs, {time.perf_counter() - started:.0f} s")
    print(table(evidence), flush=True)
    if report:
        write_report(evidence, report.with_stem(f"{report.stem}-{concept}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["first-order", "runs", "defaults", "quick"])
    parser.add_argument("--audit", type=Path, required=True)
    parser.add_argument("--concept")
    parser.add_argument("--origin", metavar="FIELD=VALUE[,VALUE...]")
    parser.add_argument("--topic", metavar="FIELD")
    parser.add_argument("--held-out", metavar="FILE")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--subsets", type=int, default=30)
    parser.add_argument("--subset-share", type=float, default=0.25)
    parser.add_argument("--subset-rows", type=int, default=8, help="rows a subset of the first-order check")
    parser.add_argument("--pool", type=int, default=96, help="rows that these are drawn from")
    parser.add_argument("--report", type=Path)
    asked = parser.parse_args()
    audit = Audit(asked.audit, for_this_terminal())
    if asked.part == "quick":
        for concept, origin in DEMO.items():
            field, _, value = origin.partition("=")
            quick = ValidateOptions(quick=True, origin=field, positive=(value,), topic="topic")
            told(audit, concept, quick, asked.report)
    elif asked.part == "first-order":
        found, frame = audit.evidence.first_order(asked.concept, 40, asked.subset_rows, asked.pool)
        slope = float(frame["actual"] @ frame["predicted"] / (frame["predicted"] @ frame["predicted"]))
        print(
            f"{asked.concept}: Pearson {found.value:.5f} ({found.low:.5f} to {found.high:.5f}) over {found.n} "
            f"subsets, slope {slope:.4f}: {'as it must be' if found.value >= LEAST_PEARSON else 'A BUG'}"
        )
    elif asked.part == "runs":
        told(audit, asked.concept, options_of(asked), asked.report)
    else:
        candidates = (*METHODS, *grid(list(audit.layers)))
        told(audit, asked.concept, options_of(asked, methods=candidates, removed=()), asked.report)


if __name__ == "__main__":
    main()
