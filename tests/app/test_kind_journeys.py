"""Journeys through data that are no plain chats: a preference pair and an agent's trajectory, in a real browser.

With ``CONCEPT_AUDIT_SCREENSHOTS=DIR`` a picture of each is kept, light and dark.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from urllib.parse import urlencode

import pytest

from concept_audit import Audit, BuildOptions, LabelledExample, Message, ModelOptions, build
from tests.app.browser import cards, coloured_tokens, dashboard, row_of, settle
from tests.app.test_journeys import keep, press
from tests.conftest import sentence, write_jsonl

PAIR = ("chosen", "rejected")
EVIL = "<img src=x onerror='window.harmed = true'>"


def labelled(made: random.Random) -> list[LabelledExample]:
    said = [("yes " if n % 2 else "no ") + sentence(made, 5) for n in range(16)]
    return [LabelledExample((Message("user", "q"), Message("assistant", s)), n % 2) for n, s in enumerate(said)]


def keep_both(page, name: str) -> None:
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(300)
        keep(page, f"{name}-{scheme}")


@pytest.fixture(scope="module")
def cache(tmp_path_factory, model_directory):
    made, place = random.Random(1), tmp_path_factory.mktemp("kinds")
    call = {"function": {"name": "walk", "arguments": {"to": f"river {EVIL}"}}}
    pairs = [
        {
            "prompt": sentence(made, 4),
            "chosen": f"yes {sentence(made, 5)} {EVIL}",
            "rejected": f"no {sentence(made, 5)}",
        }
        for _ in range(12)
    ]
    agents = [
        {
            "messages": [
                {"role": "user", "content": sentence(made, 4)},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": f"green {sentence(made, 3)}"},
                {"role": "assistant", "content": f"yes {sentence(made, 5)}"},
            ]
        }
        for _ in range(12)
    ]
    model = ModelOptions(str(model_directory), device="cpu")
    for name, rows in (("pairs", pairs), ("agents", agents)):
        data = write_jsonl(place / f"{name}.jsonl", rows)
        audit = Audit(build(BuildOptions(str(data), place / "cache" / name, model, layers=(2,), sae="none")))
        audit.train_probe("agrees", labelled(made))
    return place / "cache"


def in_their_own_columns(page, url: str, rows: str, to: Path) -> list[dict]:
    """The rows that the Export page gives away as JSON lines."""
    page.goto(f"{url}/export?" + urlencode({"rows": rows, "columns": "The input's own columns", "format": "JSONL"}))
    settle(page)
    with page.expect_download() as download:
        page.get_by_role("button", name=re.compile("^Download [0-9]+ row")).click()
    download.value.save_as(to)
    return [json.loads(line) for line in to.read_text().splitlines()]


def first_row(page, url: str) -> int:
    """The row that the Audit page shows first, once its tokens have their colours."""
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(f"{url}/audit?concept=probe:agrees")
    settle(page)
    coloured_tokens(page).first.wait_for()
    return row_of(cards(page).first)


def test_a_pair_is_seen_side_by_side_flagged_to_be_swapped_and_exported_so(page, cache, tmp_path):
    with dashboard(cache, "pairs") as url:
        number = first_row(page, url)
        card = page.locator(f".st-key-row-{number}")
        sides = [card.locator("strong", has_text=re.compile(f"^{name}$")).bounding_box() for name in PAIR]
        assert sides[0]["y"] == sides[1]["y"] and sides[0]["x"] < sides[1]["x"], "beside each other"
        assert card.locator(".hm b").count() > 0, "words that the other side has not"
        press(page, "w")
        card.get_by_text("flagged: swap").wait_for()
        keep_both(page, "pair")
        page.get_by_text("1 swap").first.wait_for()  # the server has it
        assert not page.evaluate("window.harmed")
        after = in_their_own_columns(page, url, "Cleaned data", tmp_path / "cleaned.jsonl")
        page.get_by_text("Exchange sides").wait_for()
        keep_both(page, "pair-export")
    before = [json.loads(line) for line in (cache.parent / "pairs.jsonl").read_text().splitlines()]
    assert [place for place, row in enumerate(after) if row != before[place]] == [number]
    chosen, rejected = (before[number][side] for side in PAIR)
    assert after[number] == before[number] | {"chosen": rejected, "rejected": chosen}


def test_a_trajectory_is_read_with_its_calls_flagged_and_left_out_of_the_cleaned_data(page, cache, tmp_path):
    with dashboard(cache, "agents") as url:
        number = first_row(page, url)
        card = page.locator(f".st-key-row-{number}")
        call = card.locator("summary", has_text="calls walk")
        assert card.locator(".hm", has_text="to").is_visible(), "a call with colours is open"
        call.click()
        assert not card.locator(".hm", has_text="to").is_visible(), "and can be folded"
        call.click()
        assert "green" in card.inner_text() and "tool" in card.inner_text()
        press(page, "x")
        card.get_by_text("flagged: remove").wait_for()
        keep_both(page, "trajectory")
        page.get_by_text("1 remove").first.wait_for()  # the server has it
        assert not page.evaluate("window.harmed")
        after = in_their_own_columns(page, url, "Cleaned data", tmp_path / "cleaned.jsonl")
    before = [json.loads(line) for line in (cache.parent / "agents.jsonl").read_text().splitlines()]
    assert after == before[:number] + before[number + 1 :]
