"""One lock for each thing that is made: who comes second is told who holds it, and a dead holder holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from concept_audit import StoreError
from concept_audit.store.locks import all_held, awaited, held

HOLDING = (
    "import sys; from pathlib import Path; from concept_audit.store.locks import held\n"
    "with held(Path(sys.argv[1]), 'taken by {who}'):\n"
    "    print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def lock(tmp_path) -> Path:
    return tmp_path / "locks" / "index.lock"


@pytest.fixture
def holder(lock):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_who_comes_second_is_told_who_holds_it_where_and_since_when(lock, holder):
    told = rf"taken by another process \(PID {holder.pid} on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC\)"
    with pytest.raises(StoreError, match=told), held(lock, "taken by {who}"):
        pass
    with pytest.raises(StoreError, match=told), all_held(lock.parent, "taken by {who}"):
        pass


def test_the_lock_of_a_killed_process_is_free(lock, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with held(lock, "taken by {who}"):
        assert lock.with_suffix(".pid").exists()
    assert not lock.with_suffix(".pid").exists()


def test_who_waits_says_so_and_goes_on_when_the_other_one_has_ended(lock, holder):
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        holder.stdin.close()  # the other one ends

    with awaited(lock, "makes the same", say):
        assert holder.wait(30) == 0
    assert len(said) == 1 and f"PID {holder.pid}" in said[0] and "makes the same" in said[0]
    with awaited(lock, "makes the same", said.append):
        pass
    assert len(said) == 1


def test_two_threads_of_one_process_exclude_each_other(lock):
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with held(lock, "{who}"):
            inside.set()
            leave.wait()
            order.append("first")

    def second() -> None:
        with awaited(lock, "is first", lambda text: leave.set()):
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    inside.wait()
    with pytest.raises(StoreError, match=f"PID {os.getpid()}"), held(lock, "{who}"):
        pass
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert order == ["first", "second"]
