"""A row with another response: its prompt stays token for token, and the loss sees the new answer alone."""

from __future__ import annotations

import numpy as np
import pytest

from concept_audit import AuditError, Message
from concept_audit.evidence.endpoint import Endpoint
from concept_audit.evidence.labelling import Budget, BudgetSpent
from concept_audit.evidence.rewriting import Answer, answered_turn, endpoint_answer, rewritten
from concept_audit.model.chat import ChatRenderer
from concept_audit.types import TOOLS
from tests.backend.model.test_tool_turns import HERMES
from tests.conftest import small_tokenizer

ASKED, OLD, NEW = Message("user", "Which river?"), Message("assistant", "The wide one."), "No river at all, plan."
END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def shown(tokenizer, row: tuple[np.ndarray, np.ndarray]) -> str:
    """The text of a row, what the loss sees in brackets."""
    text, before = "", False
    for token, seen in zip(*map(np.ndarray.tolist, row), strict=True):
        text += ("[" if seen else "]") * (seen != before) + tokenizer.decode([token])
        before = seen
    return text + "]" * before


def made(tokenizer, turns, answer: Answer, max_tokens: int = 256) -> str:
    renderer = ChatRenderer(tokenizer, max_tokens)
    return shown(tokenizer, rewritten(renderer, turns, renderer.render(turns).response, answer))


def test_the_answer_stands_where_the_response_stood_and_its_end_is_learnt(tokenizer):
    renderer = ChatRenderer(tokenizer, 256)
    before = renderer.render((ASKED, OLD))
    ids, counts = rewritten(renderer, (ASKED, OLD), before.response, Answer(NEW))
    start = int(np.argmax(before.response))
    expected = [*before.input_ids[:start], *tokenizer(NEW)["input_ids"], tokenizer.eos_token_id]
    assert ids[: len(expected)].tolist() == expected, "the prompt token for token, the answer, and its end"
    assert counts.tolist() == [start <= place < len(expected) for place in range(len(ids))]
    assert f"[{NEW}{END}]" in shown(tokenizer, (ids, counts)) and "wide" not in shown(tokenizer, (ids, counts))


def test_an_answer_that_was_cut_does_not_teach_to_end_there(tokenizer):
    assert f"[{NEW}]{END}" in made(tokenizer, (ASKED, OLD), Answer(NEW, ended=False))


def test_of_several_turns_the_last_that_counts_is_answered_anew(tokenizer):
    again = (Message("user", "And the other?"), Message("assistant", "Narrow."))
    given = Message("assistant", "An example.", trained=False)
    text = made(tokenizer, (ASKED, OLD, *again), Answer(NEW))
    assert f"[{OLD.content}{END}]" in text and f"[{NEW}{END}]" in text and "Narrow" not in text
    text = made(tokenizer, (ASKED, given, *again, ASKED, given), Answer(NEW))
    assert text.count("An example.") == 1 and text.count("[") == 1 and f"[{NEW}{END}]" in text


def test_a_turn_that_a_cut_left_nothing_of_is_not_the_one(tokenizer):
    turns = (ASKED, OLD, ASKED, Message("assistant", "Narrow."))
    whole = ChatRenderer(tokenizer, 256).render(turns).response
    first = int(np.flatnonzero(np.diff(whole.astype(int)) == -1)[0]) + 3
    assert answered_turn(turns, whole) == 3 and answered_turn(turns, whole[:first]) == 1
    text = made(tokenizer, turns, Answer("Yes."), max_tokens=first)
    assert f"[Yes.{END}]" in text and text.count("[") == 1


@pytest.mark.parametrize("ends", ["in words", "in a call"])
def test_of_a_trajectory_the_last_turn_is_answered_in_words_and_calls_before_it_stay(ends):
    tokenizer = small_tokenizer(HERMES)
    call = Message("assistant", "", calls='[{"name": "look", "arguments": {"at": "river"}}]')
    turns = (ASKED, call, Message("tool", "wide"), OLD if ends == "in words" else call)
    text = made(tokenizer, turns, Answer(NEW))
    assert text.count("<tool_call>") == 1 and text.count("[") == 2 and f"[{NEW}{END}]" in text
    assert text.index("<tool_call>") < text.index("wide") < text.index(NEW)


def test_an_endpoint_is_sent_the_conversation_and_its_answer_is_read(judge, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge.reply = lambda body: NEW
    turns = (Message("system", "Be brief."), ASKED)
    assert endpoint_answer(Endpoint(judge.url, "kind"), turns, 128) == Answer(NEW)
    (asked,) = judge.asked
    assert asked["messages"] == [{"role": turn.role, "content": turn.content} for turn in turns]
    assert (asked["model"], asked["max_tokens"], asked["key"]) == ("kind", 128, "Bearer secret")


@pytest.mark.parametrize("finish, ended", [("length", False), ("stop", True), (None, True)])
def test_an_endpoint_tells_whether_its_answer_was_cut(monkeypatch, finish, ended):
    endpoint = Endpoint("http://localhost:1/v1", "kind")
    reply = {"choices": [{"message": {"content": NEW + "\ud800"}, "finish_reason": finish}]}
    monkeypatch.setattr(Endpoint, "_post", lambda self, body: reply)
    assert endpoint_answer(endpoint, (ASKED,), 128) == Answer(NEW + "?", ended)


def test_what_an_endpoint_cannot_answer_is_refused_in_words(judge, monkeypatch):
    endpoint = Endpoint(judge.url, "kind", url_option="--rewrite-url", model_option="--rewrite-model")
    called = Message("assistant", "", calls='[{"name": "look", "arguments": {}}]')
    with pytest.raises(AuditError, match=r"--rewrite-url .* turns with tools \(assistant, tool, tools\)"):
        endpoint_answer(endpoint, (Message(TOOLS, "[]"), ASKED, called, Message("tool", "wide")), 128)
    assert not judge.asked
    judge.reply = " \n"
    with pytest.raises(AuditError, match="--rewrite-model kind: replied nothing to 'Which river"):
        endpoint_answer(endpoint, (ASKED,), 128)
    monkeypatch.setattr(Endpoint, "_post", lambda self, body: {"choices": [{"message": {"content": None}}]})
    with pytest.raises(AuditError, match="replied nothing"):
        endpoint_answer(endpoint, (ASKED,), 128)


def test_a_budget_names_the_option_that_it_was_typed_as():
    budget = Budget(1, "--rewrite-budget")
    budget.spend()
    with pytest.raises(BudgetSpent, match="--rewrite-budget 1: so many requests"):
        budget.spend()
