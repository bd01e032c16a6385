"""``concept-audit forecast``: which concepts would training on the data strengthen or weaken?"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from concept_audit.cli.engines import EngineFlags, working
from concept_audit.cli.filters import TEXT, WHERE, filtered
from concept_audit.cli.flags import FILE, flags, made, option
from concept_audit.cli.opening import Running
from concept_audit.cli.ranking import OUT
from concept_audit.influence.options import CurvatureOptions, InfluenceOptions, ScoringOptions
from concept_audit.progress import for_this_terminal

SHOWN = 20

if TYPE_CHECKING:
    CurvatureFlags = Any
    ScoringFlags = Any
else:
    CurvatureFlags = flags(CurvatureOptions)
    ScoringFlags = flags(ScoringOptions, without=("rank", "unit_normalised", "mode", "keep_tokens", "engine"))


@dataclass(frozen=True, kw_only=True)
class Forecast(Running):
    """which concepts training on the rows would strengthen or weaken, to first order"""

    curvature: CurvatureFlags
    scoring: ScoringFlags
    engine: EngineFlags
    prompts: Annotated[
        FILE,
        option(
            "conversations (rows with messages) whose assistant turns are the text that is read (None: 64 neutral ones)",
            "FILE",
        ),
    ] = None
    text: TEXT = ""
    where: Annotated[WHERE, arg(aliases=["--filter"])] = ()
    flag: Annotated[
        str, arg(metavar="any|none|NAME", help="only rows with any flag, with none, or with the flag of this name")
    ] = ""
    format: Annotated[
        Literal["text", "csv", "jsonl"], arg(help=f"of the output; text shows the {SHOWN} that move most")
    ] = "text"
    out: OUT = None

    def run(self) -> None:
        from concept_audit.audit.forecast import COLUMNS
        from concept_audit.data.read import read_queries

        prompts = [example.messages for example in read_queries(self.prompts)] if self.prompts else None
        options = InfluenceOptions(
            curvature=made(CurvatureOptions, self.curvature), scoring=made(ScoringOptions, self.scoring)
        )
        with working(self.engine) as engine:
            audit = self.open(for_this_terminal(), engine)
            found = audit.forecast(filtered(audit, self.text, self.where, self.flag), prompts, options)
        if self.format == "csv":
            text = found[COLUMNS].to_csv(index=False, lineterminator="\n")
        elif self.format == "jsonl":
            text = found[COLUMNS].to_json(orient="records", lines=True, force_ascii=False, double_precision=15)
        else:
            shown = found.head(SHOWN)[["concept_id", "label", *COLUMNS[3:]]]
            text = shown.to_string(index=False, float_format="{:.4g}".format, max_colwidth=40) + "\n"
        if self.out and self.out != "-":
            from concept_audit.files import atomic_write

            with atomic_write(Path(self.out)) as partial:
                partial.write_text(text, "utf-8")
        else:
            sys.stdout.write(text)
        n_rows = int(found["n_rows"].iloc[0]) if len(found) else 0
        print(f"{len(found):,} concepts, of {n_rows:,} rows with a finite loss", file=sys.stderr)
