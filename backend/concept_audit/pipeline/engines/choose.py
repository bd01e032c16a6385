"""The engine that is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from concept_audit.errors import AuditError
from concept_audit.pipeline.engine import Engine
from concept_audit.pipeline.engines.dispatch import CrewEngine
from concept_audit.pipeline.engines.on_ray import ADDRESS_VARIABLE, RayEngine
from concept_audit.pipeline.engines.options import EngineOptions
from concept_audit.pipeline.engines.processes import ProcessEngine


@contextmanager
def working(options: EngineOptions) -> Iterator[Engine | None]:
    """The engine, until the body ends; None for this process. Meanwhile as many threads as asked for take sums.

    Raises:
        AuditError: options that make no sense, or not together; Ray is not installed.
    """
    _check(options)
    before = torch.get_num_threads()
    try:
        _set_threads(options)
        if options.engine == "local":
            yield None
            return
        several = options.workers, options.gpus_per_worker
        ray = options.engine == "ray"
        made: CrewEngine = RayEngine(options.ray_address, *several) if ray else ProcessEngine(*several)
        with made:
            yield made
    finally:
        torch.set_num_threads(before)


def _set_threads(options: EngineOptions) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    elif options.workers and not (options.engine == "ray" and (options.ray_address or ADDRESS_VARIABLE in os.environ)):
        # The workers of this machine share its cores. Here there are as many threads as there, for equal sums.
        torch.set_num_threads(max(1, torch.get_num_threads() // options.workers))


def _check(options: EngineOptions) -> None:
    if options.ray_address and options.engine != "ray":
        raise AuditError(f"--ray-address {options.ray_address}: only with --engine ray")
    several = {"--workers": options.workers, "--gpus-per-worker": options.gpus_per_worker}
    given = [f"{name} {value:g}" for name, value in several.items() if value is not None]
    if given and options.engine == "local":
        raise AuditError(f"{', '.join(given)}: only with --engine processes or --engine ray")
    for name, value in (("--workers", options.workers), ("--threads", options.threads)):
        if value is not None and value < 1:
            raise AuditError(f"{name} {value}: must be 1 or more")
    if options.gpus_per_worker is not None and options.gpus_per_worker < 0:
        raise AuditError(f"--gpus-per-worker {options.gpus_per_worker:g}: must not be negative")
