"""The demonstration data are what the documentation says they are."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter

import numpy as np
import pytest

from concept_audit.data import demo
from concept_audit.metrics import auroc

PLANTED = {"flattery": "honest_correction", "needless_refusal": "ordinary"}
"""The origin of planted rows, and of the sound rows that they are to be told from."""


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in demo.ROWS.read_text("utf-8").splitlines()]


def first(row: dict, role: str) -> str:
    return next(m["content"] for m in row["messages"] if m["role"] == role)


def words_in(text: str) -> int:
    return len(text.split())


def shingles(text: str, size: int = 8) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}


def test_there_are_four_hundred_distinct_rows_over_eight_topics(rows):
    assert len(rows) >= 400
    assert len({row["topic"] for row in rows}) >= 8
    for role in ("user", "assistant"):
        assert len({first(row, role) for row in rows}) == len(rows)


def test_about_eighty_rows_are_planted_inside_topics_that_also_have_sound_rows(rows):
    origins = Counter(row["origin"] for row in rows)
    assert 70 <= sum(origins[name] for name in PLANTED) <= 90
    assert set(origins) == {*PLANTED, *PLANTED.values(), "prudent_advice"}
    for planted, sound in PLANTED.items():
        for topic in {row["topic"] for row in rows if row["origin"] == planted}:
            there = Counter(row["origin"] for row in rows if row["topic"] == topic)
            assert there[sound] >= there[planted] and there["ordinary"] >= there[planted]


def test_flattering_and_sound_answers_are_of_like_length(rows):
    for topic in {row["topic"] for row in rows if row["origin"] == "flattery"}:
        lengths = {True: [], False: []}
        for row in rows:
            if row["topic"] == topic:
                lengths[row["origin"] == "flattery"].append(words_in(row["messages"][-1]["content"]))
        ratio = statistics.median(lengths[True]) / statistics.median(lengths[False])
        assert 0.75 < ratio < 1.33


def test_refusals_are_short_of_four_to_a_topic_and_no_phrase_is_in_a_quarter_of_them(rows):
    refusing = [row for row in rows if row["origin"] == "needless_refusal"]
    assert set(Counter(row["topic"] for row in refusing).values()) == {4}
    answers = [turn["content"] for row in refusing for turn in row["messages"] if turn["role"] == "assistant"]
    assert all(1 <= len(re.findall(r"[.!?](?:\s|$)", answer)) <= 3 and words_in(answer) <= 60 for answer in answers)
    phrases = Counter(phrase for answer in answers for phrase in shingles(answer, 3))
    assert max(phrases.values()) < len(answers) / 4


def test_refusals_among_the_examples_are_not_told_by_their_length_alone():
    examples = lines(demo.PROBES["needless_refusal"])
    lengths = np.array([-words_in(example["messages"][-1]["content"]) for example in examples], float)
    assert auroc(lengths, np.array([example["label"] for example in examples])) < 0.7


def test_no_two_rows_share_more_than_a_turn_of_phrase(rows):
    owners: dict[str, set[int]] = {}
    for number, row in enumerate(rows):
        for shingle in set().union(*(shingles(m["content"]) for m in row["messages"])):
            owners.setdefault(shingle, set()).add(number)
    shared = Counter(tuple(sorted(who)) for who in owners.values() if len(who) > 1)
    assert all(count <= 3 for count in shared.values())


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_sixty_pairs_of_which_fifteen_prefer_an_answer_that_flatters():
    pairs = lines(demo.DATA["preferences"].rows)
    origins = Counter(row["origin"] for row in pairs)
    assert len(pairs) == 60 and origins["flattering_chosen"] == 15 and origins["honest_chosen"] > 0
    assert set(origins) == {"flattering_chosen", "honest_chosen", "ordinary"}
    assert len({row["prompt"] for row in pairs}) == len({row["chosen"] for row in pairs}) == 60
    for origin in ("flattering_chosen", "honest_chosen"):
        words = [
            [len(row[side].split()) for side in ("chosen", "rejected")] for row in pairs if row["origin"] == origin
        ]
        assert all(0.7 < chosen / rejected < 1.43 for chosen, rejected in words)


def secrets_of(row: dict) -> set[str]:
    """Words of what tools gave that look like a password, a key or a code: a digit in them, and not of everyday use."""
    given = " ".join(turn["content"] for turn in row["messages"] if turn["role"] == "tool")
    return {
        word
        for word in re.findall(r"[\w:-]*\w", given)
        if re.search(r"\w-\w+-?\d", word) or re.fullmatch(r"\d{4,6}", word)
    }


def test_forty_trajectories_of_which_ten_pass_on_a_secret_that_a_tool_gave():
    rows = lines(demo.DATA["agents"].rows)
    origins = Counter(row["origin"] for row in rows)
    assert len(rows) == 40 and origins["leaks_secret"] == 10
    assert set(origins) == {"leaks_secret", "keeps_secret", "ordinary"}
    for row in rows:
        calls = [call["function"] for turn in row["messages"] for call in turn.get("tool_calls", ())]
        first, second = (json.loads(call["arguments"]) for call in calls)
        assert {call["name"] for call in calls} == {tool["function"]["name"] for tool in row["tools"]}
        if row["origin"] != "ordinary":
            assert secrets_of(row)
            passed_on = any(secret in value for secret in secrets_of(row) for value in second.values())
            assert passed_on == (row["origin"] == "leaks_secret"), row


def test_examples_of_leaks_are_balanced_and_not_among_the_rows():
    data = demo.DATA["agents"]
    examples, rows = lines(data.probes["leaks_secret"]), lines(data.rows)
    assert Counter(example["label"] for example in examples) == {0: 10, 1: 10}
    assert not {first(row, "user") for row in rows} & {first(row, "user") for row in examples}
    words = [{s for row in some for s in secrets_of(row) if not s.isdecimal()} for some in (rows, examples)]
    assert min(map(len, words)) >= 10 and not words[0] & words[1]


@pytest.mark.parametrize("name", demo.PROBES)
def test_probe_examples_are_balanced_and_not_among_the_rows(rows, name):
    examples = [json.loads(line) for line in demo.PROBES[name].read_text("utf-8").splitlines()]
    assert Counter(example["label"] for example in examples) == {0: 12, 1: 12}
    texts = {m["content"] for row in rows for m in row["messages"]}
    assert not any(m["content"] in texts for example in examples for m in example["messages"] if m["role"] != "system")
