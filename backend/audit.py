"""An audit in Python: what a notebook, the command line and the app all use."""

from __future__ import annotations

import getpass
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from backend.concepts.examples import distinct, example_activations
from backend.concepts.heatmap import Heatmap, feature_heatmaps, influence_heatmap, probe_heatmaps
from backend.concepts.probe import FITS, Fit, TrainedProbe, check_counts, train_probe
from backend.errors import ConceptError, StoreError
from backend.evidence.report import report
from backend.evidence.statistics import Estimate
from backend.export import with_metadata
from backend.model.load import LanguageModel, ModelOptions, load_model
from backend.pipeline.attribution import InfluenceOptions, forget_influence, token_influence
from backend.pipeline.groups import group_table
from backend.pipeline.index import IndexOptions, agreement, build_index, open_index, warm_index
from backend.pipeline.rank import (
    NEED_GRADIENTS,
    Request,
    Sources,
    finished,
    keep_query,
    request,
    scores_of,
    scores_of_many,
)
from backend.pipeline.validate import validate
from backend.pipeline.validation.first_order import first_order
from backend.pipeline.validation.options import ValidateOptions
from backend.progress import Progress
from backend.store import evidence as store_evidence
from backend.store import groups as store_groups
from backend.store import queries, workspace
from backend.store.database import database
from backend.store.filters import RowFilter
from backend.store.index import index_files
from backend.store.layout import Layout
from backend.store.manifest import Manifest, read_manifest
from backend.store.rankings import ranking_id
from backend.store.shards import TokenizedExample, read_answers, read_texts
from backend.types import Concept, LabelledExample

EVERY_ROW = RowFilter()
DEFAULTS = InfluenceOptions()
STALE_SECONDS = 120.0
RANK_COLUMNS = ["rank", "example_id", "score", "percentile", "prompt", "response"]
EXPORT_COLUMNS = ["example_id", "flag", "note", "prompt", "response", "source", "source_row", "content_hash"]


class Audit:
    """One audit on disk: its rows, concepts, rankings, labels and flags.

    Safe to share between threads. The model is loaded when something first needs it.

    Args:
        root: the audit's directory.
        progress: told about long work.

    Raises:
        StoreError: there is no finished audit there.
    """

    def __init__(self, root: str | Path, progress: Progress | None = None):
        self._layout = Layout(Path(root))
        self._progress = progress or Progress()
        if not self.manifest.complete:
            raise StoreError(
                f"{root}: this audit is not finished; run the same `concept-audit build` again, "
                "it goes on where it was"
            )
        self._database = database(self._layout)
        self._lm: LanguageModel | None = None
        self._model_guard = threading.Lock()

    @property
    def root(self) -> Path:
        return self._layout.root

    @property
    def name(self) -> str:
        return self._layout.root.resolve().name

    @property
    def manifest(self) -> Manifest:
        """What the audit was made from."""
        return read_manifest(self._layout.manifest)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose mean response activations are kept; probes live at one of them."""
        return tuple(self.manifest.configuration["layers"])

    def overview(self) -> queries.Overview:
        """Counts of rows, tokens, duplicates, concepts and flags."""
        return self._read(queries.overview)

    def metadata_fields(self) -> pd.DataFrame:
        """Metadata fields with their most frequent values: field, n_rows, n_values, top_values."""
        return self._read(queries.metadata_fields)

    # Concepts

    def concepts(self) -> pd.DataFrame:
        """Every concept: concept_id, name, kind, layer, label, version, details (JSON)."""
        return self._read(queries.concepts)

    def concept(self, name: str) -> Concept:
        """The concept with this name or id (``probe:flattery``, ``flattery``, ``sae:17``).

        Raises:
            ConceptError: there is none, or it is a probe of another model or of a layer not kept here.
        """
        concept = self._read(lambda cursor: queries.concept(cursor, name))
        if concept.kind == "probe":
            self._check_probe(concept)
        return concept

    def features(self, search: str = "", order: str = "max_activation") -> pd.DataFrame:
        """SAE features that fire: feature_id, label, density, max_activation, top_tokens, ..."""
        return self._read(lambda cursor: queries.features(cursor, search, order))

    def strongest_rows(self, feature: int, limit: int) -> pd.DataFrame:
        """The rows in which an SAE feature fires highest."""
        return self._read(lambda cursor: queries.strongest_rows(cursor, feature, limit))

    def spread_features(self, limit: int) -> list[str]:
        """Concept ids of the SAE features whose strength differs most between rows."""
        return self._read(lambda cursor: store_groups.spread_features(cursor, limit))

    def probes(self) -> list[workspace.SavedProbe]:
        """Every trained probe with what its training reported."""
        return self._read(workspace.probes)

    # Labels and probes

    def label(self, probe: str, examples: Sequence[LabelledExample]) -> None:
        """Keep labels for a probe, trained or not yet."""
        name = workspace.check_probe_name(probe)
        self._write(lambda cursor: workspace.label(cursor, name, examples))

    def unlabel(self, probe: str, content_hashes: Sequence[str] | None = None) -> None:
        """Forget labels of a probe: of these texts, or all."""
        self._write(lambda cursor: workspace.unlabel(cursor, probe, content_hashes))

    def labels(self, probe: str) -> list[LabelledExample]:
        """The labelled examples of a probe."""
        return self._read(lambda cursor: workspace.labels(cursor, probe))

    def label_counts(self) -> pd.DataFrame:
        """Probes begun or trained: probe, positives, negatives, trained."""
        return self._read(workspace.label_counts)

    def train_probe(
        self,
        name: str,
        examples: Sequence[LabelledExample] | None = None,
        layer: int | None = None,
        fits: Sequence[Fit] = FITS,
        progress: Progress | None = None,
    ) -> TrainedProbe:
        """Train a probe and save it under `name`; an earlier one of that name is replaced.

        Args:
            examples: the whole training set; None takes the labels kept under `name`.
            layer: a layer of the audit; None chooses by held-out AUROC.
            fits: ways of fitting to choose from.

        Raises:
            ConceptError: too few examples, one label only, contradicting labels, or a layer not kept.
        """
        name = workspace.check_probe_name(name)
        given = distinct(self.labels(name) if examples is None else examples)
        check_counts(sum(e.label == 1 for e in given), sum(e.label == 0 for e in given))
        layers = self.layers if layer is None else (self._tracked(layer),)
        manifest = self.manifest
        fingerprint = manifest.fingerprints["model"]
        activations = example_activations(
            self._layout, self._database, given, layers, fingerprint, manifest.configuration["max_tokens"],
            self.model, progress or self._progress,
        )  # fmt: skip
        spread = self._read(queries.spreads)
        trained = train_probe(activations, np.array([e.label for e in given]), spread, fits)
        details = {
            "auroc": trained.auroc,
            "auroc_low": trained.auroc_interval[0],
            "auroc_high": trained.auroc_interval[1],
            "n_positive": trained.n_positive,
            "n_negative": trained.n_negative,
            "tried": [{"layer": k, "fit": f, "auroc": a} for (k, f), a in trained.tried.items()],
        }

        def save(cursor) -> None:
            if examples is not None:
                workspace.unlabel(cursor, name)
                workspace.label(cursor, name, given)
            workspace.save_probe(
                cursor, name, trained.layer, trained.fit, trained.direction, details, fingerprint
            )

        self._write(save)
        forget_influence(self._layout, f"probe:{name}")
        return trained

    def delete_probe(self, name: str) -> None:
        """Remove a probe with its labels and rankings."""
        self._write(lambda cursor: workspace.delete_probe(cursor, name))
        forget_influence(self._layout, f"probe:{name}")

    # Rankings and rows

    def rank(
        self,
        concept: str,
        method: str = "vector_filter",
        top: int | None = None,
        where: RowFilter = EVERY_ROW,
        offset: int = 0,
        options: InfluenceOptions = DEFAULTS,
    ) -> pd.DataFrame:
        """Rows by influence on a concept: rank, score, percentile, then the row. Rank 1 pushes most.

        Ranks are among all rows, whatever the filter. The ranking is computed if it is not in the store.

        Args:
            method: one of `METHODS`.
            options: how influence is computed, for the methods that need to know.
        """
        ranking = self.ranking(concept, method, options)
        return self._read(lambda cursor: queries.rows(cursor, ranking, where, top, offset))

    def rank_table(self, concept: str, method: str = "vector_filter", top: int | None = None,
                   where: RowFilter = EVERY_ROW, options: InfluenceOptions = DEFAULTS) -> pd.DataFrame:  # fmt: skip
        """`rank` as a table to take away: `RANK_COLUMNS`, then a column for each metadata field."""
        return with_metadata(self.rank(concept, method, top, where, options=options), RANK_COLUMNS)

    def rows(self, where: RowFilter = EVERY_ROW, limit: int | None = None, offset: int = 0) -> pd.DataFrame:
        """Rows in the order of the data."""
        return self._read(lambda cursor: queries.rows(cursor, None, where, limit, offset))

    def sample(self, where: RowFilter, seed: str, limit: int) -> pd.DataFrame:
        """Rows in an order that looks random but is the same for a seed."""
        return self._read(lambda cursor: queries.sample(cursor, where, seed, limit))

    def count(
        self, where: RowFilter, concept: str | None = None, method: str = "vector_filter",
        options: InfluenceOptions = DEFAULTS,
    ) -> int:  # fmt: skip
        """How many rows pass a filter; with a concept, of those that it ranks."""
        ranking = self.ranking(concept, method, options) if concept else None
        return self._read(lambda cursor: queries.count_rows(cursor, ranking, where))

    def histogram(
        self, concept: str, method: str = "vector_filter", where: RowFilter = EVERY_ROW, bins: int = 60,
        options: InfluenceOptions = DEFAULTS,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
        """Bin edges, counts of all rows, and counts of the rows that pass the filter."""
        ranking = self.ranking(concept, method, options)
        return self._read(lambda cursor: queries.histogram(cursor, ranking, where, bins))

    def score_summary(
        self, concept: str, method: str = "vector_filter", options: InfluenceOptions = DEFAULTS
    ) -> dict[str, float]:
        """Mean, deviation and count of a ranking's scores."""
        ranking = self.ranking(concept, method, options)
        return self._read(lambda cursor: queries.score_summary(cursor, ranking))

    def ranking(
        self,
        concept: str,
        method: str = "vector_filter",
        options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> int:
        """The id of a ranking in the store, where it is put if it is not there.

        A computation that is interrupted goes on where it was when it is asked for again.

        Raises:
            ConceptError: no such concept, method or layer, or no queries.
            ModelError: the model has no weights to attribute to, or a row does not fit into memory.
        """
        found = self.concept(concept)
        ranking, wanted = self._request(found, method, options)
        if self._stored(ranking):
            return ranking
        scores = scores_of(self._sources(), wanted, ranking, progress or self._progress)
        build = self._read(queries.build_id)
        self._write(
            lambda cursor: workspace.save_ranking(cursor, build, found, method, wanted.parameters, scores)
        )
        finished(self._sources(), wanted, ranking)
        return ranking

    def has_ranking(self, concept: str, method: str, options: InfluenceOptions = DEFAULTS) -> bool:
        """Whether a ranking is in the store, so that asking for it costs nothing.

        Raises:
            ConceptError: as `ranking`.
        """
        return self._stored(self._request(self.concept(concept), method, options)[0])

    def rank_many(
        self, concepts: Sequence[str], method: str = "concept_influence", options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Put the rankings of several concepts into the store; the index answers them in one sweep.

        Raises:
            ConceptError, StoreError: as `ranking`.
        """
        missing = {}
        for name in concepts:
            concept = self.concept(name)
            ranking, wanted = self._request(concept, method, options)
            if not self._stored(ranking):
                missing[ranking] = wanted
        indexed = {ranking: wanted for ranking, wanted in missing.items() if wanted.index is not None}
        if indexed:
            told = progress or self._progress
            scores = scores_of_many(self._sources(), list(indexed.values()), told)
            build = self._read(queries.build_id)

            def save(cursor) -> None:
                for place, wanted in enumerate(indexed.values()):
                    workspace.save_ranking(
                        cursor, build, wanted.concept, method, wanted.parameters, scores[:, place]
                    )

            self._write(save)
        for wanted in missing.values():
            if wanted.index is None:
                self.ranking(wanted.concept.concept_id, method, options, progress)

    def groups(
        self, concept: str, method: str = "concept_influence", by: str = "sae_feature",
        options: InfluenceOptions = DEFAULTS, beside: str | None = None,
        beside_options: InfluenceOptions | None = None,
    ) -> pd.DataFrame:  # fmt: skip
        """Influence by group of rows: SAE features (rows in which one fires), sources, flags, or a metadata field.

        Args:
            by: ``sae_feature``, ``source``, ``flag``, or the name of a metadata field.
            beside: a second method, whose mean is put beside the first's.
            beside_options: its options; None for the same.

        Returns:
            group, label, n_rows, mean, low, high (95% bootstrap interval of the mean) and difference (of the
            mean from that of all rows, in standard deviations of the scores), by mean, largest first; with
            `beside`, also beside_mean, beside_low, beside_high.
        """
        ranking = self.ranking(concept, method, options)
        second = self.ranking(concept, beside, beside_options or options) if beside else None
        return self._read(lambda cursor: group_table(cursor, ranking, by, second))

    # The gradient index

    def build_index(
        self,
        options: IndexOptions | None = None,
        layers: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Build the gradient index, or what is missing of it; see `IndexOptions`.

        Args:
            layers: where concepts may live; None for the layers that the audit keeps.

        Returns:
            its description, with the fidelity that was found.
        """
        lm = self.model()
        chosen = tuple(layers) if layers else self.layers
        lm.check_layers(chosen)
        data = self.manifest.stages["read"]["key"]
        return build_index(
            self._layout, lm, data, chosen, options or IndexOptions(), progress or self._progress
        )

    def index(self) -> dict[str, Any] | None:
        """The description of the gradient index, if there is one that fits this audit."""
        manifest = self.manifest
        try:
            return open_index(self._layout, manifest.fingerprints["model"], manifest.stages["read"]["key"])
        except StoreError:
            return None

    def index_progress(self) -> dict[str, Any] | None:
        """How far the building of the index is: stage, share, seconds_left; None if none is being built."""
        told = index_files(self._layout).reported()
        # A process that was killed leaves its last report behind.
        return told if told and time.time() - told["at"] < STALE_SECONDS else None

    def warm(self) -> None:
        """Load what a new concept's influence needs, so that the first one is as fast as the next."""
        if self.index() is not None:
            warm_index(self._layout, self.model(), self.index())

    def served_by_index(self, concept: str, method: str, options: InfluenceOptions = DEFAULTS) -> bool:
        """Whether a ranking that is not in the store yet would come from the gradient index, in seconds.

        Raises:
            ConceptError: as `ranking`.
        """
        return self._request(self.concept(concept), method, options)[1].index is not None

    def heatmaps(self, concept: str, example_ids: Sequence[int]) -> dict[int, Heatmap]:
        """Token heatmaps of rows, by example id; a probe's take a forward pass the first time."""
        found = self.concept(concept)
        ids = [int(i) for i in example_ids]
        if not ids:
            return {}
        if found.kind == "sae_feature":
            return feature_heatmaps(self._layout, found, ids)
        return probe_heatmaps(self._layout, self._database, found, ids, self.model)

    def influence_heatmaps(
        self, concept: str, method: str, example_ids: Sequence[int], options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> dict[int, Heatmap]:  # fmt: skip
        """What each token of rows adds to their influence, by example id: the summands of the score.

        Computed for the rows that are asked for, and kept. Rows without a score are missing.

        Raises:
            ConceptError: the method has no token influences, or its ranking has not been computed.
        """
        ranking, wanted = self._ranked(concept, method, options)
        texts, known = self._token_influence(ranking, wanted, example_ids, progress or self._progress)
        return {
            i: influence_heatmap(i, row, known[row.content_hash])
            for i, row in texts.items()
            if row.content_hash in known
        }

    def exact_scores(
        self, concept: str, method: str, example_ids: Sequence[int], options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> dict[int, float]:  # fmt: skip
        """Exact influence of chosen rows, where a ranking came from the gradient index: example id → score.

        Kept, like the token influences that come with it.

        Raises:
            ConceptError: as `influence_heatmaps`.
        """
        ranking, wanted = self._ranked(concept, method, options)
        texts, known = self._token_influence(ranking, wanted, example_ids, progress or self._progress)
        return {
            i: float(known[row.content_hash].sum(dtype=np.float64))
            for i, row in texts.items()
            if row.content_hash in known
        }

    def check_exactly(
        self, concept: str, method: str = "concept_influence", top: int = 50,
        options: InfluenceOptions = DEFAULTS, progress: Progress | None = None,
    ) -> tuple[pd.DataFrame, dict[str, Any]]:  # fmt: skip
        """Score the first rows of a ranking exactly, and tell how well the index agrees on them.

        Returns:
            rank, example_id, score, exact_score of these rows, by exact score; and their rank correlation and
            the overlap of the top fifths (see `agreement`).
        """
        rows = self.rank(concept, method, top, options=options)[["rank", "example_id", "score"]]
        exact = self.exact_scores(concept, method, rows["example_id"].tolist(), options, progress)
        rows["exact_score"] = [exact.get(int(i), np.nan) for i in rows["example_id"]]
        scored = rows.dropna()
        told = agreement(scored[["score"]].to_numpy(), scored[["exact_score"]].to_numpy())
        return rows.sort_values("exact_score", ascending=False, ignore_index=True), told

    def _ranked(self, concept: str, method: str, options: InfluenceOptions) -> tuple[int, Request]:
        if method not in NEED_GRADIENTS:
            raise ConceptError(f"{method}: has no token influences; {', '.join(sorted(NEED_GRADIENTS))} have")
        ranking, wanted = self._request(self.concept(concept), method, options)
        if not self._stored(ranking):
            raise ConceptError(f"{method}: not computed yet for {concept}; rank by it first")
        return ranking, wanted

    def _token_influence(
        self, ranking: int, wanted: Request, example_ids: Sequence[int], progress: Progress
    ) -> tuple[Mapping[int, Any], dict[str, np.ndarray]]:
        """Rows by id, and the influence of each of their tokens by content; computed where it is not kept."""
        texts = read_texts(self._layout, [int(i) for i in example_ids])
        identity = f"influence:{ranking}"
        hashes = [row.content_hash for row in texts.values()]
        known = self._read(lambda cursor: workspace.cached_projections(cursor, identity, hashes))
        missing = {
            row.content_hash: TokenizedExample(i, row.content_hash, row.input_ids, row.parts)
            for i, row in texts.items()
            if len(known.get(row.content_hash, ())) != len(row.input_ids)
        }
        if missing:
            keep_query(self._sources(), wanted, ranking, progress)
            with progress.stage("Exact influence of these rows"):
                found = token_influence(self._layout, self.model, ranking, list(missing.values()))
            fresh = {h: found[row.example_id] for h, row in missing.items() if row.example_id in found}
            self._write(lambda cursor: workspace.cache_projections(cursor, identity, fresh))
            known |= fresh
        return texts, known

    # Evidence

    def validate(
        self, concept: str, options: ValidateOptions | None = None, progress: Progress | None = None
    ) -> store_evidence.Evidence:
        """Train without what the methods flag, and tell what it does to the model; see `ValidateOptions`.

        Raises:
            ConceptError: unknown concept, or options that make no sense.
        """
        found = self.concept(concept)
        return validate(self._sources(), found, options or ValidateOptions(), progress or self._progress)

    def first_order(
        self, concept: str, subsets: int = 40, size: int = 8, pool: int = 96, progress: Progress | None = None
    ) -> tuple[Estimate, pd.DataFrame]:
        """One small step on each of some random subsets, against influence without curvature.

        Args:
            subsets: how many.
            size: rows of each.
            pool: rows that they are drawn from.

        Returns:
            Pearson's correlation, and predicted and actual change of each subset.

        Raises:
            ConceptError: unknown concept, one without queries, or too few rows.
        """
        told = progress or self._progress
        return first_order(self._sources(), self.concept(concept), told, subsets, size, pool)

    def evidence_list(self) -> pd.DataFrame:
        """Validations that are kept, latest first: evidence_id, concept_id, version, number, current."""
        return self._read(store_evidence.list_evidence)

    def evidence(self, evidence_id: str) -> store_evidence.Evidence:
        """What a validation found.

        Raises:
            ConceptError: there is none with this id.
        """
        return self._read(lambda cursor: store_evidence.read_evidence(cursor, evidence_id))

    def evidence_report(self, evidence_id: str) -> tuple[str, dict[str, str]]:
        """A validation as a report: Markdown, where ``{figures}/`` is the place of its figures, and these as SVG.

        Raises:
            ConceptError: there is none with this id.
        """
        return report(self.evidence(evidence_id))

    def own_answers(self, example_ids: Sequence[int]) -> dict[int, str]:
        """What the model itself answers to rows' prompts, where `projection_difference` has asked it."""
        return read_answers(self._layout, [int(i) for i in example_ids])

    # Flags

    def flag(self, content_hashes: Sequence[str], flag: str = "remove", note: str = "", by: str = "") -> None:
        """Flag rows by content; copies of a row share its flag."""
        who = by or _user()
        self._write(lambda cursor: workspace.set_flags(cursor, content_hashes, flag, note, who))

    def flag_matching(
        self, where: RowFilter, flag: str | None, concept: str | None = None, method: str = "vector_filter",
        note: str = "", by: str = "", options: InfluenceOptions = DEFAULTS,
    ) -> None:  # fmt: skip
        """Flag every row that passes a filter, or take its flag off where `flag` is None."""
        ranking = self.ranking(concept, method, options) if concept else None
        who = by or _user()
        self._write(lambda cursor: workspace.flag_matching(cursor, ranking, where, flag, note, who))

    def unflag(self, content_hashes: Sequence[str]) -> None:
        """Take the flags off rows."""
        self._write(lambda cursor: workspace.clear_flags(cursor, content_hashes))

    def export_table(self, where: RowFilter) -> pd.DataFrame:
        """Rows to take away, with flags and metadata, in the order of the data."""
        return with_metadata(self.rows(where), EXPORT_COLUMNS)

    # The model

    def model(self) -> LanguageModel:
        """The model that the audit was made with.

        Raises:
            ModelError: it cannot be loaded.
            StoreError: its weights are not those that the audit was made with.
        """
        with self._model_guard:
            if self._lm is None:
                self._lm = self._load_model()
            return self._lm

    def _load_model(self) -> LanguageModel:
        manifest = self.manifest
        made_with: Mapping[str, Any] = manifest.configuration
        options = ModelOptions(
            made_with["model"], dtype=made_with["dtype"], trust_remote_code=made_with["trust_remote_code"]
        )
        lm = load_model(options, Path(made_with["cache"]), self._progress)
        if lm.fingerprint != manifest.fingerprints["model"]:
            raise StoreError(
                f"{self.root}: made with a model of fingerprint {manifest.fingerprints['model']}, but "
                f"{lm.name} now has {lm.fingerprint}; put the earlier weights back, or build again with --rebuild"
            )
        return lm

    def _sources(self) -> Sources:
        return Sources(self._layout, self._database, self.manifest, self.model)

    def _request(self, concept: Concept, method: str, options: InfluenceOptions) -> tuple[int, Request]:
        wanted = request(self._sources(), concept, method, options)
        build = self._read(queries.build_id)
        version, parameters = concept.version, wanted.parameters
        return ranking_id(build, concept.concept_id, version, method, parameters), wanted

    def _stored(self, ranking: int) -> bool:
        return self._read(lambda cursor: queries.ranking_stored(cursor, ranking))

    def _tracked(self, layer: int) -> int:
        if layer not in self.layers:
            raise ConceptError(
                f"--layer {layer}: this audit keeps layers {', '.join(map(str, self.layers))}; choose one of "
                "them, or build again with --layers"
            )
        return layer

    def _check_probe(self, concept: Concept) -> None:
        made_for = next(p for p in self.probes() if p.name == concept.name).model_fingerprint
        if made_for != self.manifest.fingerprints["model"] or concept.layer not in self.layers:
            raise ConceptError(
                f"probe {concept.name!r} was trained at layer {concept.layer} of the model {made_for}, and this "
                f"audit keeps layers {', '.join(map(str, self.layers))} of "
                f"{self.manifest.fingerprints['model']}; train it again, its labels are kept"
            )

    def _read(self, query: Callable):
        with self._database.reading() as cursor:
            return query(cursor)

    def _write(self, change: Callable):
        with self._database.writing() as cursor:
            return change(cursor)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
