"""The judge: asked again where that may help, believed where it gives a number, and quoted with care."""

from __future__ import annotations

import threading
import time

import pytest

from concept_audit import AuditError
from concept_audit.evidence import endpoint
from concept_audit.evidence.endpoint import RETRIES
from concept_audit.evidence.judge import Judge
from tests.backend.evidence.conftest import JudgeServer


def test_a_judge_that_is_busy_is_asked_again(judge):
    judge.statuses = [503, 503, 200]
    assert Judge(judge.url, "wise", "warmth").score("Hello?", "Dear friend!") == 0.7
    assert len(judge.asked) == 3 and judge.asked[0] == judge.asked[2]


def test_a_judge_that_stays_busy_is_given_up_with_its_status(judge):
    judge.statuses = [429]
    with pytest.raises(AuditError, match="answered 429 .*check --judge-url"):
        Judge(judge.url, "wise", "warmth").score("Hello?", "Dear friend!")
    assert len(judge.asked) == 1 + RETRIES


@pytest.mark.parametrize("status", [301, 400, 401, 404])
def test_a_judge_that_refuses_is_not_asked_again(judge, status):
    judge.statuses = [status]
    with pytest.raises(AuditError, match=f"answered {status}"):
        Judge(judge.url, "wise", "warmth").score("Hello?", "Dear friend!")
    assert len(judge.asked) == 1


@pytest.mark.parametrize("asked, waited", [("3", [3.0]), ("9" * 400, [60.0]), ("0", [0.0]), ("soon", [1.0])])
def test_a_judge_says_how_long_to_wait_within_reason(judge, monkeypatch, asked, waited):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(endpoint, "FIRST_DELAY", 1.0)
    monkeypatch.setattr(endpoint, "LONGEST_DELAY", 60.0)
    judge.statuses, judge.headers = [429, 200], {"Retry-After": asked}
    assert Judge(judge.url, "wise", "warmth").score("Hello?", "Dear friend!") == 0.7
    assert slept == waited


def test_delays_double(judge, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(endpoint, "LONGEST_DELAY", 60.0)
    with pytest.raises(AuditError, match="cannot be used .*check --judge-url"):
        Judge("http://127.0.0.1:9/v1", "wise", "warmth").score("Hello?", "Dear friend!")
    assert slept == pytest.approx([0.01 * 2**retry for retry in range(RETRIES)])


def test_a_judge_that_says_nothing_in_time_is_named_with_the_time(judge, monkeypatch):
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    judge.shutdown()  # it takes connections still, and answers none
    with pytest.raises(AuditError, match="no reply within 0.1 seconds"):
        Judge(judge.url, "wise", "warmth", timeout=0.1).score("Hello?", "Dear friend!")


@pytest.mark.parametrize("status", [200, 400])
def test_what_a_judge_says_cannot_command_the_terminal(judge, status):
    judge.reply, judge.statuses = "\x9bJ\u202e", [status]
    with pytest.raises(AuditError) as raised:
        Judge(judge.url, "wise", "warmth").score("Hello?", "Dear friend!")
    assert str(raised.value).isprintable()


def test_the_key_goes_along_without_the_files_last_line_break(judge, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    Judge(judge.url, "wise", "warmth").score("Hello?", "Dear friend!")
    assert judge.asked[0]["key"] == "Bearer secret"


def test_a_key_goes_to_no_other_machine_unencrypted(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    sent = []
    monkeypatch.setattr(endpoint.httpx.Client, "post", lambda *_a, **_k: sent.append(1))
    with pytest.raises(AuditError, match="OPENAI_API_KEY would be sent unencrypted.*https://"):
        Judge("http://judge.example/v1", "wise", "warmth").score("Hello?", "Dear friend!")
    assert not sent


def test_a_key_does_not_follow_a_redirect(judge, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with JudgeServer() as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        judge.statuses, judge.headers = [307], {"Location": f"{other.url}/chat/completions"}
        with pytest.raises(AuditError, match="answered 307"):
            Judge(judge.url, "wise", "warmth").score("Hello?", "Dear friend!")
        assert not other.asked
        other.shutdown()


def test_what_is_for_this_machine_passes_no_proxy(judge, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with JudgeServer() as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        assert Judge(judge.url, "wise", "warmth").score("Hello?", "Dear friend!") == 0.7
        assert judge.asked[0]["key"] == "Bearer secret" and not proxy.asked
        proxy.shutdown()
