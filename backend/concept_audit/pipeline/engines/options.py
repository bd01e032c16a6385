"""Which engine does the heavy work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

EngineName = Literal["local", "processes", "ray"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)


@dataclass(frozen=True)
class EngineOptions:
    """Who does the heavy work. The result does not depend on it.

    Attributes:
        engine: ``local`` is this process alone, ``processes`` several on this machine, one a GPU or share of the CPU,
            and ``ray`` the workers of a Ray cluster (needs concept-audit[ray]).
        ray_address: of the Ray cluster, ``HOST:PORT``, or ``auto`` for the one that this machine is part of. By
            default what RAY_ADDRESS says, else Ray is started on this machine.
        workers: how many processes work. None for one a GPU, or as many as the CPUs have room for.
        gpus_per_worker: 1, or a share of one, such as 0.5 for two workers a GPU; 0 leaves GPUs alone. None takes 1 where there
            are GPUs.
        threads: of every process that computes, this one too: the order of sums, and so their last digits, depend on
            it. None for what PyTorch takes, shared among the workers of this machine.
    """

    engine: EngineName = "local"
    ray_address: str | None = None
    workers: int | None = None
    gpus_per_worker: float | None = None
    threads: int | None = None
