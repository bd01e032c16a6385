"""While the gradient index is being built: what can be done now is said where influence is asked for."""

from __future__ import annotations

import shutil

import pytest
from streamlit.testing.v1 import AppTest

from concept_audit import Audit, Stage
from concept_audit.store.index import index_files
from concept_audit.store.layout import Layout
from concept_audit.store.partition import RowPartition
from concept_audit.store.under_way import report
from tests.app.browser import cards, dashboard, settle
from tests.app.test_pages import MAIN, SMALL_INDEX, words


def being_built(audit: Audit):
    """A report as that of another process which builds the index."""
    files = index_files(Layout(audit.root), "0", RowPartition(300))
    files.write_description({"done": False})
    stage = Stage("Gradient of every row", 200, "rows")
    stage.advance(90)
    report(files.rows.store, files.progress, stage)
    return files


@pytest.fixture
def audit(cache_copy, monkeypatch) -> Audit:
    monkeypatch.setenv("CONCEPT_AUDIT_CACHE", str(cache_copy))
    monkeypatch.setenv("CONCEPT_AUDIT_NAME", "small")
    return Audit(cache_copy / "small")


def test_influence_says_what_answers_now_and_goes_there_at_a_click(audit):
    test = AppTest.from_file(MAIN, default_timeout=60).run()
    test.query_params.update({"concept": "sae:3", "method": "concept_influence"})
    plain = test.switch_page("app_pages/ranking.py").run()
    assert "answers in seconds once" not in words(plain), "nothing is being built"
    being_built(audit)
    test = AppTest.from_file(MAIN, default_timeout=60).run()
    test.query_params.update({"concept": "sae:3", "method": "concept_influence"})
    test = test.switch_page("app_pages/ranking.py").run()
    assert not test.exception
    assert "answers in seconds once the gradient index is there" in words(test)
    (bar,) = test.get("progress")
    assert "gradient of every row" in bar.proto.text
    ranked = next(button for button in test.button if button.label == "Feature activation now").click().run()
    assert not ranked.exception and "answers in seconds once" not in words(ranked)
    assert next(box for box in ranked.selectbox if box.label == "Method").value == "feature_activation"


def test_the_page_draws_itself_anew_when_the_index_is_there(audit, page):
    files = being_built(audit)
    with dashboard(audit.root.parent, "small") as url:
        page.goto(f"{url}/audit?concept=sae:3&method=concept_influence")
        settle(page)
        page.get_by_text("answers in seconds once the gradient index is there").wait_for()
        assert cards(page).count() == 0
        shutil.rmtree(files.root)
        audit.build_index(SMALL_INDEX)
        cards(page).first.wait_for(timeout=60_000)
        assert page.get_by_text("answers in seconds once").count() == 0
