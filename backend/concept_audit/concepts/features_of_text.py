"""Which SAE features fire on a text that a person types."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from concept_audit.concepts.sae import SparseAutoencoder
from concept_audit.model.activations import response_activations
from concept_audit.model.chat import CONTENT, PROMPT, ChatRenderer
from concept_audit.model.load import LanguageModel
from concept_audit.types import Message


@dataclass(frozen=True)
class TextFeatures:
    """What fires where.

    Attributes:
        tokens: the text, cut into tokens.
        token: int64 [firings], places in `tokens`.
        feature: int32 [firings].
        activation: float32 [firings].
    """

    tokens: tuple[str, ...]
    token: np.ndarray
    feature: np.ndarray
    activation: np.ndarray

    def strongest(self) -> list[tuple[int, float, list[tuple[int, float]]]]:
        """Features by their highest activation: number, highest, and (place, activation) of each firing."""
        found = []
        for feature in np.unique(self.feature):
            mine = np.flatnonzero(self.feature == feature)
            fired = [(int(self.token[i]), float(self.activation[i])) for i in mine]
            found.append((int(feature), max(value for _, value in fired), fired))
        return sorted(found, key=lambda each: (-each[1], each[0]))


def features_of_text(lm: LanguageModel, sae: SparseAutoencoder, layer: int, text: str, max_tokens: int) -> TextFeatures:
    """Run the model on a text as an assistant's answer, as the rows were, and encode its tokens.

    Args:
        layer: where the SAE reads.
        max_tokens: longer texts are cut.
    """
    # With a turn before it, as in most rows: at the very first token activations are of another size.
    row = ChatRenderer(lm.tokenizer, max_tokens).render((Message("user", ""), Message("assistant", text)))
    (batch,) = response_activations(lm, [row.input_ids], [row.parts != PROMPT], [], [layer])
    content = np.flatnonzero(row.parts == CONTENT)
    token, feature, activation = sae.encode(batch[0].streams[layer][content])
    pieces = tuple(row.text[int(row.starts[i]) : int(row.ends[i])] for i in content)
    return TextFeatures(pieces, token, feature, activation)
