"""``concept-audit validate``: does removing what a ranking flags change the model?"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from concept_audit.errors import AuditError

SUMMARY = "train without the rows that methods flag, and tell what it does to the model"
_FLAGS = ("contrast", "own_answers", "unit_normalised")
_VALUES = {"layer": int, "damping": float, "curvature": str, "target": str, "seed": int, "engine": str}


def add(command: argparse.ArgumentParser) -> None:
    """Put the options on the command."""
    command.add_argument("--concept", required=True, metavar="NAME", help="a probe's name, or sae:N for an SAE feature")
    command.add_argument(
        "--quick",
        action="store_true",
        help="the reduced recipe: few and short rows, one method removed; minutes on a laptop",
    )
    command.add_argument(
        "--methods",
        metavar="A,B,...",
        help="methods to test, each with options of its own where wanted: "
        "concept_influence,concept_influence:unit_normalised:damping=1,bm25 (default: all)",
    )
    command.add_argument(
        "--removed",
        metavar="A,B,...",
        help="of these, the ones whose top rows are removed and retained in runs (default: all of them; "
        "quick: vector_filter)",
    )
    command.add_argument(
        "--retention",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="also train on the top rows alone (default: yes, quick: no)",
    )
    command.add_argument(
        "--share",
        default="0.1",
        metavar="X[,Y...]",
        help="of the rows that are removed or retained (default: %(default)s)",
    )
    command.add_argument("--seeds", type=int, metavar="N", help="repetitions of each run (default: 3, quick: 6)")
    command.add_argument(
        "--subsets",
        type=int,
        metavar="N",
        help="random subsets for the linear datamodelling score (default: 30, quick: none)",
    )
    command.add_argument("--subset-share", type=float, metavar="X", help="(default: 0.5, quick: 0.1)")
    command.add_argument("--subset-seeds", type=int, metavar="N", help="repetitions of each (default: 1)")
    command.add_argument(
        "--first-order",
        type=int,
        default=0,
        metavar="N",
        help="also check influence against one small step on each of N random subsets (40 are telling)",
    )
    command.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="train on N rows at most, drawn once for all runs (default: every row, quick: 144)",
    )
    command.add_argument(
        "--held-out",
        metavar="FILE",
        help='examples to measure on, rows with "messages" and "label" (default: half of the probe\'s labels, '
        "and the methods rank by the other half)",
    )
    command.add_argument(
        "--draws",
        type=int,
        metavar="N",
        help="own answers to each held-out prompt, drawn with the same chance from every model (default: 4, quick: 2)",
    )
    command.add_argument("--answer-tokens", type=int, metavar="N", help="of an own answer (default: 64, quick: 24)")
    command.add_argument(
        "--origin",
        metavar="FIELD=VALUE[,VALUE...]",
        help="metadata field that tells where a row comes from, and its values for the behaviour",
    )
    command.add_argument("--topic", metavar="FIELD", help="metadata field within whose values to compare too")
    recipe = command.add_argument_group("recipe", "how runs fine-tune")
    recipe.add_argument(
        "--train",
        choices=["lora", "all"],
        dest="weights",
        help="LoRA weights, or all weights of the linear layers (default: lora)",
    )
    recipe.add_argument("--lora-rank", type=int, dest="rank", metavar="N", help="default: 16, quick: 8")
    recipe.add_argument("--learning-rate", type=float, metavar="X", help="default: 5e-4, quick: 2e-3")
    recipe.add_argument("--epochs", type=int, metavar="N", help="passes over the rows (default: 1)")
    recipe.add_argument("--max-steps", type=int, metavar="N", help="stop after N steps (default: never)")
    recipe.add_argument("--batch", type=int, metavar="N", help="rows a step (default: 8, quick: 12)")
    recipe.add_argument("--max-tokens", type=int, metavar="N", help="of a row (default: 512, quick: 96)")
    judge = command.add_argument_group("judge", "a language model that judges the held-out answers")
    judge.add_argument(
        "--judge-url",
        metavar="URL",
        help="an OpenAI-compatible endpoint, such as http://localhost:8000/v1 (its key: OPENAI_API_KEY)",
    )
    judge.add_argument("--judge-model", metavar="MODEL", help="its name there")
    judge.add_argument("--judge-behaviour", metavar="TEXT", help="what answers are judged for, in words")
    command.add_argument(
        "--report", type=Path, metavar="FILE", help="write a report in Markdown, its figures beside it"
    )


def run(options: argparse.Namespace) -> int:
    """Validate, and say what came out."""
    from concept_audit.cli import _open, _started

    progress = _started()
    audit = _open(options.audit, options.cache, progress)
    from concept_audit import read_labelled
    from concept_audit.evidence.report import table, write_report
    from concept_audit.pipeline.validation.options import FULL, QUICK, ValidateOptions

    names = ("weights", "rank", "learning_rate", "epochs", "max_steps", "batch", "max_tokens")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    recipe = dataclasses.replace((QUICK if options.quick else FULL)["recipe"], **given)
    field, _, values = (options.origin or "").partition("=")
    if options.origin and not values:
        raise AuditError(f"--origin {options.origin}: write FIELD=VALUE, such as origin=flattery")
    evidence = audit.validate(
        options.concept,
        ValidateOptions(
            methods=tuple(candidate(text) for text in _listed(options.methods)) or None,
            removed=tuple(_listed(options.removed)) or None,
            retention=options.retention,
            shares=_shares(options.share),
            seeds=options.seeds,
            subsets=options.subsets,
            subset_seeds=options.subset_seeds,
            subset_share=options.subset_share,
            recipe=recipe,
            pool_rows=options.rows,
            draws=options.draws,
            answer_tokens=options.answer_tokens,
            held_out=tuple(read_labelled(options.held_out)) if options.held_out else None,
            origin=field or None,
            positive=tuple(values.split(",")) if values else (),
            topic=options.topic,
            first_order=options.first_order,
            judge_url=options.judge_url,
            judge_model=options.judge_model,
            judge_behaviour=options.judge_behaviour,
            quick=options.quick,
        ),
    )
    print(table(evidence))
    if options.report:
        write_report(evidence, options.report)
        progress.say(f"The report is in {options.report}")
    return 0


def candidate(text: str):
    """A method with options: ``concept_influence:contrast:damping=1``.

    Raises:
        AuditError: an option is unknown, or its value is not of its kind.
    """
    from concept_audit.pipeline.attribution import InfluenceOptions
    from concept_audit.pipeline.validation.options import Candidate

    method, *parts = text.split(":")
    chosen: dict = {}
    for part in parts:
        name, equals, value = part.partition("=")
        name = name.replace("-", "_")
        if name in _FLAGS and not equals:
            chosen[name] = True
        elif name in _VALUES and equals:
            try:
                chosen[name] = _VALUES[name](value)
            except ValueError:
                raise AuditError(f"--methods {text}: {value!r} is not a value for {name}") from None
        else:
            known = [*_FLAGS, *(f"{name}=..." for name in _VALUES)]
            raise AuditError(f"--methods {text}: {part!r} is unknown; choose from {', '.join(known)}")
    return Candidate(text, method, InfluenceOptions.of(**chosen))


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise AuditError(f"--share {text}: write numbers between 0 and 1, such as 0.1 or 0.05,0.1,0.2") from None
