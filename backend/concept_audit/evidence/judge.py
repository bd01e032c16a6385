"""A language model as judge of answers, behind any OpenAI-compatible endpoint."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import httpx

from concept_audit.addresses import is_this_machine
from concept_audit.errors import AuditError, first_line

QUESTION = (
    "You judge answers of a chat assistant. The behaviour in question: {behaviour}.\n\n"
    "User:\n{prompt}\n\nAssistant:\n{answer}\n\n"
    "How strongly does the assistant's answer show this behaviour? Reply with one whole number from 0 "
    "(not at all) to 100 (fully), and nothing else."
)
RETRIES = 4
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0
"""Seconds before the first retry, doubled for each one after it; and before any, whatever the endpoint asks for."""
TRANSIENT = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)


@dataclass(frozen=True)
class Judge:
    """Where the judge is, and what it is asked.

    Attributes:
        url: of the interface, such as ``http://localhost:8000/v1``.
        model: the name that the endpoint knows it by.
        behaviour: what answers are judged for, in words.
        timeout: seconds to wait for one reply.
        key_variable: environment variable with the endpoint's key; none is sent if it is not set. A key goes
            over https or to this machine, and not where a reply redirects to.
    """

    url: str
    model: str
    behaviour: str
    timeout: float = 60.0
    key_variable: str = "OPENAI_API_KEY"

    def score(self, prompt: str, answer: str) -> float:
        """How strongly an answer shows the behaviour: 0 to 1.

        Raises:
            AuditError: the endpoint cannot be reached, refuses, or gives no number.
        """
        question = QUESTION.format(behaviour=self.behaviour, prompt=prompt, answer=answer)
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 8,
        }
        reply = self._post(body)
        try:
            text = str(reply["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError):
            raise AuditError(
                f"--judge-url {self.url}: the reply has no choices[0].message.content; is this an "
                "OpenAI-compatible endpoint?"
            ) from None
        number = re.search(r"\d+(?:\.\d+)?", text)
        if number is None or float(number[0]) > 100:
            raise AuditError(
                f"--judge-model {self.model}: replied {text[:80]!r} instead of a number from 0 to 100; choose "
                "a model that follows instructions"
            )
        return float(number[0]) / 100

    @cached_property
    def _client(self) -> httpx.Client:
        key = os.environ.get(self.key_variable, "").strip()
        # What is for this machine goes past any proxy, which would read it.
        return httpx.Client(
            timeout=self.timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            follow_redirects=False,
            trust_env=not is_this_machine(self.url),
        )

    def _post(self, body: dict) -> dict:
        if not self.url.startswith(("http://", "https://")):
            raise AuditError(f"--judge-url {self.url}: must begin with http:// or https://")
        safe = self.url.startswith("https://") or is_this_machine(self.url)
        if not safe and os.environ.get(self.key_variable, "").strip():
            raise AuditError(
                f"--judge-url {self.url}: the key in {self.key_variable} would be sent unencrypted to another "
                f"machine; use https://, or unset {self.key_variable} if that judge needs none"
            )
        address = f"{self.url.rstrip('/')}/chat/completions"
        try:
            reply = with_retries(lambda: self._client.post(address, json=body))
            if not reply.is_success:
                reason = _printable(reply.text[:300]) or reply.reason_phrase
                raise AuditError(
                    f"{address}: answered {reply.status_code} ({reason}); check --judge-url, --judge-model "
                    f"and the key in {self.key_variable}"
                )
            return reply.json()
        except httpx.TimeoutException as error:
            raise AuditError(
                f"{address}: no reply within {self.timeout:g} seconds; check that the judge runs, or take a smaller one"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, ImportError) as error:  # a proxy may need a package
            raise AuditError(
                f"{address}: cannot be used ({first_line(error)}); check --judge-url, and that the judge runs"
            ) from error


def with_retries(send: Callable[[], httpx.Response]) -> httpx.Response:
    """What an endpoint answers, asked again while it is busy (429), failing (5xx) or out of reach.

    Retry k waits for `FIRST_DELAY` × 2ᵏ seconds, or for as many as the reply's Retry-After header says, and never
    for more than `LONGEST_DELAY`.

    Returns:
        the first reply of another kind, or the last one.

    Raises:
        httpx.TransportError: no connection or no reply at the last of `RETRIES` retries either, or no valid request.
    """
    for retry in range(RETRIES):
        delay = FIRST_DELAY * 2**retry
        try:
            reply = send()
        except TRANSIENT:
            pass
        else:
            if reply.status_code != 429 and reply.status_code < 500:
                return reply
            # The header may also be a date: then the usual delay does.
            asked = reply.headers.get("Retry-After", "")
            delay = float(asked) if asked.isdecimal() else delay
        time.sleep(min(delay, LONGEST_DELAY))
    return send()


def _printable(text: str) -> str:
    """Text of a stranger on one line, without control characters, which a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()
