"""Addresses: which hosts are this machine, and which people are let in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit


def is_this_machine(url: str) -> bool:
    """Whether a URL's host is this machine by its name or number: localhost, 127.0.0.0/8 or ::1."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def is_allowed(claims: Mapping[str, Any], allowed: Sequence[str]) -> bool:
    """Whether somebody who has logged in is let in.

    Args:
        claims: what the OpenID Connect provider says of them; ``email`` counts, unless ``email_verified`` denies it.
        allowed: addresses (``ann@example.org``), domains (``example.org`` or ``@example.org``; not those below it),
            or ``*`` for everybody whom the provider knows.
    """
    if "*" in allowed:
        return True
    address = str(claims.get("email") or "").strip().lower()
    name, _, domain = address.rpartition("@")
    if not name or not domain or claims.get("email_verified") in (False, "false"):
        return False
    wanted = {entry.strip().lower().removeprefix("@") for entry in allowed}
    return address in wanted or domain in wanted
