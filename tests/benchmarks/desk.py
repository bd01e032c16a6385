"""How fast the Audit page answers keys in Chromium, whether every act lands on its row, and how many bytes a page is.

    python tests/benchmarks/desk.py cache/demo --keys 100 --between 100
    python tests/benchmarks/desk.py cache/demo --busy 2

The audit is written to: give it a copy. A key counts as drawn at the frame after the browser has heard of it;
``bytes`` are what the server sends for a page, before the socket compresses it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, sync_playwright

from concept_audit import Audit
from tests.app.browser import CARDS, FLAGS, chromium, dashboard, row_of, settle

CYCLE = "xjvjcj"
"""Keys that are pressed in turn: three flags, each on a row of its own."""
OF_KEY = {"x": "remove", "v": "review", "c": "keep"}
LISTEN = """
  window.drawn = []
  window.addEventListener('keydown', (event) => {
    requestAnimationFrame(() => setTimeout(() => window.drawn.push(performance.now() - event.timeStamp)))
  }, true)
"""
"""Put into the page before its own scripts, which let no key through to those that come later."""
SIZES = (10, 25, 50)
PATIENCE = 300.0
"""Seconds for the last act to be kept."""
BUSY = "while True: sum(range(10**6))"
LOWER = 10
"""By how much less urgent the busy processes are, as an index build is."""


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Processes of a lower priority that compute all the time."""
    started = [subprocess.Popen(["nice", "-n", str(LOWER), sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def pages(page: Page, url: str, query: str) -> dict[str, dict[str, float]]:
    """Seconds until a page has its colours, and bytes received, for each number of rows a page."""
    received: list[int] = []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda data: received.append(len(data))))
    found = {}
    for size in SIZES:
        page.goto("about:blank")
        received.clear()
        begun = time.perf_counter()
        page.goto(f"{url}/audit?{query}&size={size}")
        page.locator(CARDS).nth(size - 1).wait_for(state="attached")
        listed = time.perf_counter() - begun
        settle(page)
        found[str(size)] = {
            "listed": round(listed, 2),
            "whole": round(time.perf_counter() - begun, 2),
            "bytes": sum(received),
        }
    return found


def keys(page: Page, url: str, query: str, root: Path, count: int, between: float) -> dict[str, object]:
    """Press keys at a pace; what was drawn when, and which of the flags are on the rows that they were meant for."""
    page.goto(f"{url}/audit?{query}&size=50")
    page.locator(CARDS).first.wait_for()
    settle(page)
    rows = [row_of(card) for card in page.locator(CARDS).all()]
    page.locator("h1").first.click()
    page.evaluate("window.drawn = []")
    wanted, here = {}, 0
    for number in range(count):
        key = CYCLE[number % len(CYCLE)]
        if key == "j":
            here = min(here + 1, len(rows) - 1)
        else:
            # Once more on the same row takes the flag off again.
            before = wanted.get(rows[here])
            wanted[rows[here]] = None if before == OF_KEY[key] else OF_KEY[key]
        page.keyboard.press(key)
        page.wait_for_timeout(between)
    drawn = page.evaluate("window.drawn")
    wanted = {row: flag for row, flag in wanted.items() if flag}
    deadline = time.monotonic() + PATIENCE
    while (found := _flags(root, rows)) != wanted and time.monotonic() < deadline:
        time.sleep(0.5)
    return {
        "keys": count,
        "flags": len(wanted),
        "on the right rows": sum(found.get(row) == flag for row, flag in wanted.items()),
        "on others": len(set(found) - set(wanted)),
        "drawn": len(drawn),
        "median ms": round(float(np.median(drawn)), 1),
        "p95 ms": round(float(np.percentile(drawn, 95)), 1),
        "longest ms": round(max(drawn), 1),
    }


def _flags(root: Path, rows: list[int]) -> dict[int, str]:
    frame = Audit(root).rows.list()
    chosen = frame[frame["example_id"].isin(rows) & frame["flag"].notna()]
    return dict(zip(map(int, chosen["example_id"]), chosen["flag"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audit", type=Path)
    parser.add_argument("--query", default="", help="of the page, such as concept=sae:3")
    parser.add_argument("--keys", type=int, default=100)
    parser.add_argument("--between", type=float, default=100, help="milliseconds")
    parser.add_argument("--busy", type=int, default=0, help="processes of a lower priority beside it")
    asked = parser.parse_args()
    with dashboard(asked.audit.parent, asked.audit.name) as url, sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(PATIENCE * 1000)
        page.add_init_script(LISTEN)
        with busy(asked.busy):
            print(json.dumps({"pages": pages(page, url, asked.query)}, indent=2), flush=True)
            found = keys(page, url, asked.query, asked.audit, asked.keys, asked.between)
            print(json.dumps({"keys": found}, indent=2), flush=True)
        browser.close()


if __name__ == "__main__":
    main()
