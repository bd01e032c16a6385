"""The main job in a real browser: pick a feature, draw a probe, flag rows, take a CSV away."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest

from concept_audit import Audit, CurvatureOptions, IndexOptions, LabelledExample, Message
from tests.app.browser import PATIENCE, cards, coloured_tokens, row_of, settle, type_probe
from tests.app.conftest import FORMULA


def search(page, text: str) -> None:
    field = page.get_by_role("searchbox", name="Text")
    if not field.count():
        field = page.get_by_label("Text", exact=True)
    field.fill(text)
    field.press("Enter")
    settle(page)


def flag_first(page) -> int:
    """Flag the first row of the page; returns its number."""
    card = cards(page).first
    number = row_of(card)
    card.get_by_role("button", name="Remove").click()
    page.wait_for_selector(f'[class*="-{number}"] >> text="flagged: remove"')
    settle(page)
    return number


def test_an_sae_feature_leads_to_ranked_rows_with_heatmap_and_histogram(page, address):
    page.goto(f"{address}/concepts")
    settle(page)
    coloured_tokens(page).first.wait_for()
    page.get_by_role("combobox", name="Feature").click()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    settle(page)
    feature = re.search(r"feature=(\d+)", page.url)[1]
    page.get_by_role("link", name="Rank the data by this feature").click()
    page.wait_for_url("**/audit?**")
    settle(page)
    assert f"concept=sae%3A{feature}" in page.url or f"concept=sae:{feature}" in page.url
    assert cards(page).count() == 10
    assert "#1 " in cards(page).first.inner_text()
    coloured_tokens(page).first.wait_for()
    assert page.locator(".js-plotly-plot .bars path").count() > 3
    page.reload()
    settle(page)
    assert f"Feature {feature}:" in page.get_by_role("combobox", name="Concept").input_value()


def test_labelling_in_the_browser_makes_a_probe_and_its_ranking(page, address):
    page.goto(f"{address}/probe_lab")
    settle(page)
    type_probe(page, "mine")
    settle(page)
    for _ in range(4):
        page.get_by_role("button", name="Shows it").click()
        settle(page)
        page.keyboard.press("n")
        settle(page)
    page.get_by_text("Typed", exact=True).click()
    settle(page)
    page.get_by_role("textbox", name="Prompt").fill("Is the river safe?")
    page.get_by_role("textbox", name="Response").fill("Yes, truly and always safe.")
    page.get_by_role("button", name="Add example").click()
    page.get_by_text("5 show it · 4 do not").first.wait_for()
    settle(page)
    page.get_by_role("button", name="Train").click()
    page.wait_for_selector('[data-testid="stMetric"] >> text="Held-out AUROC"')
    settle(page)
    page.get_by_role("link", name="See the ranking").click()
    page.wait_for_url("**/audit?**")
    settle(page)
    assert "concept=probe" in page.url
    assert page.get_by_role("combobox", name="Concept").input_value() == "Probe: mine"
    assert cards(page).count() == 10
    coloured_tokens(page).first.wait_for()
    assert "held-out AUROC" in page.locator("body").inner_text()


def test_the_csv_holds_exactly_the_flagged_rows_and_hostile_text_does_no_harm(page, address, tmp_path):
    page.goto(f"{address}/audit?concept=sae:3")
    settle(page)
    flagged = [flag_first(page)]
    for text in ("HYPERLINK", "<script>"):
        search(page, text)
        assert cards(page).count() == 1
        assert text in cards(page).first.inner_text()
        flagged.append(flag_first(page))
    assert page.evaluate("window.harmed") is None
    assert page.locator("img[src='x']").count() == 0
    page.goto(f"{address}/export")
    settle(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download 3 rows").click()
    path = tmp_path / "flagged.csv"
    download.value.save_as(path)
    table = pd.read_csv(path)
    assert sorted(table["example_id"]) == sorted(flagged)
    assert set(table["flag"]) == {"remove"}
    formula = table[table["response"].str.contains("HYPERLINK")].iloc[0]
    assert formula["response"] == formula["prompt"] == "'" + FORMULA
    assert not any(
        str(cell).startswith(("=", "+", "@", "\t")) for column in ("prompt", "response") for cell in table[column]
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_renders_in_light_and_dark(browser, address, scheme):
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    for path in ("", "forecast", "concepts", "probe_lab", "audit", "compare", "groups", "evidence", "export"):
        page.goto(f"{address}/{path}")
        settle(page)
        colour = page.locator('[data-testid="stApp"]').evaluate("e => getComputedStyle(e).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
        assert (brightness > 128) == (scheme == "light")
    context.close()


def test_influence_is_computed_on_demand_and_shown_by_token(page, address):
    page.goto(f"{address}/audit?concept=sae:3&method=concept_influence&curvature=Identity")
    offer = page.locator(".st-key-offer")
    offer.get_by_text("has not been computed yet").wait_for(timeout=PATIENCE)
    offer.get_by_role("button", name="Compute").click()
    card = cards(page).first
    card.get_by_text("of which the prompt").wait_for(timeout=PATIENCE)
    offer.wait_for(state="detached", timeout=PATIENCE)
    assert "#1" in card.inner_text()
    assert coloured_tokens(page).count() > 5
    page.get_by_text("Activation", exact=True).click()
    page.get_by_text("activation at each token").wait_for(timeout=PATIENCE)
    page.reload()
    card.wait_for(timeout=PATIENCE)
    assert "colour=Activation" in page.url


def test_the_models_own_answer_is_shown_beside_the_rows(page, address):
    page.goto(f"{address}/audit?concept=sae:3&method=projection_difference")
    page.locator(".st-key-offer").get_by_role("button", name="Compute").click(timeout=PATIENCE)
    page.get_by_text("the model's own answer").first.wait_for(timeout=PATIENCE)


def test_a_new_probe_is_ranked_by_influence_at_once(page, address, cache_copy):
    audit = Audit(cache_copy / "small")
    rows = audit.rows.list(limit=8)
    audit.labels.add(
        "tone",
        [
            LabelledExample(tuple(Message(**turn) for turn in json.loads(text)), i % 2)
            for i, text in enumerate(rows["messages"])
        ],
    )
    audit.build_index(IndexOptions(1024, 40, curvature=CurvatureOptions(curvature_tokens=2_000), precision="float32"))
    page.goto(f"{address}/probe_lab?probe=tone")
    settle(page)
    page.get_by_role("button", name="Train").click()
    page.get_by_role("link", name="Rank by influence").click()
    cards(page).first.wait_for()
    settle(page)
    page.get_by_role("button", name="Fidelity").click()
    page.get_by_text("Against exact scores").wait_for()
    page.get_by_text("rows that read most as the probe stand above the others").wait_for()
    page.keyboard.press("Escape")
    assert "method=concept_influence" in page.url
    assert page.get_by_text("has not been computed yet").count() == 0
    assert cards(page).first.inner_text().startswith("#1")
    page.get_by_role("radio", name="Influence").click()
    page.get_by_text("of which the prompt").filter(visible=True).first.wait_for()  # of the row under the cursor
    # Nobody asks for exact scores: they take the place of the index's by themselves.
    page.get_by_role("button", name="Fidelity").click()
    page.get_by_text("All 83 scores are exact.").wait_for()
    page.keyboard.press("Escape")
    settle(page)
    assert "(exact)" in cards(page).first.inner_text() and coloured_tokens(page).count() > 0

    page.goto(f"{address}/groups?concept=probe:tone&method=concept_influence&beside=influence_function")
    settle(page)
    page.locator(".js-plotly-plot").nth(1).wait_for()
    assert "95% bootstrap interval" in page.inner_text("body")
    page.goto(f"{address}/groups?concept=probe:tone&by=topic")
    settle(page)
    assert "<b>rivers</b>" not in page.inner_text("h1") and "3 groups" in page.inner_text("body")
