"""Rows with another response: who answers their prompts, what is kept of it, and the rows that come out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from concept_audit.errors import ConceptError
from concept_audit.evidence.endpoint import Endpoint
from concept_audit.evidence.labelling import Budget
from concept_audit.evidence.rewriting import Answer, answered_turn, endpoint_answer, rewritten
from concept_audit.model.chat import ChatRenderer
from concept_audit.model.generate import answers
from concept_audit.model.load import LanguageModel
from concept_audit.model.options import ModelSource
from concept_audit.pipeline.answers import ANSWER_TOKENS, last_response
from concept_audit.pipeline.engine import Worker
from concept_audit.pipeline.options import key
from concept_audit.pipeline.sources import Sources
from concept_audit.pipeline.validation.options import ResolvedOptions
from concept_audit.pipeline.validation.setting import Setting
from concept_audit.pipeline.validation.shared import Row
from concept_audit.progress import Progress
from concept_audit.store.activations import read_counted_answers
from concept_audit.store.evidence import Units, read_unit, units_of, write_unit
from concept_audit.store.examples import messages_json, read_conversations, read_examples
from concept_audit.store.shard_store import RowShards, ShardSet
from concept_audit.types import Message

ROWS_AT_ONCE = 32
"""Rows whose own answers are one unit of work."""


def check_prompts(sources: Sources, setting: Setting) -> None:
    """Raise ConceptError where a row that may be trained on has no prompt that could be answered anew."""
    lacking = [
        where
        for row, where, messages in _conversations(sources, set(setting.ids.tolist()))
        if not answered_turn(messages, setting.rows.response[row])
    ]
    if lacking:
        raise ConceptError(
            f"--rewrite: {len(lacking):,} of the rows to train on have no prompt to answer anew, as plain text has none "
            f"(the first is {lacking[0]}); leave --rewrite out, or audit conversations"
        )


def rewritten_rows(
    sources: Sources, setting: Setting, options: ResolvedOptions, wanted: Collection[int], progress: Progress
) -> dict[int, Row]:
    """Rows as they are trained on with another response, by example id; what was answered before is not asked again.

    Args:
        wanted: ids of the rows, all of which have a prompt.

    Raises:
        AuditError: the endpoint cannot be used, or is asked more often than allowed.
    """
    if not wanted:
        return {}
    turns = {row: messages for row, _, messages in _conversations(sources, set(wanted))}
    prompts = {row: messages[: answered_turn(messages, setting.rows.response[row])] for row, messages in turns.items()}
    if options.rewrite_url and options.rewrite_model:
        endpoint = Endpoint(
            options.rewrite_url, options.rewrite_model, url_option="--rewrite-url", model_option="--rewrite-model"
        )
        found = _by_endpoint(sources, endpoint, options.rewrite_budget, prompts, progress)
    else:
        found = _own(sources, setting, set(wanted), progress)
    renderer = ChatRenderer(sources.model().tokenizer, sources.manifest.configuration["max_tokens"])
    return {row: rewritten(renderer, turns[row], setting.rows.response[row], found[row]) for row in sorted(wanted)}


def _conversations(sources: Sources, wanted: Collection[int]) -> Iterator[tuple[int, str, tuple[Message, ...]]]:
    """Id, where it was read, and turns of chosen rows."""
    shards = sources.shards("rows")
    for number in shards.numbers():
        for row, _, where, messages in read_conversations(shards, number):
            if row in wanted:
                yield row, where, messages


def _by_endpoint(
    sources: Sources, endpoint: Endpoint, requests: int, prompts: dict[int, tuple[Message, ...]], progress: Progress
) -> dict[int, Answer]:
    """What an endpoint answers; each answer is kept as it comes. Rows with the same prompt are asked for once."""
    names = {
        row: f"rewritten-{key(endpoint.url, endpoint.model, ANSWER_TOKENS, messages_json(turns))}"
        for row, turns in prompts.items()
    }
    kept = {name: read_unit(sources.layout, name) for name in dict.fromkeys(names.values())}
    missing = [name for name, answer in kept.items() if answer is None]
    if len(missing) > requests:
        raise ConceptError(
            f"--rewrite-budget {requests:,}: {len(missing):,} prompts are to be answered by {endpoint.url}, one request "
            "each; raise it, or take a smaller --share or fewer --removed methods"
        )
    asked = {name: prompts[row] for row, name in names.items()}
    if missing:
        progress.say(f"Prompts of the data go to {endpoint.url}, in at most {requests:,} requests")
    counted = replace(endpoint, before_sending=Budget(requests, "--rewrite-budget").spend)
    with progress.stage("Rewriting rows", len(kept), "prompts") as stage:
        stage.skip(len(kept) - len(missing))
        for name in missing:
            answer = endpoint_answer(counted, asked[name], ANSWER_TOKENS)
            kept[name] = {"text": answer.text, "ended": answer.ended}
            write_unit(sources.layout, name, kept[name] or {})
            stage.advance()
    made = {name: Answer(**unit) for name, unit in kept.items() if unit is not None}
    return {row: made[name] for row, name in names.items()}


def _own(sources: Sources, setting: Setting, wanted: set[int], progress: Progress) -> dict[int, Answer]:
    """What the audited model answers itself.

    Rows are answered in the same batches whichever of them are wanted, so that more seeds or methods find the answers
    that there are.
    """
    pool = setting.ids.tolist()
    groups = [tuple(pool[start : start + ROWS_AT_ONCE]) for start in range(0, len(pool), ROWS_AT_ONCE)]
    groups = [group for group in groups if not wanted.isdisjoint(group)]
    model = sources.manifest.fingerprints["model"]
    names = tuple(f"own-{key(model, sources.data, ANSWER_TOKENS, group)}" for group in groups)
    work = OwnAnswers(
        units_of(sources.layout, names),
        sources.shards("tokens"),
        sources.shards("answers"),
        sources.model_source,
        tuple(groups),
    )
    sizes = {number: len(group) for number, group in enumerate(groups)}
    sources.driver(progress).finish(work, "The model's own answers", sizes)
    found: dict[int, Answer] = {}
    for name in names:
        made = (read_unit(sources.layout, name) or {})["answers"]
        found |= {int(row): Answer(text, count < ANSWER_TOKENS) for row, (text, count) in made.items()}
    return found


@dataclass(frozen=True)
class OwnAnswers:
    """The model's own answers to some rows' prompts, a group of rows a unit.

    A prompt is what stands before a row's last response, as in `concept_audit.pipeline.answers`, whose answers are
    taken where they are there.

    Attributes:
        units: what comes out.
        tokens: the rows as the model reads them.
        kept: answers that another method may have left.
        groups: ids of the rows of each unit.
    """

    units: Units
    tokens: RowShards
    kept: RowShards
    model: ModelSource
    groups: tuple[tuple[int, ...], ...]

    @property
    def outputs(self) -> tuple[ShardSet, ...]:
        return (self.units,)

    def open(self, worker: Worker) -> tuple[Worker, LanguageModel]:
        return worker, worker.model(self.model)

    def run(self, opened: tuple[Worker, LanguageModel], number: int) -> None:
        worker, lm = opened
        group = self.groups[number]
        found = read_counted_answers(self.kept, group)
        worker.advance(len(found))
        found |= self._answered([row for row in group if row not in found], worker, lm)
        self.units.write(number, {"answers": {str(row): list(found[row]) for row in group if row in found}})

    def _answered(self, rows: Sequence[int], worker: Worker, lm: LanguageModel) -> dict[int, tuple[str, int]]:
        """Answers that are missing, with their numbers of tokens."""
        renderer = ChatRenderer(lm.tokenizer, lm.context)
        found: dict[int, tuple[str, int]] = {}
        starts = {row.example_id: (row, last_response(row)) for row in read_examples(self.tokens, rows)}
        asked = {place: row.input_ids[:start] for place, (row, start) in starts.items() if start}
        worker.advance(len(rows) - len(asked))
        places = list(asked)
        for batch in answers(lm, list(asked.values()), ANSWER_TOKENS) if asked else ():
            found |= {places[index]: (renderer.decode(made), len(made)) for index, made in batch.items()}
            worker.advance(len(batch))
        return found
