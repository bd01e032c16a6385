"""A local S3 server for tests, which can be told to misbehave."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

BUCKET = "audits"


class Storage:
    """What a test says to the server.

    Attributes:
        answer: of each request, by its method, path and number, what is wrong: ``busy`` (503), ``slow`` (no answer in
            time), ``cut`` (the connection ends when half of the body has come); None for nothing.
        asked: method and path of every request.
        slow_seconds: how long a slow answer takes.
    """

    def __init__(self, served: Callable[..., Any]):
        self._served = served
        self._guard = threading.Lock()
        self.answer: Callable[[str, str, int], str | None] = lambda method, path, number: None
        self.asked: list[tuple[str, str]] = []
        self.slow_seconds = 1.5

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._guard:
            self.asked.append((method, path))
            wrong = self.answer(method, path, len(self.asked))
        length = int(environ.get("CONTENT_LENGTH") or 0)
        if wrong is None:
            return self._served(environ, start)
        if wrong == "cut":
            environ["wsgi.input"].read(length // 2)
            raise ConnectionAbortedError("cut off")
        environ["wsgi.input"].read(length)
        if wrong == "slow":
            time.sleep(self.slow_seconds)
        start("503 Slow Down", [("Content-Type", "application/xml")])
        return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]


@contextmanager
def serving(host: str = "127.0.0.1", port: int = 0) -> Iterator[tuple[Storage, str]]:
    """The server in a thread, with an empty bucket, and its address; port 0 is any that is free."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, type: str, message: str, *args: Any) -> None:
            """Say nothing."""

    storage = Storage(DomainDispatcherApplication(create_backend_app))
    server = make_server(host, port, storage, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://{host}:{server.port}"
    try:
        urllib.request.urlopen(urllib.request.Request(f"{address}/moto-api/reset", method="POST")).close()
        urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT")).close()
        yield storage, address
    finally:
        server.shutdown()
        thread.join()
