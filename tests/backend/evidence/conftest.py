"""A judge behind a local server, which says what a test wants."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from concept_audit.evidence import endpoint


class JudgeServer(HTTPServer):
    """An OpenAI-compatible endpoint.

    Attributes:
        reply: the judge's words, or a function that makes them of a request's body.
        statuses: of the next replies; the last one stays.
        headers: of every reply.
        asked: bodies of the requests so far, with their path and key.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.statuses, self.headers, self.asked = "70", [200], {}, []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
        statuses = self.server.statuses
        self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        said = self.server.reply(body) if callable(self.server.reply) else self.server.reply
        reply = {"choices": [{"message": {"content": said}}]}
        self.wfile.write(json.dumps(reply, ensure_ascii=False).encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(endpoint, "LONGEST_DELAY", 0.05)
    with JudgeServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
