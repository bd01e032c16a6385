"""SAE features: searching them, and what is known of each."""

from __future__ import annotations

import threading

import numpy as np
import pandas as pd

from concept_audit.api.base import OpenAudit, user_name
from concept_audit.concepts.features_of_text import TextFeatures, features_of_text
from concept_audit.concepts.sae import SparseAutoencoder, load_sae
from concept_audit.errors import ConceptError
from concept_audit.store import features as store_features
from concept_audit.store import groups as store_groups
from concept_audit.store import queries, workspace

LONGEST_LABEL = 120
_sae_guard = threading.Lock()


class Concepts(OpenAudit):
    """Concepts of an audit."""

    _sae: SparseAutoencoder | None = None

    def features(self, search: str = "", order: str = "max_activation", live_only: bool = True) -> pd.DataFrame:
        """SAE features: feature_id, label, density, max_activation, mean_activation, n_examples, top_tokens, promoted, layer.

        Args:
            search: in the label, the top tokens, or the tokens that the feature promotes.
            live_only: leave out features that never fire on the data.
        """
        return self._kept(
            ("features", search, order, live_only), lambda cursor: queries.features(cursor, search, order, live_only)
        )

    def feature(self, feature: int) -> pd.Series:
        """One SAE feature, with promoted, suppressed (tokens) and histogram (of its activations) besides.

        Raises:
            ConceptError: there is none of this number.
        """
        return self._kept(("feature", feature), lambda cursor: queries.feature(cursor, feature))

    def strongest_rows(self, feature: int, limit: int) -> pd.DataFrame:
        """The rows in which an SAE feature fires highest."""
        return self._kept(("strongest", feature, limit), lambda cursor: queries.strongest_rows(cursor, feature, limit))

    def rows_by_quantile(self, feature: int, each: int) -> pd.DataFrame:
        """Rows in which an SAE feature fires, by quarters of its strength there; see `rows_by_quantile` of the store."""
        return self._kept(
            ("quantiles", feature, each), lambda cursor: store_features.rows_by_quantile(cursor, feature, each)
        )

    def similar_features(self, direction: np.ndarray, limit: int, besides: int | None = None) -> pd.DataFrame:
        """The SAE features nearest to a direction: feature_id, label, n_examples, cosine."""
        key = ("similar", direction.tobytes(), limit, besides)
        return self._kept(key, lambda cursor: store_features.similar_features(cursor, direction, limit, besides))

    def separating_features(self, kind: str, name: str = "", value: str = "", limit: int = 12) -> pd.DataFrame:
        """SAE features that tell a group of rows from the others, by log-odds with a 95% interval.

        Args:
            kind: ``flagged``; ``labelled`` (the positive examples of the probe `name`); or ``metadata`` (the
                rows whose field `name` has this `value`).
        """
        group, parameters = store_features.group_of(kind, name, value)
        key = ("separating", kind, name, value, limit)
        return self._kept(key, lambda cursor: store_features.separating(cursor, group, parameters, limit))

    def spread_features(self, limit: int) -> list[str]:
        """Concept ids of the SAE features whose strength differs most between rows."""
        return self._read(lambda cursor: store_groups.spread_features(cursor, limit))

    def features_of_text(self, text: str) -> TextFeatures:
        """Which SAE features fire on which token of a text of one's own, read as an assistant's answer.

        Raises:
            ConceptError: the audit has no SAE, or the text is empty.
        """
        layer = self._made.configuration["sae_layer"]
        if layer is None:
            raise ConceptError(f"{self.name}: built without an SAE (--sae none), so there are no features to look for")
        if not text.strip():
            raise ConceptError("the text is empty: type a sentence")
        limit = self._made.configuration["max_tokens"]
        return features_of_text(self.model(), self._autoencoder(), layer, text, limit)

    def label_feature(self, feature: int, label: str | None, by: str = "") -> None:
        """Give an SAE feature a label of one's own; None brings the automatic one back.

        Raises:
            ConceptError: the label is empty or too long.
        """
        text = None if label is None else label.strip()
        if text is not None and not 0 < len(text) <= LONGEST_LABEL:
            raise ConceptError(f"label {text[:40]!r}: use 1 to {LONGEST_LABEL} characters")
        self._change(lambda cursor: workspace.label_feature(cursor, feature, text, by or user_name()))

    def lengths(self, bins: int = 30) -> tuple[np.ndarray, np.ndarray]:
        """Histogram of the rows' tokens: edges and counts."""
        return self._kept_of_build(("lengths", bins), lambda cursor: store_features.lengths(cursor, bins))

    def longest_row(self) -> int:
        """Tokens of the longest row; 0 if there are no rows."""
        return self._kept_of_build("longest", store_features.longest)

    def sources(self) -> pd.DataFrame:
        """Where the rows came from: source, n_rows."""
        return self._kept_of_build("sources", store_features.sources)

    def _autoencoder(self) -> SparseAutoencoder:
        with _sae_guard:
            if self._sae is None:
                made = self._made.configuration["sae"]
                source = str(self._layout.sae) if made == "train" else made
                self._sae = load_sae(source, self.model().device)
            return self._sae
