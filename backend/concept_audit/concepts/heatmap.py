"""Token heatmaps: what each token of a row's responses adds to its score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from concept_audit.model.activations import response_activations
from concept_audit.model.chat import END_OF_TURN, PROMPT
from concept_audit.model.load import LanguageModel
from concept_audit.model.pairs import separator, sequences
from concept_audit.store.examples import TokenizedText
from concept_audit.types import Concept


@dataclass(frozen=True)
class Segment:
    """A piece of text with one value: a token, or several that share a character.

    Attributes:
        value: ⟨h_ℓ at the token, v⟩ for a probe, the activation for an SAE feature.
        end_of_turn: whether it is the token that closes a turn, which has no text of its own.
    """

    text: str
    value: float
    end_of_turn: bool = False


@dataclass(frozen=True)
class Heatmap:
    """The coloured text of one row.

    Attributes:
        turns: the segments of each assistant turn, in order; turns cut off by the context are missing.
        signed: whether values have a meaningful sign (probes, influence) or are at least 0 (SAE features).
        elsewhere: sum of the values of tokens outside the turns, such as the prompt's.
        rejected: the first of the turns of a preference pair's rejected side; None if the row is no pair.
    """

    example_id: int
    turns: tuple[tuple[Segment, ...], ...]
    signed: bool
    elsewhere: float = 0.0
    rejected: int | None = None


def feature_heatmap(example_id: int, row: TokenizedText, firings: np.ndarray) -> Heatmap:
    """A heatmap of an SAE feature.

    Args:
        firings: position and activation of each token on which it fires, float64 [firings, 2].
    """
    values = np.zeros(len(row.input_ids))
    values[firings[:, 0].astype(np.int64)] = firings[:, 1]
    return Heatmap(example_id, _turns(row, values), signed=False)


def probe_heatmap(example_id: int, row: TokenizedText, values: np.ndarray) -> Heatmap:
    """A heatmap of a probe.

    Args:
        values: float32 [tokens], as from `token_projections`.
    """
    return Heatmap(example_id, _turns(row, values), signed=True, rejected=_rejected(row))


def influence_heatmap(example_id: int, row: TokenizedText, values: np.ndarray) -> Heatmap:
    """A heatmap of token influences, which sum to the row's score.

    Args:
        values: float32 [tokens].
    """
    outside = float(values[row.parts[: len(values)] == PROMPT].sum())
    return Heatmap(example_id, _turns(row, values), signed=True, elsewhere=outside, rejected=_rejected(row))


def token_projections(lm: LanguageModel, concept: Concept, rows: Mapping[str, TokenizedText]) -> dict[str, np.ndarray]:
    """⟨h_ℓ, v⟩ at every token: name → float32 [tokens], for each of the named rows.

    Of a pair's rejected side it is −⟨h_ℓ, v⟩, as that side enters the pair's score, and 0 at the separator.
    """
    names = list(rows)
    parts = sequences([rows[name].input_ids for name in names], [rows[name].parts != PROMPT for name in names])
    found = {name: np.zeros(len(rows[name].input_ids), np.float32) for name in names}
    for batch in response_activations(lm, parts.ids, parts.response, [], [concept.layer]):
        for row in batch:
            name, sign = names[parts.owner[row.index]], parts.sign[row.index]
            values = sign * (row.streams[concept.layer] @ concept.direction)
            side = slice(-len(values), None) if sign < 0 else slice(0, len(values))
            found[name][side] = values
    return found


def _rejected(row: TokenizedText) -> int | None:
    place = separator(row.input_ids)
    return None if place is None else len(_runs(row.parts[:place]))


def _turns(row: TokenizedText, values: np.ndarray) -> tuple[tuple[Segment, ...], ...]:
    """Runs of response tokens, each an assistant turn, cut into segments."""
    return tuple(_segments(row, values, run) for run in _runs(row.parts))


def _runs(parts: np.ndarray) -> list[np.ndarray]:
    places = np.flatnonzero(parts != PROMPT)
    return np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(places) else []


def _segments(row: TokenizedText, values: np.ndarray, run: np.ndarray) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    reached = int(row.starts[run[0]])
    for place in run:
        start, end, value = int(row.starts[place]), int(row.ends[place]), float(values[place])
        if row.parts[place] == END_OF_TURN:
            if end > reached:
                segments.append(Segment("", value, end_of_turn=True))
                reached = end
            continue
        if end <= reached and segments:
            # A character of several tokens (an emoji, say) shows the largest of their values.
            before = segments[-1]
            segments[-1] = Segment(before.text, max(before.value, value, key=abs), before.end_of_turn)
            continue
        if start > reached and segments:
            segments[-1] = Segment(segments[-1].text + row.text[reached:start], segments[-1].value)
        segments.append(Segment(row.text[max(start, reached) : end], value))
        reached = end
    return tuple(segments)
