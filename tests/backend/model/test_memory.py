"""How much memory is free: each kind of device is asked, by its own name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from concept_audit.errors import ModelError
from concept_audit.model import batches, budgets, memory
from concept_audit.model.memory import UNKNOWN, free_bytes, free_on_machine, give_back, room_on

CPU = torch.device("cpu")


def files(root, **texts):
    for name, text in texts.items():
        path = root / name.replace("__", "/").replace("_max", ".max").replace("_now", ".current").replace(
            "_stat", ".stat"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_linux_tells_what_is_available_and_a_container_its_limit(tmp_path):
    files(tmp_path, proc__meminfo="MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable:      50 kB\n")
    assert free_on_machine(tmp_path) == 50 * 1024
    files(tmp_path, sys__fs__cgroup__memory_max="max\n", sys__fs__cgroup__memory_now="10\n")
    files(tmp_path, sys__fs__cgroup__memory_stat="anon 5\ninactive_file 3000\n")
    assert free_on_machine(tmp_path) == 50 * 1024
    files(tmp_path, sys__fs__cgroup__memory_max="20000\n", sys__fs__cgroup__memory_now="8000\n")
    assert free_on_machine(tmp_path) == 20_000 - 8_000 + 3_000
    files(tmp_path, sys__fs__cgroup__memory_now="90000\n")
    assert free_on_machine(tmp_path) == 0


def test_elsewhere_half_of_the_memory_is_taken_for_free(tmp_path, monkeypatch):
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    assert free_on_machine(tmp_path) == 2_048_000

    def unknown(name):
        raise ValueError(name)

    monkeypatch.setattr(memory.os, "sysconf", unknown)
    assert free_on_machine(tmp_path) == UNKNOWN


def test_this_machine_has_some_memory():
    assert 1 << 20 < free_bytes(CPU) < 1 << 50


def test_cuda_is_asked_for_the_very_device(monkeypatch):
    asked = []
    second = torch.device("cuda:1")
    for name, value in (("mem_get_info", (1000, 5000)), ("memory_reserved", 300), ("memory_allocated", 100)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: asked.append(device) or value)
    assert free_bytes(second) == 1000 + 300 - 100
    assert asked == [second] * 3


def test_an_accelerator_gives_a_share_of_what_is_free_and_a_processor_the_least(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: {"cuda": 8000, "mps": 400}[device.type])
    assert room_on(torch.device("cuda"), 1000) == 2000
    assert room_on(torch.device("mps"), 1000) == 1000
    assert room_on(CPU, 1000) == 1000


def test_mps_tells_what_it_recommends(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 900)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 200)
    assert free_bytes(torch.device("mps")) == 700


@pytest.mark.parametrize(
    "words",
    ["MPS backend out of memory (MPS allocated: 9 GB)", "Invalid buffer size: 20.00 GB", "can't allocate memory"],
)
def test_a_batch_that_does_not_fit_is_halved_and_its_device_gives_back_what_it_holds(words, monkeypatch):
    given = []
    monkeypatch.setattr(batches, "give_back", given.append)

    def run(rows):
        if len(rows) > 1:
            raise RuntimeError(words)
        return list(rows)

    device = torch.device("cuda:1")
    assert list(batches.halving([1, 2, 3], run, lambda text: None, device)) == [[1], [2], [3]]
    assert given == [device, device]
    with pytest.raises(ModelError, match="batch of one row"):
        list(batches.halving([1], lambda rows: run([*rows, 2]), lambda text: None, device))
    give_back(CPU)  # has nothing to give back


@pytest.mark.parametrize(
    ("width", "blocks", "tokens", "large"),
    [(576, 30, 8192, 2048), (4096, 32, 4468, 1489), (8192, 80, 893, 512), (65536, 200, 512, 512)],
)
def test_a_batch_of_a_large_model_keeps_no_more_for_its_backward_pass(width, blocks, tokens, large):
    lm = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, d_model=width, blocks=range(blocks))
    least, one = budgets.TOKENS_PER_BATCH_CPU, budgets.graph_bytes(lm, blocks)
    budget = budgets.gradient_tokens_per_batch(lm)
    assert budget == tokens == budgets.large_tokens_per_batch(lm)
    assert budget == least or budget * one <= budgets.GRAPH_BYTES
    lm.device = torch.device("cpu")
    assert budgets.gradient_tokens_per_batch(lm) == least
    assert budgets.large_tokens_per_batch(lm) == large
    assert large == least or large * one <= budgets.LARGE_GRAPH_BYTES_CPU
