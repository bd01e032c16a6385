"""The Probe lab's frame: which probe is open, and what training again has changed."""

from __future__ import annotations

import pytest
from streamlit.testing.v1 import AppTest

from concept_audit import Audit
from tests.app.browser import dashboard, settle
from tests.app.test_pages import MAIN, words
from tests.backend.test_audit import typed


@pytest.fixture
def audit(cache_copy, monkeypatch) -> Audit:
    monkeypatch.setenv("CONCEPT_AUDIT_CACHE", str(cache_copy))
    monkeypatch.setenv("CONCEPT_AUDIT_NAME", "small")
    audit = Audit(cache_copy / "small")
    for name in ("anger", "tone"):
        audit.train_probe(name, typed(24), layer=2)
    return audit


def box(test: AppTest):
    return next(box for box in test.selectbox if box.label == "Probe")


def test_a_bare_lab_opens_no_probe_but_offers_a_new_one_and_those_that_there_are(audit):
    test = AppTest.from_file(MAIN, default_timeout=60).run().switch_page("app_pages/probe_lab.py").run()
    assert not test.exception and box(test).value is None
    assert "Draw a concept of your own" in "".join(str(e.value) for e in test.subheader)
    assert any(field.label == "Name of a new probe" for field in test.text_input)
    shown = next(button for button in test.button if button.label == "tone").click().run()
    assert not shown.exception and box(shown).value == "tone"
    new = AppTest.from_file(MAIN, default_timeout=60).run().switch_page("app_pages/probe_lab.py").run()
    named = next(field for field in new.text_input if field.label == "Name of a new probe").set_value("brand new").run()
    assert (
        not named.exception
        and box(named).value == "brand new"
        and "label 4 more that show it and 4 more that do not" in words(named)
    )


def test_a_bare_lab_opens_the_probe_of_the_other_pages(audit):
    test = AppTest.from_file(MAIN, default_timeout=60).run()
    test.query_params.update({"concept": "probe:tone"})
    test = test.switch_page("app_pages/evidence.py").run()
    test.query_params.clear()
    test = test.switch_page("app_pages/probe_lab.py").run()
    assert not test.exception and box(test).value == "tone"


def test_what_training_again_changed_is_shown_in_a_browser(page, cache_copy):
    audit = Audit(cache_copy / "small")
    examples = typed(24)
    audit.train_probe("tone", examples, layer=2)
    audit.labels.remove("tone", [example.content_hash for example in examples[:8]])
    with dashboard(cache_copy, "small") as url:
        page.goto(f"{url}/probe_lab?probe=tone")
        settle(page)
        assert page.get_by_text("What training changed").count() == 0
        lines = page.locator(".label-queue > div")
        assert lines.count() > 5 and lines.nth(0).get_attribute("aria-selected") == "true"
        page.locator("h1").first.click()
        page.keyboard.press("j")
        assert lines.nth(1).get_attribute("aria-selected") == "true", "at once, and nobody is asked"
        page.keyboard.press("t")
        page.get_by_text("What training changed").wait_for()
        settle(page)
        change = Audit(cache_copy / "small").trainings.change("tone")
        assert (change.before, change.now) == (1, 2) and len(change.entered)
        assert page.get_by_text(f"{len(change.entered)} of the {change.top} strongest rows are new.").is_visible()
        first = change.entered.iloc[0]
        page.get_by_role("link", name=f"#{first['rank']:,}").first.click()
        page.wait_for_url("**/audit?**")
        settle(page)
        assert f"row={first['example_id']}" in page.url
