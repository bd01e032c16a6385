"""Which hosts are this machine, and which people are let in."""

from __future__ import annotations

import pytest

from concept_audit.addresses import is_allowed, is_this_machine


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:8000/v1",
        "http://LOCALHOST/v1",
        "http://127.0.0.1/",
        "http://127.8.9.1:1",
        "http://[::1]:8000/v1",
    ],
)
def test_these_hosts_are_this_machine(url):
    assert is_this_machine(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/v1",
        "http://localhost.example.org/",
        "http://127.0.0.1.example.org/",
        "http://localhost@example.org/",
        "http://10.0.0.1/",
        "http://[::2]/",
        "http://[broken/",
        "",
    ],
)
def test_these_hosts_are_not(url):
    assert not is_this_machine(url)


@pytest.mark.parametrize(
    "email, let_in",
    [
        ("ann@example.org", True),
        ("ANN@Example.ORG", True),
        ("bob@example.org", False),
        ("anyone@example.com", True),
        ("anyone@mail.example.com", False),
        ("anyone@example.com.evil.test", False),
        ("example.com", False),
        ("@example.com", False),
        ("", False),
        (None, False),
    ],
)
def test_an_address_or_its_domain_is_on_the_list(email, let_in):
    assert is_allowed({"email": email}, ["Ann@example.org", "@example.com"]) is let_in


def test_an_address_that_the_provider_has_not_verified_does_not_count():
    assert not is_allowed({"email": "ann@example.org", "email_verified": False}, ["ann@example.org"])
    assert is_allowed({"email": "ann@example.org", "email_verified": True}, ["ann@example.org"])


def test_without_a_list_nobody_is_let_in_and_a_star_lets_in_everybody():
    assert not is_allowed({"email": "ann@example.org"}, [])
    assert is_allowed({"sub": "17"}, ["*"])
