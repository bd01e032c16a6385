"""Storage for tests: a local S3 server, which the environment names."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from concept_audit.store import remote as remote_module
from concept_audit.store.remote import Remote
from tests.backend.store.objects import BUCKET, serving


@pytest.fixture
def storage(monkeypatch):
    monkeypatch.setattr(remote_module, "PATIENCE", timedelta(seconds=20))
    monkeypatch.setattr(remote_module, "QUIET", timedelta(seconds=1))
    remote_module._opened.cache_clear()
    with serving() as (storage, address):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        yield storage
    remote_module._opened.cache_clear()


@pytest.fixture
def impatient(storage, monkeypatch) -> Callable[[bool], None]:
    """Has storage be given up at once; and, with False, be waited for again, however slow the machine is."""

    def change(soon: bool = True) -> None:
        monkeypatch.setattr(remote_module, "PATIENCE", timedelta(seconds=0.2 if soon else 20))
        remote_module._opened.cache_clear()

    return change


@pytest.fixture
def remote(storage) -> Remote:
    return Remote(f"s3://{BUCKET}/some/where")
