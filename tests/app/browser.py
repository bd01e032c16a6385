"""A dashboard in a real browser: starting both, and the few things that every journey does."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import concept_audit_app

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
PATIENCE = 60_000
CARDS = '[class*="st-key-row-"]'


def chromium() -> str | None:
    """Chromium or Chrome of the system; None leaves the choice to Playwright."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if (found := shutil.which(name))), None)


@contextmanager
def dashboard(cache: Path, audit: str, read_only: bool = False) -> Iterator[str]:
    """A running dashboard; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", str(Path(concept_audit_app.__file__).parent / "main.py")]
    command += ["--server.headless", "true", "--server.port", str(port), "--server.address", "127.0.0.1"]
    command += ["--server.enableWebsocketCompression", "true"]
    environment = {
        **os.environ,
        "CONCEPT_AUDIT_CACHE": str(cache),
        "CONCEPT_AUDIT_NAME": audit,
        "CONCEPT_AUDIT_READ_ONLY": "1" if read_only else "0",
    }
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(url, server)
        yield url
    finally:
        # Streamlit waits for scripts that are running; nobody waits for their result.
        server.kill()
        server.wait(timeout=20)


def _wait_until_healthy(url: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, "the dashboard ended by itself"
        try:
            if urllib.request.urlopen(f"{url}/_stcore/health", timeout=1).status == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the dashboard did not start within a minute")


def settle(page) -> None:
    """Wait until the page's script has run to its end, and see that nothing failed."""
    page.wait_for_selector("h1")
    page.wait_for_timeout(400)
    page.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"]')
    page.wait_for_timeout(200)
    failed = page.locator('[data-testid="stException"]')
    assert failed.count() == 0, failed.first.inner_text()


def cards(page):
    """The rows on the page."""
    return page.locator(CARDS)


def row_of(card) -> int:
    """The number of a card's row."""
    return int(re.search(r"st-key-row-(\d+)", card.get_attribute("class"))[1])


def coloured_tokens(page):
    """Tokens with a colour."""
    return page.locator(".hm i")


def words(page) -> str:
    """Everything that the page says."""
    return page.locator('[data-testid="stMain"]').inner_text()


def type_probe(page, name: str):
    """Type the name of a probe that is to be made; gives the box."""
    box = page.get_by_role("combobox", name="Probe")
    box.fill(name)
    box.press("Enter")
    return box
