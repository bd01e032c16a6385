"""What a build is asked to do."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from concept_audit.concepts.options import SaeTraining
from concept_audit.data.conversation import BY_NAME, Columns
from concept_audit.model.options import ModelOptions

LONGEST_ROW = 2048
GIBIBYTE = 1 << 30


@dataclass(frozen=True)
class BuildOptions:
    """Settings of one build.

    Attributes:
        data: a file, a directory saved by `datasets`, or a name on the hub.
        out: directory of the audit.
        model: which model, and how it runs.
        cache: where built-in models are kept.
        layers: layers whose mean response activations are kept; None for three by default.
        sae: ``train``, ``none``, the directory of an SAE, or ``RELEASE:ID``.
        sae_layer: where to train an SAE, or where a loaded one reads if it does not say.
        max_tokens: rows are cut at this many tokens; None for the model's context, 2,048 at most.
        sae_disk: bytes of token activations kept to train the SAE from.
        score_cells: SAE features × rows that are ranked in the build; beyond, on demand.
        rebuild: replace an audit that was made with other settings; the workspace stays.
    """

    data: str
    out: Path
    model: ModelOptions
    cache: Path = Path("cache")
    columns: Columns = BY_NAME
    split: str = "train"
    layers: tuple[int, ...] | None = None
    sae: str = "train"
    sae_layer: int | None = None
    sae_training: SaeTraining = field(default_factory=SaeTraining)
    max_tokens: int | None = None
    sae_disk: int = 4 * GIBIBYTE
    score_cells: int = 20_000_000
    rebuild: bool = False


def key(*parts: Any) -> str:
    """Identify what a stage depends on: 16 hexadecimal digits."""
    content = json.dumps(parts, sort_keys=True, default=str).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()
