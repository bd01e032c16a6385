"""From the click on a concept's influence to its first row, and to exact scores of the first 50, in Chromium.

    python tests/benchmarks/clicks.py cache/demo --features 3 [--look 10]

For an audit with a gradient index; the audit is written to: give it a copy. Of the features that have no influence
ranking yet the ones that fire in most rows are taken; ``first row`` ends when the list shows another first row or score,
``coloured`` when the page's script has come to its end, and ``exact`` when the page itself says that the first 50 rows
(or more) are exact. ``--look`` is for how long a feature is looked at by its usual ranking before the click: meanwhile
the dashboard ranks by its influence, once the model is loaded.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from itertools import islice
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from concept_audit import Audit
from concept_audit_app.components.methods import NAMES
from tests.app.browser import FLAGS, chromium, dashboard, settle

PATIENCE = 600.0
"""Seconds for any one wait."""
TOP = 50
TOLD = re.compile(r"among them the first ([\d,]+)|All [\d,]+ scores are exact")


def unranked(audit: Audit, count: int) -> list[str]:
    """Features without an influence ranking, those that fire in most rows first."""
    features = audit.concepts.features().sort_values("n_examples", ascending=False, kind="stable")
    concepts = (f"sae:{number}" for number in features["feature_id"])
    return list(islice((each for each in concepts if not audit.rankings.has(each, "concept_influence")), count))


def exact_first(page: Page) -> int:
    """How many of the first rows the page says are exact, where it is asked about its fidelity."""
    told = page.locator('[data-testid="stPopoverBody"]')
    if not told.count():
        page.get_by_role("button", name="Fidelity").click()
    found = TOLD.search(told.first.inner_text())
    return 0 if found is None else TOP if found[1] is None else int(found[1].replace(",", ""))


def measure(page: Page, url: str, concept: str, look: float, patience: float) -> dict[str, float | str | None]:
    """Seconds after the click until each stage of the ranking is on the page; None: not within the patience."""
    page.goto(f"{url}/audit?concept={concept}")
    settle(page)
    row = page.get_by_role("listbox", name="Rows of this page").get_by_role("option").first
    before = row.inner_text()
    page.wait_for_timeout(look * 1000)
    page.get_by_role("combobox", name="Method").click()
    option = page.get_by_role("option", name=NAMES["concept_influence"])
    option.wait_for()
    begun = time.perf_counter()
    option.click()
    expect(row).not_to_have_text(before, use_inner_text=True, timeout=PATIENCE * 1000)
    first = time.perf_counter() - begun
    settle(page)
    coloured = time.perf_counter() - begun
    while (known := exact_first(page)) < TOP and time.perf_counter() - begun < patience:
        page.wait_for_timeout(200)
    exact = round(time.perf_counter() - begun, 1) if known >= TOP else None
    return {"concept": concept, "first row": round(first, 2), "coloured": round(coloured, 2), "exact": exact}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audit", type=Path)
    parser.add_argument("--features", type=int, default=3)
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds to wait for exact scores")
    parser.add_argument("--look", type=float, default=0.0, help="seconds")
    asked = parser.parse_args()
    concepts = unranked(Audit(asked.audit), asked.features)
    with dashboard(asked.audit.parent, asked.audit.name) as url, sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(PATIENCE * 1000)
        for concept in concepts:
            print(json.dumps(measure(page, url, concept, asked.look, asked.patience)), flush=True)
        browser.close()


if __name__ == "__main__":
    main()
