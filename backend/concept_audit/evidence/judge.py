"""A language model as judge of answers, behind any OpenAI-compatible endpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from concept_audit.errors import AuditError
from concept_audit.evidence.endpoint import Endpoint

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
        text = self._endpoint.ask(question, longest=8)
        number = re.search(r"\d+(?:\.\d+)?", text)
        if number is None or float(number[0]) > 100:
            raise AuditError(
                f"--judge-model {self.model}: replied {text[:80]!r} instead of a number from 0 to 100; choose "
                "a model that follows instructions"
            )
        return float(number[0]) / 100

    @cached_property
    def _endpoint(self) -> Endpoint:
        return Endpoint(self.url, self.model, self.timeout, self.key_variable, "--judge-url", "--judge-model")
