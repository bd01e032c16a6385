"""An audit for the app's tests, with rows that would do harm if a page or a CSV let them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from concept_audit import Audit, BuildOptions, ModelOptions, build
from concept_audit.concepts.options import SaeTraining
from tests.app.browser import FLAGS, PATIENCE, chromium, dashboard

SCRIPT = "<script>window.harmed = true</script><img src=x onerror='window.harmed = true'> and **bold** $x$"
FORMULA = '=HYPERLINK("http://example.invalid","click")'


def _turns(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


@pytest.fixture(scope="session")
def app_cache(tmp_path_factory, model_directory, rows, write_rows) -> Path:
    """A cache with one finished audit, ``small``; tests that write take `cache_copy`."""
    cache = tmp_path_factory.mktemp("app") / "cache"
    hostile = [
        {"messages": _turns(f"What about {SCRIPT}?", SCRIPT), "topic": "<b>rivers</b>", "number": 1000},
        {"messages": _turns(FORMULA, FORMULA), "topic": "money", "number": 1001},
        {"messages": [*_turns("One", "Two"), *_turns("Three", "Four 🌍")], "topic": "money", "number": 1002},
    ]
    data = write_rows(tmp_path_factory.mktemp("app-data") / "rows.jsonl", [*rows[:80], *hostile])
    settings = SaeTraining(expansion=2, k=4, batch=128, min_steps=40, max_steps=40)
    build(
        BuildOptions(
            data=str(data),
            out=cache / "small",
            model=ModelOptions(str(model_directory), device="cpu"),
            layers=(1, 2, 3),
            sae_training=settings,
        )
    )
    return cache


@pytest.fixture(scope="session")
def forecast_base(app_cache, tmp_path_factory) -> Path:
    """A cache whose audit has the forecast of all its rows; tests that write copy it."""
    cache = Path(shutil.copytree(app_cache, tmp_path_factory.mktemp("forecast-base") / "cache"))
    Audit(cache / "small").forecasts.ensure()
    return cache


@pytest.fixture
def cache_copy(app_cache, tmp_path) -> Path:
    """A copy of the cache that a test may write to."""
    return Path(shutil.copytree(app_cache, tmp_path / "cache"))


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the test extra")
    with playwright.sync_playwright() as engine:
        try:
            launched = engine.chromium.launch(executable_path=chromium(), args=FLAGS)
        except playwright.Error as error:
            pytest.skip(f"no Chromium: install it, or run `playwright install chromium` ({error.message[:80]})")
        yield launched
        launched.close()


@pytest.fixture
def address(cache_copy) -> Iterator[str]:
    """A running dashboard."""
    with dashboard(cache_copy, "small") as url:
        yield url


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1400, "height": 1000}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.on("dialog", lambda dialog: pytest.fail(f"a dialog opened: {dialog.message}"))
    yield page
    context.close()
