"""A client of any OpenAI-compatible endpoint: what may be sent there, how often it is asked, how its words are read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import httpx

from concept_audit.addresses import is_this_machine
from concept_audit.errors import AuditError, first_line

RETRIES = 4
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0
"""Seconds before the first retry, doubled for each one after it; and before any, whatever the endpoint asks for."""
TRANSIENT = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)


@dataclass(frozen=True)
class Endpoint:
    """Where a language model is, and how it is asked.

    Attributes:
        url: of the interface, such as ``http://localhost:8000/v1``.
        model: the name that the endpoint knows it by.
        timeout: seconds to wait for one reply.
        key_variable: environment variable with the endpoint's key; none is sent if it is not set. A key goes
            over https or to this machine, and not where a reply redirects to.
        url_option, model_option: what people typed the two as, for errors.
        before_sending: called before each request, repeated ones too; what it raises keeps the request from going out.
    """

    url: str
    model: str
    timeout: float = 60.0
    key_variable: str = "OPENAI_API_KEY"
    url_option: str = "--url"
    model_option: str = "--model"
    before_sending: Callable[[], None] | None = None

    def ask(self, question: str, longest: int) -> str:
        """What the model replies to one message, at temperature 0.

        Args:
            longest: tokens of the reply.

        Raises:
            AuditError: the endpoint cannot be reached, refuses, or gives no text.
        """
        return self.reply([{"role": "user", "content": question}], longest)[0]

    def reply(self, messages: Sequence[Mapping[str, str]], longest: int) -> tuple[str, bool]:
        """What the model replies to a conversation, at temperature 0, and whether the reply came to its own end.

        Args:
            messages: turns with role and content.
            longest: tokens of the reply.

        Raises:
            AuditError: as `ask`.
        """
        reply = self._post({"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": longest})
        try:
            choice = reply["choices"][0]
            content = choice["message"]["content"]
            return "" if content is None else str(content), choice.get("finish_reason") != "length"
        except (KeyError, IndexError, TypeError):
            raise AuditError(
                f"{self.url_option} {self.url}: the reply has no choices[0].message.content; is this an "
                "OpenAI-compatible endpoint?"
            ) from None

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

    def _send(self, address: str, body: dict) -> httpx.Response:
        if self.before_sending:
            self.before_sending()
        return self._client.post(address, json=body)

    def _post(self, body: dict) -> dict:
        if not self.url.startswith(("http://", "https://")):
            raise AuditError(f"{self.url_option} {self.url}: must begin with http:// or https://")
        safe = self.url.startswith("https://") or is_this_machine(self.url)
        if not safe and os.environ.get(self.key_variable, "").strip():
            raise AuditError(
                f"{self.url_option} {self.url}: the key in {self.key_variable} would be sent unencrypted to another "
                f"machine; use https://, or unset {self.key_variable} if none is needed there"
            )
        address = f"{self.url.rstrip('/')}/chat/completions"
        try:
            reply = with_retries(lambda: self._send(address, body))
            if not reply.is_success:
                reason = printable(reply.text[:300]) or reply.reason_phrase
                raise AuditError(
                    f"{address}: answered {reply.status_code} ({reason}); check {self.url_option}, {self.model_option} "
                    f"and the key in {self.key_variable}"
                )
            return reply.json()
        except httpx.TimeoutException as error:
            raise AuditError(
                f"{address}: no reply within {self.timeout:g} seconds; check that it runs, or take a smaller one"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, ImportError) as error:  # a proxy may need a package
            raise AuditError(
                f"{address}: cannot be used ({first_line(error)}); check {self.url_option}, and that it runs"
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


def printable(text: str) -> str:
    """Text of a stranger on one line, without control characters, which a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()
