"""How much memory is free where a model runs, and giving back what is held there without use."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch

UNKNOWN = 4 << 30
"""Taken for the free bytes of a machine that does not tell."""
SHARE = 0.25
"""Of an accelerator's free memory, that statistics of one kind may take, and of any that a model may which nobody asked for."""


def free_bytes(device: torch.device) -> int:
    """Bytes that tensors may still take on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What PyTorch keeps there without using it is free as well.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return free_on_machine()


def room_on(device: torch.device, least: int) -> int:
    """Bytes that may be held for a while on a device, so that fewer passes over the model are needed.

    Args:
        least: what is taken where memory is shared with all else that runs, and anywhere at least.
    """
    return least if device.type == "cpu" else max(least, int(SHARE * free_bytes(device)))


def free_on_machine(root: Path = Path("/")) -> int:
    """Bytes that this process may still take of the machine's memory, or of its container's where that is less.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    machine = _available(root / "proc/meminfo")
    if machine is None:
        machine = _physical() // 2
    groups = root / "sys/fs/cgroup"
    limits = [
        _headroom(groups / "memory.max", groups / "memory.current", groups / "memory.stat"),
        _headroom(
            groups / "memory/memory.limit_in_bytes",
            groups / "memory/memory.usage_in_bytes",
            groups / "memory/memory.stat",
        ),
    ]
    return min([machine, *(limit for limit in limits if limit is not None)])


def give_back(device: torch.device) -> None:
    """Return what is held on a device without use, so that a model or a smaller attempt may fit.

    That is what PyTorch keeps for later, and what refers to itself, such as the model of an audit that was let go:
    the garbage collector counts objects and not their bytes, so it may come by much later.
    """
    gc.collect()
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _available(meminfo: Path) -> int | None:
    """What Linux could give to a process without swapping."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _physical() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 2 * UNKNOWN


def _headroom(limit: Path, used: Path, stat: Path) -> int | None:
    """What a control group may still take; None where there is no limit."""
    try:
        most, now = int(limit.read_text()), int(used.read_text())
        # Files that were read count as used, and are dropped when memory is wanted.
        cached = [int(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith("inactive_file ")]
    except (OSError, ValueError):
        return None
    return max(0, most - now + sum(cached))
