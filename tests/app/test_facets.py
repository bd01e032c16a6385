"""Facets of the Audit page: what the rows of the view hold, and clicks that narrow it."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, urlparse

import pandas as pd
import pytest

from concept_audit import Audit, RowFilter
from concept_audit_app.components.facet_filter import span
from concept_audit_app.components.found import phrase_found
from tests.app.browser import settle, words

BARS = ".st-key-facets fieldset"


@pytest.fixture
def audit(cache_copy) -> Audit:
    audit = Audit(cache_copy / "small")
    audit.flags.set_matching(RowFilter(metadata={"topic": ("money",)}), "remove", top=5)
    return audit


def opened(page, address: str, query: str = ""):
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(f"{address}/audit?concept=sae:3{query}")
    settle(page)
    page.get_by_role("button", name="Filters").click()
    page.locator("fieldset").first.wait_for()
    settle(page)
    return page


def field(page, name: str):
    return page.get_by_role("group", name=name, exact=True)


def value(page, name: str, shown: str):
    return field(page, name).locator(".value").filter(has=page.locator(f'.name:text-is("{shown}")'))


def asked(page, key: str) -> list[str]:
    return parse_qs(urlparse(page.url).query).get(key, [])


def counts(page, name: str) -> dict[str, int]:
    lines = field(page, name).locator(".value").all()
    return {
        line.locator(".name").inner_text(): int(line.locator(".count").evaluate("e => e.firstChild.data"))
        for line in lines
    }


def test_a_click_keeps_a_value_a_shift_click_leaves_one_out_and_the_counts_follow(page, address, audit, tmp_path):
    everything = audit.rank("sae:3")
    everything["topic"] = [json.loads(text)["topic"] for text in everything["metadata"]]
    everything["number"] = [json.loads(text)["number"] for text in everything["metadata"]]
    opened(page, address)
    by_topic = everything["topic"].value_counts().to_dict()
    assert counts(page, "topic") == by_topic
    money = everything[everything["topic"] == "money"]
    share = round(100 * (money["flag"] == "remove").mean())
    assert f"{share}% flagged" in value(page, "topic", "money").inner_text()
    value(page, "topic", "<b>rivers</b>").locator("button").first.click(modifiers=["Shift"])
    page.wait_for_url("**not_topic=**")
    settle(page)
    assert asked(page, "not_topic") == ["<b>rivers</b>"]
    page.get_by_role("button", name="topic is not <b>rivers</b>", exact=True).wait_for()
    assert counts(page, "topic") == by_topic, "of the field itself all that could be chosen"
    value(page, "topic", "money").locator("button").first.click()
    page.wait_for_url("**where_topic=money**")
    settle(page)
    assert f"{len(money)} of {len(everything)} rows" in words(page)
    bars = field(page, "number").locator(".plot button")
    told = [bar.get_attribute("aria-label") for bar in bars.all() if bar.is_enabled()]
    assert sum(int(each.split(": ")[1].split(" rows")[0]) for each in told) == len(money)
    field(page, "number").get_by_label("number from").fill("10")
    field(page, "number").get_by_label("number to").fill("50")
    page.keyboard.press("Enter")
    page.wait_for_url("**range_number=10.0..50.0")
    settle(page)
    page.keyboard.press("Escape")
    kept = money[money["number"].between(10, 50)]
    assert 0 < len(kept) < len(money) and f"{len(kept)} of {len(everything)} rows" in words(page)
    page.get_by_role("button", name="number: 10 to 50", exact=True).wait_for()
    page.reload()
    settle(page)
    assert f"{len(kept)} of {len(everything)} rows" in words(page), "the filter is in the URL"
    page.get_by_role("link", name="Export this view").click()
    page.wait_for_url("**/export**")
    settle(page)
    with page.expect_download() as download:
        page.get_by_role("button", name=f"Download {len(kept)} rows").click()
    download.value.save_as(tmp_path / "view.csv")
    assert set(pd.read_csv(tmp_path / "view.csv")["example_id"]) == set(kept["example_id"])
    page.get_by_role("button", name="number: 10 to 50", exact=True).click()
    page.get_by_role("button", name=f"Download {len(money)} rows").wait_for()


def test_a_bound_typed_while_the_other_is_answered_is_not_lost(page, address, audit):
    opened(page, address)
    field(page, "number").get_by_label("number from").fill("10")
    field(page, "number").get_by_label("number to").press("5")
    page.wait_for_url("**range_number=10.0..inf")
    settle(page)
    page.keyboard.type("0")
    assert field(page, "number").get_by_label("number to").input_value() == "50"
    page.keyboard.press("Tab")
    page.wait_for_url("**range_number=10.0..50.0")


def test_quick_clicks_all_count(page, address, audit):
    opened(page, address)
    for name in ("money", "rivers"):
        value(page, "topic", name).locator("button").first.click()
    page.wait_for_url("**where_topic=money&where_topic=rivers**")
    settle(page)
    value(page, "topic", "money").locator("button").first.click()
    value(page, "topic", "rivers").locator("button").first.click()
    page.wait_for_function("!location.search.includes('where_topic')")
    settle(page)
    assert f"{len(audit.rank('sae:3'))} rows" in words(page)


def test_words_are_looked_for_where_one_says_and_marked_in_list_and_row(page, address, audit):
    place = "prompt"
    rows = audit.rank("sae:3", where=RowFilter(text="what", text_in="prompt"))
    opened(page, address, "&find=what")
    page.get_by_role("combobox", name="Words are").click()
    page.get_by_role("option", name="In the prompt").click()
    page.wait_for_url("**in=In+the+prompt**")
    settle(page)
    page.keyboard.press("Escape")
    assert page.get_by_role("button", name="“what” in the prompt", exact=True).is_visible()
    assert words(page).count(f"{len(rows)} of") == 1
    lines = page.get_by_role("listbox", name="Rows of this page").get_by_role("option")
    assert lines.first.locator(".found").inner_text().lower() == "what"
    assert lines.first.locator(".phrase").inner_text().startswith(f"{place}: ")
    # Where a row is being drawn anew its marks are of the text before, until the next frame: looked at in one go.
    page.wait_for_function("""() => {
        const found = [...(CSS.highlights.get('found') ?? [])]
        const part = (range) => range.startContainer.parentElement?.closest('.turn')?.dataset.part
        return found.length && found.every(r => r.toString().toLowerCase() === 'what' && part(r) === 'prompt')
    }""")


def test_a_phrase_says_where_it_stands():
    row = {"prompt": "Where is\nthe Bank?", "response": "x" * 60 + " by the river " + "y" * 200}
    found = phrase_found(row, ["river", "bank"])
    assert found is not None and (found["where"], found["hit"]) == ("response", "river")
    assert found["before"].startswith("…") and len(found["before"]) == 17 and len(found["after"]) == 110
    assert phrase_found(row, ["bank"]) == {"where": "prompt", "before": "Where is the ", "hit": "Bank", "after": "?"}
    assert phrase_found(row, ["bank"], "response") is None
    assert phrase_found({"prompt": "", "response": "İ river"}, ["river"]) is None, "places would be others"


@pytest.mark.parametrize(
    ("text", "bounds"),
    [("1..2.5", (1.0, 2.5)), ("-inf..3", (float("-inf"), 3.0)), ("nan..1", None), ("1", None), (None, None)],
)
def test_a_range_in_the_url_is_two_numbers_or_nothing(text, bounds):
    assert span(text) == bounds
