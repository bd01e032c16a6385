"""Journeys through data that are no plain chats: a preference pair and an agent's trajectory, in a real browser.

With ``CONCEPT_AUDIT_SCREENSHOTS=DIR`` a picture of each is kept, light and dark.
"""

from __future__ import annotations

import json
import random

import pytest

from concept_audit import Audit, BuildOptions, LabelledExample, Message, ModelOptions, build
from tests.app.browser import coloured_tokens, dashboard, settle, words
from tests.app.test_journeys import keep, press
from tests.conftest import sentence, write_jsonl

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


def test_a_pair_is_seen_side_by_side_flagged_to_be_swapped_and_exported_so(page, cache, tmp_path):
    with dashboard(cache, "pairs") as url:
        page.goto(f"{url}/audit?concept=probe:agrees")
        settle(page)
        shown = words(page)
        assert "chosen" in shown and "rejected" in shown and coloured_tokens(page).count() > 0
        press(page, "w")
        page.get_by_text("flagged: swap").first.wait_for()
        keep_both(page, "pair")
        assert not page.evaluate("window.harmed")
        page.goto(f"{url}/export?rows=none&columns=own&format=jsonl")
        settle(page)
        assert page.get_by_text("Exchange sides").first.is_visible()
        keep_both(page, "pair-export")
        with page.expect_download() as download:
            page.get_by_role("button", name="Download 12 rows").click()
        download.value.save_as(tmp_path / "cleaned.jsonl")
    before = [json.loads(line) for line in (cache.parent / "pairs.jsonl").read_text().splitlines()]
    after = [json.loads(line) for line in (tmp_path / "cleaned.jsonl").read_text().splitlines()]
    changed = [n for n, row in enumerate(after) if row != before[n]]
    assert changed == Audit(cache / "pairs").rows.list()["flag"].eq("swap").to_numpy().nonzero()[0].tolist()
    (number,) = changed
    assert after[number] == before[number] | {
        "chosen": before[number]["rejected"],
        "rejected": before[number]["chosen"],
    }


def test_a_trajectory_is_seen_with_its_calls_and_what_they_gave(page, cache):
    with dashboard(cache, "agents") as url:
        page.goto(f"{url}/audit?concept=probe:agrees")
        settle(page)
        shown = words(page)
        assert "calls walk" in shown and "green" in shown and "tool" in shown
        assert coloured_tokens(page).count() > 0 and not page.evaluate("window.harmed")
        press(page, "v")
        page.get_by_text("flagged: review").first.wait_for()
        keep_both(page, "trajectory")
    assert Audit(cache / "agents").rows.list()["flag"].eq("review").sum() == 1
