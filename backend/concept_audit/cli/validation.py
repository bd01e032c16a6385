"""``concept-audit validate``: does removing what a ranking flags change the model, and training as the forecast says?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from concept_audit.addresses import is_this_machine
from concept_audit.cli.engines import EngineFlags, working
from concept_audit.cli.flags import FILE, flags, made, option, switch
from concept_audit.cli.opening import JSON, Running, print_json
from concept_audit.cli.serving import confirmed
from concept_audit.errors import AuditError
from concept_audit.evidence.options import Recipe
from concept_audit.influence.options import InfluenceOptions
from concept_audit.model.options import TRAINED
from concept_audit.pipeline.validation.forecast_options import ForecastTrial
from concept_audit.pipeline.validation.options import FULL, QUICK, ValidateOptions
from concept_audit.progress import for_this_terminal

if TYPE_CHECKING:
    from concept_audit.pipeline.validation.options import Candidate
    from concept_audit.store.evidence import Evidence

OF_FORECASTS = ("seeds", "pool_rows", "quick")
_FLAGS = ("contrast", "own_answers", "unit_normalised", "partial")
_VALUES = {"layer": int, "damping": float, "curvature": str, "target": str, "seed": int, "engine": str}
LISTED = tuple[str, ...] | None


if TYPE_CHECKING:
    ValidateFlags = Any
else:
    ValidateFlags = flags(
        ValidateOptions,
        names={"shares": "share", "strengths": "strength", "pool_rows": "rows"},
        without=("recipe", "retention", "whole_seeds", "natural_rows", "positive"),
        types={"methods": LISTED, "removed": LISTED, "held_out": FILE},
    )
if TYPE_CHECKING:
    RecipeFlags = Any
else:
    RecipeFlags = flags(Recipe, names={"weights": "train", "rank": "lora_rank"}, without=("precision",), optional=True)


@dataclass(frozen=True, kw_only=True)
class Validate(Running):
    """train without the rows that methods flag, or on all of them, and tell what it does to the model"""

    concept: Annotated[
        str | None, option("a probe's name, or sae:N for an SAE feature; left out for the forecast", "NAME")
    ] = None
    forecast: Annotated[
        bool,
        switch(
            "train on the rows, and tell how far every concept changes as forecast; of the numbers of runs and rows, those of seeds and rows count"
        ),
    ] = False
    prompts: Annotated[FILE, option("conversations on which the forecast is tried (None: 64 neutral ones)", "FILE")] = (
        None
    )
    validation: ValidateFlags
    recipe: RecipeFlags
    engine: EngineFlags
    retention: Annotated[bool, switch("also train on the top rows alone, though --quick leaves that out")] = False
    no_retention: Annotated[bool, switch("do not train on the top rows alone")] = False
    yes: Annotated[bool, switch("do not ask before prompts of the data go to another machine (--rewrite-url)")] = False
    report: Annotated[Path | None, option("write a report in Markdown, its figures beside it", "FILE")] = None
    json: JSON = False

    def run(self) -> None:
        if self.forecast:
            self._run_forecast()
            return
        if self.prompts:
            raise AuditError("--prompts: only --forecast reads them")
        if self.concept is None:
            raise AuditError("which concept? Give --concept NAME, or --forecast for all of them")
        options = self.validate_options()
        if options.rewrite_url and not is_this_machine(options.rewrite_url):
            confirmed(f"send prompts of the data to {options.rewrite_url}", self.yes)
        progress = for_this_terminal()
        from concept_audit.evidence.report import table, write_report

        with working(self.engine) as engine:
            audit = self.open(progress, engine)
            cost = audit.evidence.cost(options)
            answers = f", {cost.answers:,} responses to write at most" if cost.answers else ""
            progress.say(
                f"{cost.runs:,} trainings on up to {cost.rows:,} rows each, with answers to the held-out prompts after "
                f"each{answers}; runs that are there already are not made again"
            )
            evidence = audit.validate(self.concept, options)
        self._tell(evidence, table)
        if self.report:
            write_report(evidence, self.report)
            progress.say(f"The report is in {self.report}")

    def _run_forecast(self) -> None:
        trial = self.forecast_trial()
        progress = for_this_terminal()
        from concept_audit.data.read import read_queries
        from concept_audit.evidence.forecast_report import forecast_markdown, forecast_text
        from concept_audit.files import atomic_write

        prompts = [example.messages for example in read_queries(self.prompts)] if self.prompts else None
        with working(self.engine) as engine:
            evidence = self.open(progress, engine).validate_forecast(trial, prompts)
        self._tell(evidence, forecast_text)
        if self.report:
            with atomic_write(self.report) as partial:
                partial.write_text(forecast_markdown(evidence), "utf-8")
            progress.say(f"The report is in {self.report}")

    def _tell(self, evidence: Evidence, told: Callable[[Evidence], str]) -> None:
        if self.json:
            print_json({"evidence_id": evidence.evidence_id, "results": evidence.results.to_dict("records")})
        else:
            print(told(evidence))

    def forecast_trial(self) -> ForecastTrial:
        """The runs that were typed.

        Raises:
            AuditError: an option is given that has no meaning for a forecast.
        """
        typed: Any = self.validation
        usual = {field.name: field.default for field in dataclasses.fields(typed)}
        given = [name for name, value in vars(typed).items() if value != usual[name] and name not in OF_FORECASTS]
        given += [name for name in ("concept", "retention", "no_retention") if getattr(self, name)]
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise AuditError(f"--forecast is of every concept and removes nothing: leave out {names}")
        recipe = {name: value for name, value in vars(self.recipe).items() if value is not None}
        weights = recipe.get("weights")
        return ForecastTrial(
            weights=(weights,) if weights else TRAINED,
            seeds=3 if typed.seeds is None else typed.seeds,
            recipe=dataclasses.replace((QUICK if typed.quick else FULL)["recipe"], **recipe),
            pool_rows=typed.pool_rows,
            quick=typed.quick,
        )

    def validate_options(self) -> ValidateOptions:
        """The options that were typed.

        Raises:
            AuditError: a method's option is unknown, or --origin is not FIELD=VALUE.
        """
        typed: Any = self.validation
        given = {name: value for name, value in vars(self.recipe).items() if value is not None}
        field, _, values = (typed.origin or "").partition("=")
        if typed.origin and not values:
            raise AuditError(f"--origin {typed.origin}: write FIELD=VALUE, such as origin=flattery")
        retention = True if self.retention else False if self.no_retention else None
        from concept_audit.data.read import read_labelled

        return made(
            ValidateOptions,
            typed,
            recipe=dataclasses.replace((QUICK if typed.quick else FULL)["recipe"], **given),
            methods=tuple(candidate(text) for text in typed.methods or ()) or None,
            removed=typed.removed or None,
            retention=retention,
            held_out=tuple(read_labelled(typed.held_out)) if typed.held_out else None,
            origin=field or None,
            positive=tuple(values.split(",")) if values else (),
        )


def candidate(text: str) -> Candidate:
    """A method with options: ``concept_influence:contrast:damping=1``.

    Raises:
        AuditError: an option is unknown, or its value is not of its kind.
    """
    from concept_audit.pipeline.validation.options import Candidate

    method, *parts = text.split(":")
    chosen: dict[str, Any] = {}
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
