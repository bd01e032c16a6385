"""The short forms of `kill`, `disk` and `concurrency`: a few moments each of those that their long forms try."""

from __future__ import annotations

import copy
import random
import shutil

import pytest

from tests.faults.concurrency import lost, run
from tests.faults.disk import FailingDisk
from tests.faults.kill import Killing

KILLED = ("build", "people", "index", "probe", "rank", "flag", "export")


@pytest.fixture(scope="module")
def killing(warm, tmp_path_factory) -> Killing:
    return Killing(warm, tmp_path_factory.mktemp("kill"), KILLED, small=True)


@pytest.fixture(scope="module")
def disk(warm, tmp_path_factory) -> FailingDisk:
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("needs a C compiler")
    return FailingDisk(warm, tmp_path_factory.mktemp("disk"))


@pytest.mark.parametrize("step", KILLED)
def test_a_command_that_is_killed_and_run_again_ends_as_if_nothing_had_been(killing, step):
    killed, wrong = killing.trial(step, random.Random(step).uniform(0.2, 0.8))
    assert not wrong


@pytest.mark.parametrize("fault", ["full", "broken"])
@pytest.mark.parametrize("step", ["build", "people", "flag"])
def test_a_write_that_fails_is_told_in_words_and_loses_nothing(disk, step, fault):
    ended, wrong = disk.trial(step, random.Random(step + fault).randrange(1, disk.writes[step] + 1), fault)
    assert not wrong


def test_what_several_processes_were_told_is_what_the_audit_holds(warm, tmp_path):
    told, wrong = run(warm, tmp_path, processes=2, deeds=15)
    assert not wrong and len(told) == 30
    # The model notices what is not so.
    for what, field, value in [("flag", "flag", "another"), ("flag", "n", 9), ("label", "label", 7)]:
        other = copy.deepcopy(told)
        for one in other:
            if one["what"] == what:
                one[field] = value
        assert lost(tmp_path / "audit", other)
