"""Audits in object storage: ``push``, ``pull``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from concept_audit.cli.flags import AUDIT, option
from concept_audit.cli.opening import CACHE, DEFAULT_CACHE, existing
from concept_audit.errors import AuditError
from concept_audit.progress import for_this_terminal

if TYPE_CHECKING:
    from concept_audit.store.remote import Remote
    from concept_audit.store.transfer import Moved

ADDRESS = Annotated[
    str, Positional, arg(metavar="ADDRESS", help="in object storage: s3://bucket/audit, gs://..., az://...")
]


@dataclass(frozen=True, kw_only=True)
class Push:
    """put an audit into object storage; what is there already is not put again"""

    audit: AUDIT
    address: ADDRESS
    cache: CACHE = DEFAULT_CACHE

    def run(self) -> None:
        root, remote = existing(self.audit, self.cache), _remote(self.address)
        from concept_audit.store.layout import Layout
        from concept_audit.store.transfer import push

        progress = for_this_terminal()
        progress.say(f"{remote.url}: {_words(push(Layout(root), remote, progress))}")


@dataclass(frozen=True, kw_only=True)
class Pull:
    """fetch an audit from object storage; what is here already is not fetched again"""

    address: ADDRESS
    out: Annotated[
        Path | None, Positional, option("the directory (None: named as the address ends, in the cache)", "DIR")
    ] = None
    cache: CACHE = DEFAULT_CACHE

    def run(self) -> None:
        remote = _remote(self.address)
        from concept_audit.store.layout import Layout
        from concept_audit.store.transfer import pull

        root = self.out or self.cache / remote.url.rstrip("/").rsplit("/", 1)[-1]
        progress = for_this_terminal()
        moved = pull(Layout(root), remote, progress)
        progress.say(f"{root}: {_words(moved)}")
        if moved.kept:
            progress.say(
                "What people did here stays: its labels, probes and flags are not those in storage. To have those, "
                "move workspace.duckdb away first"
            )


def _remote(address: str) -> Remote:
    from concept_audit.store.remote import Remote, is_address

    if not is_address(address):
        raise AuditError(f"{address}: no address of object storage; write s3://bucket/audit, gs://... or az://...")
    return Remote(address.rstrip("/"))


def _words(moved: Moved) -> str:
    return f"{moved.files:,} files moved ({moved.bytes / 2**20:,.1f} MiB), {moved.there:,} were there already"
