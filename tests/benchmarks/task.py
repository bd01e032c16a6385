"""The counted task: flag the 20 rows that push most towards a probe, and take the rest away, in Chromium.

    python tests/benchmarks/task.py cache/demo --concept probe:flattery

It begins on the Overview and ends with the file on the disk. ``at once`` flags by one act on many, ``row by row`` by a
key for each row, as somebody does who reads them all. Every press of a key and of the mouse is counted as the browser
gets it; seconds are those that the machine needs, with no time to read. The audit is written to: give it a copy, of which
no row is flagged; what was flagged is taken back in between.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from playwright.sync_api import Page, sync_playwright

from concept_audit import Audit, RowFilter
from tests.app.browser import CARDS, FLAGS, chromium, dashboard, settle

WORST = 20
COUNT = """
  window.sent = JSON.parse(sessionStorage.getItem('sent') ?? '{"keys": 0, "clicks": 0}')
  const count = (kind) => { window.sent[kind]++; sessionStorage.setItem('sent', JSON.stringify(window.sent)) }
  window.addEventListener('keydown', () => count('keys'), true)
  window.addEventListener('mousedown', () => count('clicks'), true)
"""
"""Put into the page before its own scripts; a page that is loaded anew goes on counting."""


def at_once(page: Page) -> None:
    page.get_by_role("button", name="Act on many").click()
    page.get_by_role("dialog").get_by_role("button", name=f"Flag to remove: {WORST}").click()
    page.get_by_text(re.compile("texts flagged to remove")).wait_for()
    settle(page)


def row_by_row(page: Page) -> None:
    page.keyboard.press("a")  # the cursor goes on after a flag
    for number in range(WORST):
        size = page.locator(CARDS).count()
        if number and number % size == 0:
            page.keyboard.press("]")
            settle(page)
        page.keyboard.press("x")
    settle(page)


def measure(url: str, page: Page, root: Path, concept: str, flag: Callable[[Page], None]) -> dict[str, object]:
    """Do the task; what it took, and whether the right rows are in the file."""
    audit = Audit(root)
    worst = set(audit.rank(concept, top=WORST)["content_hash"])
    page.goto(url)
    settle(page)
    page.evaluate("sessionStorage.clear(); window.sent = {keys: 0, clicks: 0}")
    began = time.perf_counter()
    page.get_by_role("link", name="Look at them").click()
    page.locator(CARDS).first.wait_for()
    settle(page)
    assert f"concept={concept}".replace(":", "%3A") in page.url.replace(":", "%3A"), page.url
    flag(page)
    page.get_by_role("link", name="Export", exact=True).click()
    settle(page)
    page.get_by_role("radio", name="Cleaned data").click()
    settle(page)
    with page.expect_download() as download:
        page.get_by_role("button", name=re.compile(r"^Download [\d,]+ rows$")).click()
    seconds, sent = time.perf_counter() - began, page.evaluate("window.sent")
    rows = audit.rows.list()
    with tempfile.TemporaryDirectory() as place:
        download.value.save_as(path := Path(place) / "cleaned.csv")
        cleaned = set(pd.read_csv(path)["example_id"])
    right = cleaned == set(rows.loc[~rows["content_hash"].isin(worst), "example_id"])
    audit.flags.set_matching(RowFilter(flag="any"), None)
    return {**sent, "seconds": round(seconds, 1), "flagged": len(worst), "right": right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audit", type=Path)
    parser.add_argument("--concept", default="probe:flattery")
    asked = parser.parse_args()
    with dashboard(asked.audit.parent, asked.audit.name) as url, sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=chromium(), args=FLAGS)
        for way in (at_once, row_by_row):
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.add_init_script(COUNT)
            found = measure(url, page, asked.audit, asked.concept, way)
            print(json.dumps({"way": way.__name__.replace("_", " "), **found}), flush=True)
        browser.close()


if __name__ == "__main__":
    main()
