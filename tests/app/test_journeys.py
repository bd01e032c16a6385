"""What people come to do, from beginning to end, in a real browser.

By default on a small audit that the tests make. With ``CONCEPT_AUDIT_JOURNEYS=CACHE/AUDIT`` the same
journeys go through a copy of that audit, the demo for instance; with ``CONCEPT_AUDIT_SCREENSHOTS=DIR``
a picture of each is kept.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import pandas as pd
import pytest

from concept_audit import Audit
from tests.app.browser import cards, coloured_tokens, dashboard, row_of, settle, type_probe, words

FLAG_TOP = 20
ACTS, BETWEEN = 60, 70
"""Keys pressed one after another, and milliseconds between two."""
SCORES = re.compile("^Scores ")  # the chip of a filter by score


@pytest.fixture
def place(cache_copy, tmp_path) -> Path:
    """The audit that is walked through, which may be written to."""
    given = os.environ.get("CONCEPT_AUDIT_JOURNEYS")
    if not given:
        return cache_copy / "small"
    copied = Path(shutil.copytree(given, tmp_path / "journeys" / Path(given).name))
    (copied / "workspace.duckdb.wal").unlink(missing_ok=True)
    return copied


@pytest.fixture
def url(place):
    with dashboard(place.parent, place.name) as address:
        yield address


@pytest.fixture
def concept(place) -> str:
    """A concept with scores that differ."""
    audit = Audit(place)
    probes = audit.probes.list()
    return f"probe:{probes[0].name}" if probes else "sae:3"


def keep(page, name: str) -> None:
    if folder := os.environ.get("CONCEPT_AUDIT_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png")


def press(page, key: str) -> None:
    page.locator("h1").first.click()  # no field has the focus
    page.keyboard.press(key)
    settle(page)


def passing(page) -> int:
    """How many rows the desk says that pass the filter."""
    return int(re.search(r"([\d,]+) (?:of [\d,]+ )?rows?", words(page))[1].replace(",", ""))


def drag_across_histogram(page, start: float, end: float) -> None:
    plot = page.locator(".st-key-histogram .nsewdrag").first
    plot.wait_for()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] * start, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * end, box["y"] + box["height"] / 2 + 5, steps=8)
    page.mouse.up()
    page.get_by_role("button", name=SCORES).wait_for()
    page.wait_for_url("**scores=**")
    settle(page)


def test_a_feature_is_found_by_a_sentence_of_ones_own(page, url):
    page.goto(f"{url}/concepts")
    settle(page)
    page.get_by_text("By your own text").click()
    page.get_by_label("Your text").fill("She keeps the money in a safe bank by the river.")
    page.keyboard.press("Control+Enter")
    page.get_by_text("coloured by feature").wait_for()
    settle(page)
    assert coloured_tokens(page).count() > 0
    first = re.search(r"feature=(\d+)", page.url)[1]
    assert f"coloured by feature {first}:" in words(page)
    press(page, "j")
    second = re.search(r"feature=(\d+)", page.url)[1]
    assert second != first
    assert "Strongest quarter" in words(page)
    # First or folded away, by whether they say anything of the texts.
    assert re.search("Makes more likely|Tokens that it makes more and less likely", words(page))
    assert cards(page).count() > 0
    keep(page, "own-text")
    page.go_back()
    settle(page)
    assert f"feature={first}" in page.url


def test_twelve_rows_are_labelled_by_keys_alone_and_ranked_by_the_new_probe(page, url, place):
    page.goto(f"{url}/probe_lab")
    settle(page)
    type_probe(page, "by keys")
    settle(page)
    assert page.get_by_role("button", name="Shows it").inner_text().split()[-1] == "Y"
    seen = []

    def label(key: str) -> None:
        seen.append(re.search(r"Row ([\d,]+), ", words(page))[1])
        press(page, key)

    for i in range(6):
        label("y" if i % 2 else "n")
    press(page, "u")
    assert "2 show it · 3 do not" in words(page)
    seen.pop()
    press(page, "s")
    for i in range(7):
        label("n" if i % 2 else "y")
    assert "6 show it · 6 do not" in words(page)
    assert len(set(seen)) == 12, "the queue repeats no row"
    page.get_by_text("With these labels, held out: AUROC").wait_for()
    keep(page, "probe-lab")
    press(page, "t")
    page.get_by_text("Held-out AUROC").wait_for()
    page.get_by_role("link", name="See the ranking").click()
    page.wait_for_url("**/audit?**")
    settle(page)
    assert cards(page).first.inner_text().startswith("#1 ")
    assert len(Audit(place).labels.list("by keys")) == 12


def test_labels_by_keys_as_fast_as_anyone_types(page, url, place):
    page.goto(f"{url}/probe_lab")
    settle(page)
    name = type_probe(page, "in haste")
    page.get_by_role("button", name="Shows it").wait_for()
    assert name.input_value() == "in haste"
    keys = "nnnnnnuysyyyyyy"
    for key in keys:
        page.keyboard.press(key)
        page.wait_for_timeout(BETWEEN)
    page.keyboard.press("t")
    page.get_by_text("Held-out AUROC").wait_for()
    assert name.input_value() == "in haste"
    labels = [example.label for example in Audit(place).labels.list("in haste")]
    assert (labels.count(0), labels.count(1)) == (5, 7)
    assert page.get_by_text("7 show it · 5 do not").first.is_visible()


def test_brush_flag_undo_flag_and_export(page, url, concept, tmp_path):
    page.goto(f"{url}/audit?concept={concept}")
    settle(page)
    coloured_tokens(page).first.wait_for()
    everything = passing(page)
    drag_across_histogram(page, 0.1, 0.9)
    kept = passing(page)
    assert FLAG_TOP < kept < everything and "scores=" in page.url
    keep(page, "brush")

    def flag_top() -> None:
        page.get_by_role("button", name="Act on many").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_text("The first", exact=True).click()
        dialog.get_by_text(f"{FLAG_TOP} rows").wait_for()
        assert dialog.get_by_text(re.compile(r"^#\d")).count() == 5
        dialog.get_by_label("Note").fill("brushed")
        dialog.get_by_role("button", name=f"Flag to remove: {FLAG_TOP}").click()
        page.get_by_text("texts flagged to remove").wait_for()
        dialog.wait_for(state="detached")
        settle(page)

    flag_top()
    assert "flagged: remove" in cards(page).first.inner_text()
    press(page, "u")
    page.get_by_text("Undone for").wait_for()
    assert "flagged: remove" not in cards(page).first.inner_text()
    flag_top()
    first = row_of(cards(page).first)
    page.get_by_role("button", name="Log").click()
    page.get_by_text("undone", exact=True).first.wait_for()
    page.keyboard.press("Escape")
    page.goto(f"{url}/export")
    settle(page)
    with page.expect_download() as download:
        page.get_by_role("button", name=f"Download {FLAG_TOP} rows").click()
    download.value.save_as(tmp_path / "flagged.csv")
    with page.expect_download() as download:
        page.get_by_role("button", name="Manifest").click()
    download.value.save_as(tmp_path / "manifest.json")
    table = pd.read_csv(tmp_path / "flagged.csv")
    assert len(table) == FLAG_TOP and set(table["flag"]) == {"remove"} and set(table["note"]) == {"brushed"}
    assert first in table["example_id"].tolist()
    told = json.loads((tmp_path / "manifest.json").read_text())
    assert told["rows"] == FLAG_TOP and told["flags"][0]["rows"] == FLAG_TOP and told["fingerprints"]["data"]


def test_two_methods_are_compared_and_the_row_of_largest_disagreement_opened(page, url, concept):
    page.goto(f"{url}/compare?concept={concept}&concept2={concept}&method2=bm25")
    settle(page)
    page.get_by_text("Rank correlation").wait_for()
    page.get_by_text("First 10 in common").wait_for()
    card = cards(page).first
    assert "BM25 #" in card.inner_text() and "words in common with the queries #" in card.inner_text()
    number = row_of(card)
    keep(page, "compare")
    card.get_by_role("link", name=f"Open row {number:,}").click()
    page.wait_for_url("**/audit?**")
    settle(page)
    assert cards(page).count() == 1 and row_of(cards(page).first) == number
    page.get_by_role("button", name=f"Row {number:,} alone").click()
    settle(page)
    assert cards(page).count() == 10


def test_a_view_is_a_url_and_may_have_a_name(page, browser, url, concept):
    page.goto(f"{url}/audit?concept={concept}&size=25&find=a&page=2")
    settle(page)
    drag_across_histogram(page, 0.05, 0.95)
    shared, first = page.url, row_of(cards(page).first)
    page.get_by_role("button", name="Named views").click()
    page.get_by_label("Name of this view").fill("second look")
    page.get_by_role("button", name="Keep this view").click()
    settle(page)
    context = browser.new_context()
    other = context.new_page()
    other.goto(shared)
    settle(other)
    assert row_of(cards(other).first) == first and cards(other).count() == cards(page).count()
    other.get_by_role("button", name=SCORES).wait_for()
    other.goto(url)
    settle(other)
    other.get_by_role("button", name="Named views").click()
    other.get_by_role("link", name="second look").click()
    other.wait_for_url("**/audit?**")
    settle(other)
    assert row_of(cards(other).first) == first
    keep(other, "shared-view")
    context.close()


def test_two_people_flag_at_once_and_see_each_other(page, browser, url, concept, place):
    context = browser.new_context()
    other = context.new_page()
    for each, name in ((page, "Ada"), (other, "Grace")):
        each.goto(f"{url}/audit?concept={concept}")
        settle(each)
        each.get_by_role("button", name="You").click()
        each.get_by_label("Your name", exact=True).fill(name)
        each.keyboard.press("Enter")
        settle(each)
        each.keyboard.press("Escape")
    press(other, "j")
    mine, theirs = row_of(cards(page).nth(0)), row_of(cards(other).nth(1))
    cards(page).nth(0).get_by_role("button", name="Remove").click()
    cards(other).nth(1).get_by_role("button", name="Review").click()
    for each in (page, other):
        each.locator(f'[class*="-{mine}"] >> text="flagged: remove"').wait_for(state="attached", timeout=20_000)
        each.locator(f'[class*="-{theirs}"] >> text="flagged: review"').wait_for(state="attached", timeout=20_000)
    log = Audit(place).flags.log()
    assert set(log["made_by"]) == {"Ada", "Grace"}
    context.close()


def test_rows_are_walked_and_flagged_by_keys(page, url, concept):
    page.goto(f"{url}/audit?concept={concept}")
    settle(page)
    press(page, "j")
    press(page, "x")
    assert "flagged: remove" in cards(page).nth(1).inner_text()
    assert cards(page).nth(0).get_attribute("data-flag") == ""
    press(page, "v")
    assert "flagged: review" in cards(page).nth(1).inner_text()
    press(page, "u")
    assert "flagged: remove" in cards(page).nth(1).inner_text()
    cards(page).nth(1).get_by_role("button", name="Note").click()
    note = page.get_by_label("is flagged")
    note.fill("flatters")
    note.press("Enter")
    settle(page)
    page.keyboard.press("Escape")
    assert "flagged: remove (flatters)" in cards(page).nth(1).inner_text()


def test_keys_as_fast_as_anyone_types_reach_the_right_rows(page, url, concept, place):
    page.goto(f"{url}/audit?concept={concept}")
    settle(page)
    rows = [row_of(card) for card in cards(page).all()]
    at, wanted = 0, dict.fromkeys(rows, "")
    chance = random.Random(7)
    page.locator("h1").first.click()
    for _ in range(ACTS):
        key = chance.choice("jjkxv")
        page.keyboard.press(key)
        at = min(max(at + {"j": 1, "k": -1}.get(key, 0), 0), len(rows) - 1)
        if name := {"x": "remove", "v": "review"}.get(key):
            wanted[rows[at]] = "" if wanted[rows[at]] == name else name
        page.wait_for_timeout(BETWEEN)
    shown = [card.get_attribute("data-flag") for card in cards(page).all()]
    assert shown == list(wanted.values()), "shown before the server has done it"
    page.locator(".flag-words").first.wait_for(state="attached")
    listed = Audit(place).rows.list()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = listed.set_index("example_id")["flag"].fillna("")
        if {row: found[row] for row in rows} == wanted:
            break
        page.wait_for_timeout(300)
        listed = Audit(place).rows.list()
    assert {row: found[row] for row in rows} == wanted
    settle(page)
    assert [card.get_attribute("data-flag") for card in cards(page).all()] == list(wanted.values())


def test_a_note_is_written_by_keys_and_its_letters_are_no_acts(page, url, concept, place):
    page.goto(f"{url}/audit?concept={concept}")
    settle(page)
    first = row_of(cards(page).first)
    page.locator("h1").first.click()
    for key in "xn":
        page.keyboard.press(key)
    page.get_by_label(f"Why row {first:,} is flagged").wait_for()
    page.wait_for_function("document.activeElement?.getAttribute('aria-label')?.startsWith('Why row')")
    page.keyboard.type("unjustified, j x v", delay=30)
    page.keyboard.press("Enter")
    settle(page)
    page.keyboard.press("Escape")
    assert "flagged: remove (unjustified, j x v)" in cards(page).first.inner_text()
    assert len(Audit(place).flags.log()) == 2
    page.locator("h1").first.click()
    page.keyboard.press("j")
    page.keyboard.press("n")
    page.get_by_text("A note goes with a flag").wait_for()


def test_read_only_offers_no_writing(page, place, concept):
    writing = re.compile("Remove|Review|Act on many|Undo|Train|Shows it|Rename|Delete|Import|Label|Keep this")
    with dashboard(place.parent, place.name, read_only=True) as url:
        for path in (f"audit?concept={concept}", "probe_lab", "concepts", f"compare?concept={concept}", "export"):
            page.goto(f"{url}/{path}")
            settle(page)
            assert page.get_by_role("button", name=writing).count() == 0, path
        page.goto(f"{url}/audit?concept={concept}")
        settle(page)
        assert cards(page).count() == 10


def test_dark_mode(browser, url, concept):
    context = browser.new_context(color_scheme="dark", viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    page.goto(f"{url}/audit?concept={concept}")
    settle(page)
    coloured_tokens(page).first.wait_for()
    background = page.locator('[data-testid="stApp"]').evaluate("e => getComputedStyle(e).backgroundColor")
    text = cards(page).first.evaluate("e => getComputedStyle(e).color")
    dark, light = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in (background, text))
    assert dark < 60 and light > 180
    keep(page, "dark")
    context.close()
