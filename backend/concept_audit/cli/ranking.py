"""Rows: ``rank``, ``export``, ``flag``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from concept_audit.cli.concepts import CONCEPT
from concept_audit.cli.engines import EngineFlags, working
from concept_audit.cli.filters import TEXT, TEXT_IN, WHERE, filtered
from concept_audit.cli.flags import FILE, flags, form, joined, made, option, switch
from concept_audit.cli.forms import listed, whole_numbers
from concept_audit.cli.opening import JSON, Running, print_json
from concept_audit.errors import AuditError
from concept_audit.influence.options import InfluenceOptions
from concept_audit.progress import Progress, for_this_terminal
from concept_audit.types import METHODS, Method, usual_method

if TYPE_CHECKING:
    from concept_audit.audit.audit import Audit
    from concept_audit.store.documents import Order

FORMAT = Annotated[Literal["csv", "jsonl", "parquet"], arg(help="of the output")]
FIRST_ROWS = 1000
OUT = Annotated[str | None, option("write to this file (None: standard output)", "FILE")]


if TYPE_CHECKING:
    InfluenceFlags = Any
else:
    InfluenceFlags = flags(InfluenceOptions, types={"query.queries": FILE}, without=("scoring.engine",))


USUAL = f"{usual_method('sae_feature')} of SAE features, {usual_method('probe')} of probes and pairs"


@dataclass(frozen=True, kw_only=True)
class Rank(Running):
    """write the rows in order of their influence on a concept"""

    concept: CONCEPT
    influence: InfluenceFlags
    engine: EngineFlags
    method: Annotated[str | None, option(f"how to score rows: {', '.join(METHODS)} (None: {USUAL})", "METHOD")] = None
    top: Annotated[int | None, option(f"only the first so many rows (None: {FIRST_ROWS:,})", "N")] = None
    all: Annotated[bool, switch("every row, not the first alone")] = False
    by: Annotated[
        Literal["row", "document", "strongest"],
        arg(
            help="rows; or documents that were split (build --long-documents split), by the mean of their windows' "
            "scores, weighted by tokens (document), or by that of their strongest window"
        ),
    ] = "row"
    format: FORMAT = "csv"
    out: OUT = None
    exact: Annotated[bool, switch("differentiate every row, though there is a gradient index")] = False
    index_only: Annotated[
        bool, switch("leave all scores to the gradient index: do not score its first rows exactly, which takes longer")
    ] = False
    index: Annotated[bool, switch("read the gradient index, or say why that cannot be")] = False

    def run(self) -> None:
        if self.top is not None and self.top < 1:
            raise AuditError(f"--top {self.top}: must be 1 or more")
        if self.top is not None and self.all:
            raise AuditError("--top and --all: choose one of them")
        if self.exact and self.index:
            raise AuditError("--exact and --index: choose one of them")
        if self.exact and self.index_only:
            raise AuditError("--exact and --index-only: choose one of them")
        with working(self.engine) as engine:
            self._ranked(self.open(for_this_terminal(), engine))

    def _ranked(self, audit: Audit) -> None:
        from concept_audit.data.read import read_prompts, read_queries
        from concept_audit.data.write import write

        typed: Any = self.influence
        read = read_prompts if typed.query__own_answers else read_queries
        queries = tuple(read(typed.query__queries)) if typed.query__queries else None
        engine = "exact" if self.exact else "index" if self.index else "auto"
        options = made(InfluenceOptions, typed, **{"query.queries": queries, "scoring.engine": engine})
        if not self.index_only:
            audit.refine(self.concept, self.method, options)
        told = audit.refinements.in_words(self.concept, self.method, options)
        if told is not None:
            print(told, file=sys.stderr)
        if (own := audit.comparisons.on_own_rows((self.concept, self.method, options))) is not None:
            print(own.in_words(), file=sys.stderr)
        out = Path(self.out) if self.out and self.out != "-" else None
        top = None if self.all else self.top or FIRST_ROWS
        if self.by != "row":
            by: Order = "mean" if self.by == "document" else "strongest"
            found = audit.documents.rank(self.concept, self.method, top, by, options)
            write(found, self.format, self.out)
            if self.top is None and len(found) == top:
                print(f"The first {top:,} documents; --top N or --all writes more", file=sys.stderr)
            return
        written, every = audit.exports.ranked(out, self.concept, self.method, self.format, top, options)
        if self.top is None and written < every:
            print(f"The first {written:,} of {every:,} rows; --top N or --all writes more", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class Export(Running):
    """write the flagged rows, or those that a filter lets through"""

    flag: Annotated[
        str | None,
        option(
            "rows with any flag, with none, or with the flag of this name (any, unless --drop or --all is given)",
            "any|none|NAME",
        ),
    ] = None
    drop: Annotated[
        tuple[str, ...] | None,
        form(listed, "remove[,NAME...]", ",".join),
        option("the data without the rows that have these flags; rows with others stay"),
    ] = None
    all: Annotated[bool, switch("every row, flagged or not")] = False
    text: TEXT = ""
    text_in: TEXT_IN = ""
    where: WHERE = ()
    schema: Annotated[
        Literal["audit", "own"],
        arg(help="columns: audit (prompt, response, flag, metadata) or own (those of the input, as they were)"),
    ] = "audit"
    whole_documents: Annotated[bool, switch("of a document of which not every window is to be written, write none")] = (
        False
    )
    concept: Annotated[str | None, option("put the scores of this concept beside each row", "NAME")] = None
    method: Annotated[Method | None, arg(help=f"of these scores (None: {USUAL})")] = None
    exact_csv: Annotated[
        bool,
        switch(
            "CSV that reads back as it was; without it, cells that a spreadsheet would take for a formula begin "
            "with an apostrophe, but for the input's own columns, which are always exact"
        ),
    ] = False
    swap: Annotated[
        bool, switch("exchange the sides of preference pairs that are flagged swap (with --schema own)")
    ] = False
    format: FORMAT = "csv"
    out: OUT = None

    def run(self) -> None:
        audit = self.open(Progress())
        if self.drop and (self.all or self.flag):
            raise AuditError("--drop: which rows stay is said already by --all or --flag; give one of them")
        flag = self.flag or ("" if self.all or self.drop else "any")
        where = replace(filtered(audit, self.text, self.where, flag, self.text_in), without_flags=self.drop or ())
        out = Path(self.out) if self.out and self.out != "-" else None
        about = audit.exports.write(
            out,
            self.format,
            where,
            self.schema,
            self.concept,
            self.method,
            exact=self.exact_csv,
            swap=self.swap,
            whole_documents=self.whole_documents,
        )
        if out is not None:
            of = f" of {about['documents']:,} documents" if "documents" in about else ""
            print(
                f"{about['rows']:,} rows{of} in {out}, and how they came about in {out}.manifest.json", file=sys.stderr
            )
            if self.schema == "own" and self.format == "csv":
                print("Its cells are as they were: do not open hostile text in a spreadsheet", file=sys.stderr)
        elif not about["rows"]:
            print("concept-audit: no rows pass; flag some in the dashboard, or pass --all", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class Flag(Running):
    """flag rows by score, percentile, rank or filter; or undo it"""

    concept: Annotated[str | None, option("rows by their influence on this concept", "NAME")] = None
    method: Annotated[Method | None, arg(help=f"of its ranking (None: {USUAL})")] = None
    top: Annotated[int | None, option("the first so many rows", "N")] = None
    above: Annotated[float | None, option("rows with at least this score", "SCORE")] = None
    percentile: Annotated[float | None, option("rows of at least this percentile, 0 to 100", "P")] = None
    text: TEXT = ""
    text_in: TEXT_IN = ""
    where: WHERE = ()
    document: Annotated[
        tuple[int, ...] | None,
        form(whole_numbers, "N[,N...]", joined),
        option("all windows of these documents, by the numbers that rank --by document tells"),
    ] = None
    flagged: Annotated[
        str,
        arg(
            metavar="any|none|unseen|NAME",
            help="only rows with any flag, with none (or keep), without any verdict, or with the flag of this name",
        ),
    ] = ""
    as_: Annotated[
        str,
        arg(
            name="as",
            metavar="FLAG",
            help="remove, review, keep (seen, and to stay), swap (of a preference pair), or a name of your own",
        ),
    ] = "remove"
    note: Annotated[str, arg(help="why, for the log; without it rows keep the note that they have")] = ""
    clear: Annotated[bool, switch("take the flags off instead")] = False
    undo: Annotated[
        str | None, option("undo the last change that you made, or the change of this number", "last|N")
    ] = None
    dry_run: Annotated[bool, switch("say how many rows that is, and change nothing")] = False
    json: JSON = False

    def run(self) -> None:
        audit = self.open(for_this_terminal())
        if self.undo is not None:
            self._undo(audit)
            return
        ranked = {"--top": self.top, "--above": self.above, "--percentile": self.percentile}
        given = [name for name, value in ranked.items() if value is not None]
        if given and self.concept is None:
            raise AuditError(f"{', '.join(given)}: of which ranking? Name its --concept")
        if not (given or self.text or self.where or self.flagged or self.document):
            raise AuditError(
                "which rows? Give --concept with --top, --above or --percentile, or --text, --where, --document or "
                "--flagged"
            )
        scores = None if self.above is None else (self.above, float("inf"))
        where = filtered(audit, self.text, self.where, self.flagged, self.text_in)
        where = replace(where, scores=scores, percentile=self.percentile)
        if self.document:
            where = replace(where, example_ids=tuple(audit.documents.windows(self.document)))
        concept = self.concept if given else None
        if self.dry_run:
            rows = audit.rows.count(where, concept, self.method)
            self._tell({"rows": rows if self.top is None else min(rows, self.top)}, "would be flagged")
            return
        method = audit.rankings.find(concept, self.method).identity.method if concept else ""
        chosen = [f"{name[2:]} {ranked[name]:g}" for name in given]
        chosen += [f"document {joined(self.document)}"] if self.document else []
        how = " ".join([method, self.concept or "", *chosen]).strip()
        found = audit.flags.set_matching(
            where,
            None if self.clear else self.as_,
            concept,
            self.method,
            self.note or None,
            top=self.top,
            how=how if given or self.document else "all that match",
        )
        self._tell({"event": found.event_id, "rows": found.n_texts}, "cleared" if self.clear else f"flagged {self.as_}")

    def _undo(self, audit: Audit) -> None:
        if self.undo == "last":
            found = audit.flags.undoable()
            if found.empty:
                raise AuditError("--undo last: there is no change of yours to undo; name one by its number")
            number = int(found["event_id"].iloc[0])
        else:
            try:
                number = int(str(self.undo))
            except ValueError:
                raise AuditError(f"--undo {self.undo}: give last, or the number of a change") from None
        change = audit.flags.undo(number)
        values = {"event": change.event_id, "rows": change.n_texts, "left_alone": change.left_alone}
        self._tell(values, f"put back as before change {number}")

    def _tell(self, values: dict[str, Any], what: str) -> None:
        if self.json:
            print_json(values)
            return
        undo = f"; undo with --undo {values['event']}" if values.get("event") else ""
        left = f"; {values['left_alone']:,} changed since, and left alone" if values.get("left_alone") else ""
        print(
            f"{values['rows']:,} texts {what}{left}{undo}" if "event" in values else f"{values['rows']:,} rows {what}"
        )
