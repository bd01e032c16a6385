"""Validations from the Evidence page: what they cost, and starting, watching, stopping and going on."""

from __future__ import annotations

import threading
import time

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from concept_audit import Audit, Recipe, Stage, StoreError, ValidateOptions
from concept_audit.pipeline.validation import runs as validation_runs
from concept_audit_app.components.progress import WatchedProgress
from concept_audit_app.components.validating import validations
from tests.app.browser import dashboard, settle
from tests.app.test_pages import MAIN, words
from tests.backend.test_audit import typed

RECIPE = Recipe(rank=2, learning_rate=1e-2, max_steps=2, batch=4, max_tokens=40, precision="float32")
TINY = ValidateOptions(
    methods=("vector_filter",), retention=False, seeds=2, subsets=0, recipe=RECIPE, answer_tokens=2, natural_rows=4
)
RUNS = "Counterfactual runs"


class Stopped(Exception):
    pass


@pytest.fixture
def audit(cache_copy, monkeypatch) -> Audit:
    monkeypatch.setenv("CONCEPT_AUDIT_CACHE", str(cache_copy))
    monkeypatch.setenv("CONCEPT_AUDIT_NAME", "small")
    audit = Audit(cache_copy / "small")
    audit.train_probe("tone", typed(24), layer=2)
    return audit


def open_evidence(concept: str = "probe:tone") -> AppTest:
    test = AppTest.from_file(MAIN, default_timeout=60).run()
    test.query_params.update({"concept": concept})
    return test.switch_page("app_pages/evidence.py").run()


def button(test: AppTest, label: str):
    return next((each for each in test.button if each.label == label), None)


def wait_until(there) -> None:
    deadline = time.monotonic() + 60
    while not there() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert there()


def test_one_that_is_stopped_in_a_run_keeps_the_finished_runs_and_goes_on_to_the_same_end(audit, monkeypatch):
    done: list[int] = []
    one_run = validation_runs.one_run
    monkeypatch.setattr(validation_runs, "one_run", lambda *args: done.append(1) or one_run(*args))
    steps: list[int] = []

    def stop_in_the_third(stage: Stage) -> None:
        if stage.name == RUNS:
            steps.append(int(stage.done))
            if steps.count(2) == 3:  # the run has begun, and made a step
                with pytest.raises(StoreError, match="validates here already"):
                    Audit(audit.root).validate("tone", TINY)
                raise Stopped

    with pytest.raises(Stopped):
        audit.validate("tone", TINY, WatchedProgress(lambda stage: None, stop_in_the_third))
    evidence = audit.root / "shards" / "evidence"
    assert not list((evidence / "shared").glob("*")), "what all runs share goes with them"
    assert len(done) == 3 and audit.evidence.list().empty
    resumed = audit.validate("tone", TINY)
    cost = audit.evidence.cost(TINY)
    assert len(resumed.runs) == cost.runs + 1, "and the model that was not trained"
    assert len(done) == 3 + (cost.runs + 1 - 2), "two were finished, and are not done again"
    for path in evidence.rglob("*"):
        if path.is_file():
            path.unlink()
    again = audit.validate("tone", TINY)
    pd.testing.assert_frame_equal(resumed.results, again.results)


def test_the_cost_is_that_of_the_runs(audit):
    quick, full = audit.evidence.cost(ValidateOptions(quick=True)), audit.evidence.cost()
    n_rows = audit.overview().n_rows
    assert (quick.runs, quick.rows) == (1 + 6 * 2, min(144, n_rows))
    assert (full.runs, full.rows) == (3 + 3 * 2 * 8 + 30, n_rows)
    assert audit.evidence.cost(ValidateOptions(recipe=RECIPE)).rows == 2 * 4


def test_the_page_says_the_cost_and_tells_of_one_that_failed_was_stopped_or_is_under_way(audit, monkeypatch):
    test = open_evidence()
    assert not test.exception and "13 trainings on up to" in words(test)
    assert button(test, "Start") and not button(test, "Start").disabled
    key, go = (str(audit.root), "probe:tone"), threading.Event()

    def fail(progress):
        raise ValueError("the disk is full")

    validations().start(key, fail)
    wait_until(lambda: validations().find(key).done)
    test = open_evidence()
    assert "The validation failed: ValueError: the disk is full" in words(test).replace("\\", "")
    assert button(test, "Go on")

    def wait(progress):
        with progress.stage(RUNS, 4) as stage:
            stage.advance()
            go.wait(60)
            stage.advance()

    validations().start(key, wait)
    wait_until(lambda: validations().find(key).share == 0.25)
    test = open_evidence()
    assert "A validation is under way" in words(test) and button(test, "Start") is None
    (bar,) = test.get("progress")
    assert bar.proto.text.startswith(RUNS)
    other = open_evidence("sae:3")
    assert "Another validation is under way" in words(other) and button(other, "Start").disabled
    button(test, "Cancel").click().run()
    go.set()
    wait_until(lambda: validations().find(key).done)
    test = open_evidence()
    assert "was stopped, at counterfactual runs" in test.warning[0].value and button(test, "Go on")
    monkeypatch.setenv("CONCEPT_AUDIT_READ_ONLY", "1")
    test = open_evidence()
    assert not test.exception and "nothing is trained here" in words(test) and button(test, "Go on").disabled


def test_one_is_started_stopped_and_gone_on_with_in_a_browser(page, audit):
    with dashboard(audit.root.parent, "small") as url:
        page.goto(f"{url}/evidence?concept=probe:tone")
        settle(page)
        page.get_by_text("13 trainings on up to 83 rows each").wait_for()
        page.get_by_role("button", name="Start", exact=True).click()
        page.get_by_role("button", name="Cancel").click()
        page.get_by_text("The validation was stopped").wait_for()
        settle(page)
        assert Audit(audit.root).evidence.list().empty
        page.get_by_role("button", name="Go on").click()
        page.get_by_text("A validation is under way").wait_for()
        page.goto(url)
        settle(page)
        page.get_by_text("Validation:").first.wait_for()
        page.goto(f"{url}/evidence?concept=probe:tone")
        page.get_by_role("button", name="Cancel").click()
        page.get_by_text("The validation was stopped").wait_for()
