"""What a build is asked to do."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from concept_audit.concepts.options import SaeTraining
from concept_audit.data.conversation import BY_NAME, Columns, TurnChoice
from concept_audit.data.rollouts import ALIKE, RewardColumns
from concept_audit.model.options import ModelOptions

LONGEST_ROW = 2048
GIBIBYTE = 1 << 30


@dataclass(frozen=True)
class BuildOptions:
    """Settings of one build.

    Attributes:
        data: a JSONL, JSON, CSV, TSV or Parquet file, a directory saved by `datasets`, or a data set's name on the
            Hugging Face hub.
        out: directory of the audit, or an address in object storage such as ``s3://bucket/audit`` (on the command line
            by default CACHE/DATA's name).
        model: which model, and how it runs.
        cache: where audits and built-in models are kept.
        columns: which columns hold the conversation.
        split: of a saved or hub data set.
        turns: which assistant turns count: ``mask`` for all but those that the rows mark by ``weight`` or ``train``,
            ``all`` whatever they mark, or the ``last``.
        on_bad_row: ``stop`` at a row that cannot be used, or ``skip`` it; the audit lists those with the reason.
        long_documents: rows of plain text that are longer than `max_tokens` are ``cut`` there, as fine-tuning without
            packing does, or ``split`` into windows, each a row that knows its document.
        rewards: whether rows are rollouts of reinforcement learning, and what they weigh by.
        beta: of the DPO loss by which preference pairs influence; it scales all scores alike.
        layers: layers whose mean response activations are kept, each counted in blocks run; None for three around
            the middle.
        sae: ``train`` a sparse autoencoder on this data, do with ``none``, load one from a directory, or load
            ``RELEASE:ID``, one that SAELens knows on the hub.
        sae_layer: where to train an SAE, or where a loaded one reads if it does not say; None for the middle one.
        sae_from_other_model: read a loaded SAE although its metadata name another model, another layer, or changes
            to the model's weights that are not done here.
        sae_training: how it is trained.
        max_tokens: cut rows at this many tokens; None for the model's context, 2,048 at most.
        sae_disk: bytes of token activations kept to train the SAE from.
        score_cells: SAE features × rows that are ranked in the build; beyond, on demand.
        rebuild: replace an audit that was made with other settings; labels, probes and flags stay.
    """

    data: str
    out: Path | str
    model: ModelOptions
    cache: Path = Path("cache")
    columns: Columns = BY_NAME
    split: str = "train"
    turns: TurnChoice = "mask"
    on_bad_row: Literal["stop", "skip"] = "stop"
    long_documents: Literal["cut", "split"] = "cut"
    rewards: RewardColumns = ALIKE
    beta: float = 0.1
    layers: tuple[int, ...] | None = None
    sae: str = "train"
    sae_layer: int | None = None
    sae_from_other_model: bool = False
    sae_training: SaeTraining = field(default_factory=SaeTraining)
    max_tokens: int | None = None
    sae_disk: int = 4 * GIBIBYTE
    score_cells: int = 20_000_000
    rebuild: bool = False


def key(*parts: Any) -> str:
    """Identify what a stage depends on: 16 hexadecimal digits."""
    content = json.dumps(parts, sort_keys=True, default=str).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()
