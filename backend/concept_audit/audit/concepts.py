"""What an audit can be searched for: its SAE features and its probes."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pandas as pd

from concept_audit.audit.opened import OpenAudit, user_name
from concept_audit.audit.probes import Probes
from concept_audit.concepts.features_of_text import TextFeatures, features_of_text
from concept_audit.concepts.readable import promotion_tells
from concept_audit.concepts.sae import SparseAutoencoder
from concept_audit.errors import ConceptError
from concept_audit.store import features as store_features
from concept_audit.store import groups as store_groups
from concept_audit.store import queries, workspace
from concept_audit.types import Concept

LONGEST_LABEL = 120
READ = 20
"""Rows in which a feature fires that the tokens which it promotes are held against."""


class Concepts:
    """The concepts of an audit, and what is known of each SAE feature."""

    def __init__(self, opened: OpenAudit, probes: Probes):
        self._opened = opened
        self._probes = probes
        self._sae: tuple[str, SparseAutoencoder] | None = None
        self._sae_guard = threading.Lock()

    def list(self, live_only: bool = False) -> pd.DataFrame:
        """Every concept: concept_id, name, kind, layer, label, version, details (JSON).

        Args:
            live_only: leave out SAE features that never fire on the data.
        """
        return self._opened.cached_read(("concepts", live_only), lambda cursor: queries.concepts(cursor, live_only))

    def get(self, name: str) -> Concept:
        """The concept with this name or id (``probe:flattery``, ``flattery``, ``sae:17``).

        Raises:
            ConceptError: there is none, or it is a probe of another model or of a layer not kept here.
        """
        concept = self._opened.cached_read(("concept", name), lambda cursor: queries.concept(cursor, name))
        if concept.kind == "probe":
            self._check_probe(concept)
        return concept

    def features(self, search: str = "", order: str = "max_activation", live_only: bool = True) -> pd.DataFrame:
        """SAE features: feature_id, label, density, max_activation, mean_activation, n_examples, top_tokens, promoted, layer,
        label_origin, label_score (see `FeatureLabels`).

        Args:
            search: in the label, the top tokens, or the tokens that the feature promotes.
            live_only: leave out features that never fire on the data.
        """
        key = ("features", search, order, live_only)
        return self._opened.cached_read(key, lambda cursor: queries.features(cursor, search, order, live_only))

    def feature(self, feature: int) -> pd.Series:
        """One SAE feature, with promoted, suppressed (tokens) and histogram (of its activations) besides.

        Raises:
            ConceptError: there is none of this number.
        """
        return self._opened.cached_read(("feature", feature), lambda cursor: queries.feature(cursor, feature))

    def strongest_rows(self, feature: int, limit: int) -> pd.DataFrame:
        """The rows in which an SAE feature fires highest: max_activation, then the columns of the row."""
        key = ("strongest", feature, limit)
        return self._opened.cached_read(key, lambda cursor: queries.strongest_rows(cursor, feature, limit))

    def promotion_tells(self, feature: int) -> bool:
        """Whether the tokens that an SAE feature promotes have to do with the rows in which it fires most.

        See `concept_audit.concepts.readable.promotion_tells`.
        """
        about = self.feature(feature)
        return promotion_tells(about.promoted, about.suppressed, self.strongest_rows(feature, READ)["response"])

    def rows_by_quantile(self, feature: int, each: int) -> pd.DataFrame:
        """Rows in which an SAE feature fires, by quarters of its strength there; see `rows_by_quantile` of the store."""
        key = ("quantiles", feature, each)
        return self._opened.cached_read(key, lambda cursor: store_features.rows_by_quantile(cursor, feature, each))

    def similar(self, direction: np.ndarray, limit: int, besides: int | None = None) -> pd.DataFrame:
        """The SAE features nearest to a direction: feature_id, label, n_examples, cosine.

        Args:
            besides: a feature to leave out.
        """
        key = ("similar", direction.tobytes(), limit, besides)
        return self._opened.cached_read(
            key, lambda cursor: store_features.similar_features(cursor, direction, limit, besides)
        )

    def separating(self, kind: str, name: str = "", value: str = "", limit: int = 12) -> pd.DataFrame:
        """SAE features that tell a group of rows from the others, by log-odds with a 95% interval.

        Args:
            kind: ``flagged``; ``labelled`` (the positive examples of the probe `name`); or ``metadata`` (the
                rows whose field `name` has this `value`).

        Returns:
            feature_id, label, inside, outside (rows in which it fires), log_odds, low, high.
        """
        group, parameters = store_features.group_of(kind, name, value)
        key = ("separating", kind, name, value, limit)
        return self._opened.cached_read(key, lambda cursor: store_features.separating(cursor, group, parameters, limit))

    def spread(self, limit: int) -> Sequence[str]:
        """Concept ids of the SAE features whose strength differs most between rows."""
        return self._opened.read(lambda cursor: store_groups.spread_features(cursor, limit))

    def of_text(self, text: str) -> TextFeatures:
        """Which SAE features fire on which token of a text of one's own, read as an assistant's answer.

        Raises:
            ConceptError: the audit has no SAE, or the text is empty.
        """
        made = self._opened.made.configuration
        if made["sae_layer"] is None:
            raise ConceptError(
                f"{self._opened.name}: built without an SAE (--sae none), so there are no features to look for"
            )
        if not text.strip():
            raise ConceptError("the text is empty: type a sentence")
        return features_of_text(self._opened.model(), self._autoencoder(), made["sae_layer"], text, made["max_tokens"])

    def label(self, feature: int, label: str | None, by: str = "") -> None:
        """Give an SAE feature a label of one's own; None brings the automatic one back.

        Raises:
            ConceptError: the label is empty or too long.
        """
        text = None if label is None else label.strip()
        if text is not None and not 0 < len(text) <= LONGEST_LABEL:
            raise ConceptError(f"label {text[:40]!r}: use 1 to {LONGEST_LABEL} characters")
        self._opened.change(lambda cursor: workspace.label_feature(cursor, feature, text, by or user_name()))

    def _check_probe(self, concept: Concept) -> None:
        made_for = next(p for p in self._probes.list() if p.name == concept.name).model_fingerprint
        here, layers = self._opened.made.fingerprints["model"], self._opened.layers
        if made_for != here or concept.layer not in layers:
            raise ConceptError(
                f"probe {concept.name!r} was trained at layer {concept.layer} of the model {made_for}, and this "
                f"audit keeps layers {', '.join(map(str, layers))} of {here}; train it again, its labels are kept"
            )

    def _autoencoder(self) -> SparseAutoencoder:
        with self._sae_guard:
            # The key is a hash over the weights: a build may have made the audit anew, with another SAE.
            key = self._opened.made.key("features")
            if self._sae is None or self._sae[0] != key:
                self._sae = key, self._opened.sources().sae_source.load(self._opened.model().device)
            return self._sae[1]
