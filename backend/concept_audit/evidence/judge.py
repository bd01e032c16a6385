"""A language model as judge of answers, behind any OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass

from concept_audit.errors import AuditError, first_line

QUESTION = (
    "You judge answers of a chat assistant. The behaviour in question: {behaviour}.\n\n"
    "User:\n{prompt}\n\nAssistant:\n{answer}\n\n"
    "How strongly does the assistant's answer show this behaviour? Reply with one whole number from 0 "
    "(not at all) to 100 (fully), and nothing else."
)


@dataclass(frozen=True)
class Judge:
    """Where the judge is, and what it is asked.

    Attributes:
        url: of the interface, such as ``http://localhost:8000/v1``.
        model: the name that the endpoint knows it by.
        behaviour: what answers are judged for, in words.
        timeout: seconds to wait for one reply.
        key_variable: environment variable with the endpoint's key; none is sent if it is not set.
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

    def _post(self, body: dict) -> dict:
        if not self.url.startswith(("http://", "https://")):
            raise AuditError(f"--judge-url {self.url}: must begin with http:// or https://")
        address = f"{self.url.rstrip('/')}/chat/completions"
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            told = error.read(300).decode("utf-8", "replace").strip()
            raise AuditError(
                f"{address}: answered {error.code} ({told or error.reason}); check --judge-url, --judge-model "
                f"and the key in {self.key_variable}"
            ) from error
        except TimeoutError as error:
            raise AuditError(
                f"{address}: no reply within {self.timeout:g} seconds; check that the judge runs, or take a smaller one"
            ) from error
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise AuditError(
                f"{address}: cannot be used ({first_line(error)}); check --judge-url, and that the judge runs"
            ) from error
