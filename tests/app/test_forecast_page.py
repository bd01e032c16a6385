"""The forecast's page: what it offers, shows and compares, and its computing in the background."""

from __future__ import annotations

import shutil
import threading
import time

import numpy as np
import pandas as pd
import pytest

from concept_audit import Audit, ForecastTrial, Progress, Recipe, RowFilter
from concept_audit_app.components.forecast_view import by_ranking, edge, forecast_chart
from concept_audit_app.components.forecasting import Jobs
from tests.app.test_pages import open_page, words


@pytest.fixture(scope="module")
def forecast_cache(forecast_base, tmp_path_factory):
    """A cache whose audit has the forecast of all its rows, and of the first rows that somebody flagged."""
    cache = shutil.copytree(forecast_base, tmp_path_factory.mktemp("forecast") / "cache")
    audit = Audit(cache / "small")
    audit.flags.set(audit.rows.list(limit=20)["content_hash"].tolist(), "remove")
    audit.forecasts.ensure(RowFilter(flag="any"))
    return cache


@pytest.fixture
def page(forecast_cache, monkeypatch):
    monkeypatch.setenv("CONCEPT_AUDIT_CACHE", str(forecast_cache))
    return open_page("forecast")


def test_a_forecast_that_is_not_there_is_offered_and_not_in_read_only(cache_copy, monkeypatch):
    monkeypatch.setenv("CONCEPT_AUDIT_CACHE", str(cache_copy))
    test = open_page("forecast")
    assert not test.exception and "has not been computed yet" in words(test)
    assert "Nobody has measured" in words(test)
    assert any(button.label == "Compute the forecast" for button in test.button)
    monkeypatch.setenv("CONCEPT_AUDIT_READ_ONLY", "1")
    test = open_page("forecast")
    assert not test.exception and "Read-only" in words(test)
    assert not any(button.label == "Compute the forecast" for button in test.button)


def test_the_page_shows_what_is_kept_and_compares_parts(page, forecast_cache):
    audit = Audit(forecast_cache / "small")
    assert not page.exception
    assert f"Of {len(audit.concepts.features()):,} SAE features" in words(page)
    features = next(frame.value for frame in page.dataframe if "null_low" in frame.value)
    assert len(features) == len(audit.concepts.features())
    every = audit.forecast().set_index("concept_id")["forecast"]  # whatever is flagged
    assert features["forecast"].tolist() == every.loc[features["concept_id"]].tolist()
    box = next(box for box in page.selectbox if box.label == "Forecast of")
    for view in ("part", "compare", "without"):
        shown = box.select(view).run()
        assert not shown.exception and "by chance" in words(shown), view
        box = next(box for box in shown.selectbox if box.label == "Forecast of")


def test_what_training_said_of_the_forecast_is_shown_where_it_was_measured_and_not_claimed_elsewhere(
    page, forecast_cache, tmp_path, monkeypatch
):
    assert "Nobody has measured" in words(page) and "Measured on this audit" not in words(page)
    assert any("--forecast --quick" in block.value for block in page.code)
    cache = shutil.copytree(forecast_cache, tmp_path / "cache")
    audit = Audit(cache / "small")
    recipe = Recipe(rank=2, max_steps=1, batch=4, max_tokens=24)
    evidence = audit.validate_forecast(ForecastTrial(weights=("lora",), seeds=1, recipe=recipe))
    assert len(evidence.results)
    monkeypatch.setenv("CONCEPT_AUDIT_CACHE", str(cache))
    test = open_page("forecast")
    assert not test.exception
    assert "Measured on this audit: LoRA (1 run" in words(test) and "Nobody has measured" not in words(test)
    assert any("prediction" in frame.value for frame in test.dataframe)
    other = Audit(cache / "small").evidence.list()
    assert "" not in other["concept_id"].tolist()


def test_what_reaches_far_beyond_all_else_stands_at_the_edge_with_its_number():
    near = pd.DataFrame({"title": list("abc"), "forecast": [2.0, 1.0, -1.5], "low": 0.5, "high": 2.5})
    near = near.assign(null_low=-0.1, null_high=0.1)
    figure = forecast_chart(near, "effect")
    assert figure.data[1].x.tolist() == [2.0, 1.0, -1.5] and figure.layout.xaxis.range is None
    far = pd.concat([near, near.iloc[[0]].assign(title="d", forecast=-70.0, low=-90.0, high=-50.0)])
    marks = forecast_chart(far, "effect").data[1]
    assert (
        marks.x.tolist() == pytest.approx([2.0, 1.0, -1.5, -2.75])
        and marks.text[-1] == "-70"
        and not any(marks.text[:3])
    )
    assert marks.marker.symbol.tolist() == ["circle"] * 3 + ["triangle-left"]
    assert marks.error_x.arrayminus.tolist()[-1] == 0 and marks.customdata[-1].tolist() == [-70.0, -90.0, -50.0]
    assert edge(np.array([1.0] * 20 + [30.0] * 3)) == pytest.approx(1.1)
    # Half of the rows are not a few, and of one or none there are no others.
    assert all(np.isinf(edge(np.array(reach))) for reach in ([1.0] * 12 + [30.0] * 12, [30.0], [], [0.0, 1.0]))
    low, high = forecast_chart(far, "effect").layout.xaxis.range
    assert low < -2.75 and high > 2.5 and high - low < 7


def test_rankings_of_one_concept_are_told_apart_in_the_what_if():
    made = pd.DataFrame({"concept_id": ["sae:1", "sae:2"], "parameters": ['{"damping": 10.0}'] * 2, "before": 1.0})
    assert by_ranking(made).columns.tolist() == ["concept_id", "before"]
    both = pd.concat([made, made.assign(parameters='{"damping": 0.1, "contrast": true}')], ignore_index=True)
    names = by_ranking(both)["ranking"].tolist()
    assert names[0] == names[1] != names[2] == names[3]
    assert "contrast" in names[2] and "damping 0.1" in names[2] and "damping 10" in names[0]


def test_flags_that_are_not_there_yet_are_said_to_be_missing(cache_copy, monkeypatch):
    monkeypatch.setenv("CONCEPT_AUDIT_CACHE", str(cache_copy))
    test = open_page("forecast")
    box = next(box for box in test.selectbox if box.label == "Forecast of")
    shown = box.select("without").run()
    assert not shown.exception and "No row is flagged yet" in words(shown)


def test_work_in_the_background_tells_how_far_it_is_and_can_be_stopped():
    jobs, key, go = Jobs(), ("audit", "all"), threading.Event()

    def compute(progress: Progress) -> None:
        with progress.stage("Rows", 4) as stage:
            stage.advance(1)
            go.wait(30)
            stage.advance(1)
            raise AssertionError("it goes on although it was stopped")

    jobs.start(key, compute)
    job = jobs.find(key)
    deadline = time.monotonic() + 30
    while job.share != 0.25 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert job.share == 0.25 and job.doing.startswith("Rows") and not job.done
    jobs.start(key, compute)
    assert jobs.find(key) is job  # one is enough
    job.cancelled.set()
    go.set()
    while not job.done and time.monotonic() < deadline:
        time.sleep(0.01)
    assert job.done and not job.problem


def test_what_goes_wrong_in_the_background_is_kept_for_the_page():
    jobs, key = Jobs(), ("audit", "all")

    def compute(progress: Progress) -> None:
        raise ValueError("broken")

    jobs.start(key, compute)
    deadline = time.monotonic() + 30
    while not jobs.find(key).done and time.monotonic() < deadline:
        time.sleep(0.01)
    assert jobs.find(key).problem == "ValueError: broken"
