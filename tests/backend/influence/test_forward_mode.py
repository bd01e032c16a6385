"""Which rows are scored in forward mode, and that nobody meets the model while they are."""

from __future__ import annotations

import shutil
import threading

import numpy as np
import pytest

from concept_audit import Audit, InfluenceOptions, LabelledExample, Message
from concept_audit.influence import scoring
from concept_audit.influence.queries import Rows
from concept_audit.influence.scoring import score_rows
from concept_audit.model import budgets
from concept_audit.model.activations import response_activations
from concept_audit.pipeline import attribution
from concept_audit.progress import Progress
from tests.conftest import chat_rows


@pytest.fixture(scope="module")
def data() -> Rows:
    random = np.random.default_rng(3)
    ids = [random.integers(3, 390, length) for length in (8, 60, 21, 44, 30, 12)]
    # The last tokens of a row are no response: they count for nothing.
    return Rows(ids, [(np.arange(len(row)) >= 5) & (np.arange(len(row)) < len(row) - 2) for row in ids])


def scored(lm, query, data, **options) -> dict:
    return {row.index: row for batch in score_rows(lm, *query, data, **options) for row in batch}


def test_rows_that_are_too_long_go_by_forward_mode_and_the_others_do_not(lm, query, data):
    exact = scored(lm, query, data)
    scale = max(abs(row.scores[0]) for row in exact.values())
    for longest, far in ((60, []), (58, []), (57, [1]), (28, [1, 3]), (0, range(6))):
        found = scored(lm, query, data, longest=longest)
        assert sorted(found) == list(range(6))
        assert [i for i in range(6) if found[i].tokens is None] == list(far)
        for i, row in found.items():
            assert abs(row.scores[0] - exact[i].scores[0]) <= 1e-5 * scale
            assert row.loss == pytest.approx(exact[i].loss, rel=1e-5)
    with pytest.raises(ValueError, match="norm"):
        list(score_rows(lm, *query, data, unit_normalised=True, longest=30))


class Said(Progress):
    def __init__(self):
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_ranking_does_not_depend_on_the_memory_that_is_free(built, tmp_path, monkeypatch):
    """Little memory sends the long rows, and them alone, through forward mode; and says so."""
    made = chat_rows(8, seed=5)
    examples = [
        LabelledExample(tuple(Message(**turn) for turn in row["messages"]), i % 2) for i, row in enumerate(made)
    ]
    options = InfluenceOptions.of(precision="float32", curvature="identity")
    modes: list[tuple[str, int]] = []
    forward = scoring._slopes

    def slopes(lm, head, layers, tangents, batch):
        modes.extend(("forward", int(n)) for n in batch.real.sum(1))
        return forward(lm, head, layers, tangents, batch)

    monkeypatch.setattr(scoring, "_slopes", slopes)
    found = {}
    token = 4 * 32 * budgets.GRAPH_NUMBERS * 4
    for name, memory in (("ample", 1 << 40), ("scarce", 2 * 60 * token)):
        monkeypatch.setattr(attribution, "free_bytes", lambda device, memory=memory: memory)
        progress = Said()
        audit = Audit(shutil.copytree(built, tmp_path / name), progress)
        audit.train_probe("tone", examples, layer=2)
        found[name] = audit.rank("tone", "influence_function", options=options).set_index("example_id")["score"]
        told = [line for line in progress.lines if "forward mode" in line]
        assert bool(told) == (name == "scarce")
    assert told == [
        f"{len(modes)} rows of more than 60 tokens are scored in forward mode, which keeps less of them in memory"
    ]
    assert 0 < len(modes) < 300 and all(tokens > 60 for _, tokens in modes)
    scale = found["ample"].abs().max()
    assert (found["scarce"] - found["ample"].loc[found["scarce"].index]).abs().max() <= 1e-5 * scale


def test_nobody_else_may_run_the_model_while_its_weights_are_dual(lm, query, data):
    """Another thread asks for the model in the middle of a pass in forward mode."""
    got: list[bool] = []

    def ask() -> None:
        free = lm.lock.acquire(blocking=False)
        got.append(free)
        if free:
            lm.lock.release()

    def hook(*_) -> None:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    handle = lm.blocks[1].register_forward_hook(hook)
    try:
        scored(lm, query, data, longest=0)
    finally:
        handle.remove()
    assert got and not any(got)


def test_two_threads_score_and_read_one_model_to_the_numbers_of_one(lm, query, data):
    alone = {i: row.scores[0] for i, row in scored(lm, query, data, longest=0).items()}
    means = {r.index: r.mean[3] for batch in response_activations(lm, data.ids, data.response, [3]) for r in batch}
    failed: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            for batch in response_activations(lm, data.ids, data.response, [3]):
                for row in batch:
                    if not np.allclose(row.mean[3], means[row.index], rtol=1e-5, atol=1e-6):
                        failed.append(f"row {row.index}")

    def guarded() -> None:
        try:
            read()
        except Exception as error:
            failed.append(repr(error))

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        for _ in range(5):
            found = {i: row.scores[0] for i, row in scored(lm, query, data, longest=0).items()}
            assert found == pytest.approx(alone, rel=1e-5)
    finally:
        stop.set()
        thread.join()
    assert not failed
