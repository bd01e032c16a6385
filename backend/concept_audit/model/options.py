"""Which model an audit is of, and where it is loaded from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Trained = Literal["lora", "all"]
TRAINED: tuple[Trained, ...] = get_args(Trained)


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it runs.

    Attributes:
        name: ``smollm2-135m-instruct`` (built in), a model directory, a name on the Hugging Face hub, or a
            PEFT adapter in either place: its base is loaded and the adapter put on it.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; ``auto`` takes CUDA, then Apple's MPS, then the CPU. ``split``
            shares the weights out over all GPUs, then memory, then disk: for activations, not for gradients.
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto`` is bfloat16 on CUDA and float32 elsewhere.
        trust_remote_code: run Python code that comes with the model.
    """

    name: str
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class ModelSource:
    """Where any process gets a model from, and how it knows that it is the right one.

    Attributes:
        options: which model, and how it runs.
        cache: where built-in models are kept.
        fingerprint: of the weights that are meant; see `concept_audit.model.load.fingerprint`.
    """

    options: ModelOptions
    cache: Path
    fingerprint: str
