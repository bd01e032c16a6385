"""Labels of SAE features: made of words or by an endpoint, taken from a file, written to one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from concept_audit.audit.opened import OpenAudit, user_name
from concept_audit.concepts.labels import (
    FeatureExamples,
    Piece,
    drawn_piece,
    examples,
    piece,
    tokens_detection,
    word_counts,
    words_detection,
    words_label,
)
from concept_audit.data.feature_labels import COLUMNS, LeftOut, read_feature_labels
from concept_audit.data.write import Format, write_file
from concept_audit.errors import ConceptError
from concept_audit.evidence.endpoint import Endpoint
from concept_audit.evidence.labelling import REQUESTS, Budget, BudgetSpent, endpoint_detection, endpoint_label
from concept_audit.metrics import Estimate
from concept_audit.store import feature_labels as store
from concept_audit.store import workspace
from concept_audit.store.activations import read_fired
from concept_audit.store.cursor import Cursor
from concept_audit.store.examples import read_texts
from concept_audit.store.feature_labels import Firing, MadeLabel
from concept_audit.store.partition import by_shard, first_row

STRONGEST, DRAWN = 20, 60
"""Rows in which a feature fires that a label is made of and tried on."""
BACKGROUND, BACKGROUND_SHARDS = 1000, 16
"""Rows of so many shards, a piece of each: those in which a feature fires nowhere are set against its own."""
LEAST_FIRING = 4
"""A feature that fires in fewer rows has nothing to make a label of and to try it on."""
AT_ONCE = 64
"""Features whose texts are in memory together."""


@dataclass(frozen=True)
class Labelled:
    """What came of making labels.

    Attributes:
        made: features that have got one.
        before: features that had one already.
        too_few: features that fire in fewer than `LEAST_FIRING` rows.
        left: features that the budget did not reach.
        requests: sent to the endpoint.
    """

    made: int = 0
    before: int = 0
    too_few: int = 0
    left: int = 0
    requests: int = 0


@dataclass(frozen=True)
class Background:
    """A piece of a row that was drawn, and the features that fire in it."""

    piece: Piece
    features: frozenset[int]


class FeatureLabels:
    """Labels of SAE features, and how well each tells where its feature fires. A person's always comes first."""

    def __init__(self, opened: OpenAudit):
        self._opened = opened

    def list(self) -> pd.DataFrame:
        """Every label but for automatic ones that have no score: feature_id, layer, label, origin, maker, score, low,
        high, n, snippet, made_at, place (1 is the one that is shown)."""
        return self._opened.cached_read("feature_labels", store.labels)

    def of(self, feature: int) -> pd.DataFrame:
        """As `list`, of one feature."""
        return self._opened.cached_read(("feature_labels", feature), lambda cursor: store.label_of(cursor, feature))

    def clearest(self, features: Sequence[int]) -> dict[int, Piece]:
        """The text around the token on which each feature fires highest; features that never fire are left out."""

        def look(cursor: Cursor) -> dict[int, tuple[int, int]]:
            found = {feature: store.firing_sample(cursor, feature, 1, 0) for feature in features}
            return {feature: (each[0].example_id, each[0].position) for feature, each in found.items() if each}

        def read() -> dict[int, Piece]:
            places = self._opened.read(look)
            pieces = self._pieces(set(places.values()))
            return {feature: pieces[place] for feature, place in places.items()}

        return self._opened.remembered(("clearest", tuple(features)), read, of_build=True)

    def from_words(self, features: Sequence[int] | None = None, again: bool = False) -> Labelled:
        """Labels of the words that tell where a feature fires, and the score of these and of the tokens' labels.

        Args:
            features: None for all that fire.
            again: those too that have them.

        Raises:
            ConceptError: a feature is none of this audit, or it has no SAE.
        """
        wanted, automatic = self._wanted(features)
        had = set() if again else self._opened.read(lambda cursor: store.labelled(cursor, ("tokens",)))
        todo = [feature for feature in wanted if feature not in had]
        found = Labelled(before=len(wanted) - len(todo))
        background = self._background() if todo else {}
        counts = word_counts([one.piece for one in background.values()])
        with self._opened.progress.stage("Labels of features", len(wanted), "features") as stage:
            stage.skip(found.before)
            for group in _groups(todo):
                made: list[MadeLabel] = []
                wordless: list[int] = []
                for about in self._examples(group, background):
                    label = automatic[about.feature]
                    shown = about.firing[0].marked if about.firing else ""
                    score = tokens_detection(about, label)
                    made.append(MadeLabel(about.feature, "tokens", label, "", score, shown))
                    enough = len(about.firing) + len(about.held_firing) >= LEAST_FIRING
                    words = words_label(about, counts) if enough else ""
                    if words:
                        score = words_detection(about, words)
                        made.append(MadeLabel(about.feature, "words", words, "", score, shown))
                    else:
                        wordless.append(about.feature)
                    found = replace(found, made=found.made + bool(words), too_few=found.too_few + (not enough))
                self._save(made, wordless)
                stage.advance(len(group))
        return found

    def from_endpoint(
        self, endpoint: Endpoint, features: Sequence[int] | None = None, budget: int = 1000, again: bool = False
    ) -> Labelled:
        """Labels by a language model, each kept as soon as it is scored.

        Texts of the data go to the endpoint. A feature that a person has labelled, or this model, is left as it is.

        Args:
            features: None for all that fire, those first that stand out.
            budget: requests that may be sent, repeated ones counted.
            again: those too that have a label of this model.

        Raises:
            AuditError: the endpoint cannot be used.
            ConceptError: a feature is none of this audit, or it has no SAE.
        """
        wanted, _ = self._wanted(features)
        had = self._opened.read(
            lambda cursor: (
                store.labelled(cursor, ("person",))
                | (set() if again else store.labelled(cursor, ("endpoint",), endpoint.model))
            )
        )
        todo = [feature for feature in wanted if feature not in had]
        found = Labelled(before=len(wanted) - len(todo))
        counted = Budget(budget)
        asked = replace(endpoint, before_sending=counted.spend)
        background = self._background() if todo and counted.left >= REQUESTS else {}
        with self._opened.progress.stage("Labels of features", len(wanted), "features") as stage:
            stage.skip(found.before)
            try:
                for group in _groups(todo):
                    if counted.left < REQUESTS:
                        break
                    for about in self._examples(group, background):
                        if len(about.firing) + len(about.held_firing) < LEAST_FIRING:
                            found = replace(found, too_few=found.too_few + 1)
                            stage.advance()
                            continue
                        if counted.left < REQUESTS:
                            raise BudgetSpent
                        label = endpoint_label(asked, about)
                        score = endpoint_detection(asked, about, label)
                        snippet = about.firing[0].marked
                        self._save([MadeLabel(about.feature, "endpoint", label, endpoint.model, score, snippet)])
                        found = replace(found, made=found.made + 1)
                        stage.advance(detail=f"{counted.sent:,} requests")
            except BudgetSpent:
                pass
        left = len(todo) - found.made - found.too_few
        return replace(found, left=left, requests=counted.sent)

    def write(self, path: Path) -> int:
        """Write every label that `list` has to a ``.csv`` or ``.jsonl`` file; returns how many.

        CSV cells that a spreadsheet would take for a formula begin with an apostrophe.

        Raises:
            ConceptError: the file's name ends otherwise.
        """
        formats: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl"}
        if path.suffix not in formats:
            raise ConceptError(f"{path}: name a file that ends in .csv or .jsonl")
        frame = self.list()[list(COLUMNS)]
        records = [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]
        count, _ = write_file(lambda: records, formats[path.suffix], path, columns=COLUMNS)
        return count

    def take(self, path: Path) -> tuple[int, LeftOut]:
        """Take labels from a file, as `write` or Neuronpedia writes them.

        A person's label is kept as a person's, unless there is one here already; others count as imported, and an
        imported one that is there goes. Labels of the tokens are left: they are this audit's own.

        Returns:
            how many were taken, and how many were left out by reason.

        Raises:
            DataError: the file cannot be read, or has no label for this audit.
            ConceptError: the audit has no SAE.
        """
        self._wanted(())
        count = self._opened.read(store.n_features)
        layer = self._opened.made.configuration["sae_layer"]
        read, left_out = read_feature_labels(path, layer, count)

        def save(cursor: Cursor) -> int:
            written = store.labelled(cursor, ("person",))
            taken = 0
            made: dict[int, MadeLabel] = {}
            for one in read:
                if one.person:
                    if one.feature in written:
                        left_out["a person has labelled the feature here"] += 1
                        continue
                    workspace.label_feature(cursor, one.feature, one.label, one.maker or user_name())
                    taken += 1
                else:
                    score = Estimate(one.score, one.low, one.high, one.n)
                    kept = MadeLabel(one.feature, "import", one.label, one.maker or path.name, score, one.snippet)
                    if made.setdefault(one.feature, kept) is not kept:
                        left_out["the file has a label of the feature before it"] += 1
            store.save_labels(cursor, list(made.values()))
            return taken + len(made)

        return self._opened.change(save), left_out

    def _wanted(self, features: Sequence[int] | None) -> tuple[Sequence[int], dict[int, str]]:
        if self._opened.made.configuration["sae_layer"] is None:
            raise ConceptError(f"{self._opened.name}: built without an SAE (--sae none), so there are no features")
        automatic = self._opened.read(store.automatic_labels)
        unknown = [feature for feature in features or () if feature not in automatic]
        if unknown:
            raise ConceptError(
                f"SAE feature {unknown[0]}: there is none of this number that fires on this data; "
                "`concept-audit features` lists them"
            )
        return list(automatic) if features is None else list(dict.fromkeys(features)), automatic

    def _background(self) -> dict[int, Background]:
        sources = self._opened.sources()
        tokens = sources.shards("tokens")
        count = len(tokens.partition)
        chosen = sorted({number * count // BACKGROUND_SHARDS for number in range(BACKGROUND_SHARDS)})
        spans = [range(first_row(number), first_row(number + 1)) for number in chosen]
        ids = self._opened.read(lambda cursor: store.background_rows(cursor, spans, BACKGROUND))
        found: dict[int, Background] = {}
        for wanted in by_shard(ids).values():
            rows, fired = read_texts(tokens, wanted), read_fired(sources.shards("features"), wanted)
            for number in wanted:
                drawn = drawn_piece(rows[number], number)
                if drawn is not None:
                    places, features = fired[number].T
                    inside = (places >= drawn.tokens.start) & (places < drawn.tokens.stop)
                    found[number] = Background(drawn, frozenset(features[inside].tolist()))
        return found

    def _examples(self, features: Sequence[int], background: Mapping[int, Background]) -> Iterator[FeatureExamples]:
        def look(cursor: Cursor) -> dict[int, list[Firing]]:
            return {feature: store.firing_sample(cursor, feature, STRONGEST, DRAWN) for feature in features}

        firings: dict[int, list[Firing]] = self._opened.read(look)
        pieces = self._pieces({(one.example_id, one.position) for found in firings.values() for one in found})
        for feature in features:
            firing = [pieces[one.example_id, one.position] for one in firings[feature]]
            others = [one.piece for one in background.values() if feature not in one.features]
            yield examples(feature, firing, others[: STRONGEST + DRAWN])

    def _pieces(self, places: Collection[tuple[int, int]]) -> dict[tuple[int, int], Piece]:
        """The text around tokens, each given by its row and its place there."""
        tokens = self._opened.sources().shards("tokens")
        pieces: dict[tuple[int, int], Piece] = {}
        # A shard at a time: whole texts are not kept.
        for wanted in by_shard(sorted({example_id for example_id, _ in places})).values():
            rows = read_texts(tokens, wanted)
            pieces |= {place: piece(rows[place[0]], place[1]) for place in places if place[0] in rows}
        return pieces

    def _save(self, made: Sequence[MadeLabel], wordless: Sequence[int] = ()) -> None:
        def save(cursor: Cursor) -> None:
            for feature in wordless:
                store.forget_labels(cursor, feature, "words")
            store.save_labels(cursor, made)

        self._opened.change(save)


def _groups(features: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(features), AT_ONCE):
        yield features[start : start + AT_ONCE]
