"""Copies of what people did: ``backup``, ``restore``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from concept_audit.cli.flags import AUDIT, option, switch
from concept_audit.cli.opening import CACHE, DEFAULT_CACHE, existing
from concept_audit.cli.serving import confirmed


@dataclass(frozen=True, kw_only=True)
class Backup:
    """copy what people did in an audit into one file: labels, probes, flags, notes, views, evidence, the log"""

    audit: AUDIT
    out: Annotated[
        Path | None, Positional, option("the file (None: one of its own in the audit's folder, under backups/)", "FILE")
    ] = None
    cache: CACHE = DEFAULT_CACHE

    def run(self) -> None:
        root = existing(self.audit, self.cache)
        from concept_audit.store.backup import back_up
        from concept_audit.store.layout import Layout

        print(back_up(Layout(root), self.out))


@dataclass(frozen=True, kw_only=True)
class Restore:
    """put a copy that `backup` made in the place of what people did since; what is there now is copied first"""

    audit: AUDIT
    file: Annotated[Path, Positional, arg(metavar="FILE", help="a copy that `backup` made, or the audit's own")]
    yes: Annotated[bool, switch("do not ask")] = False
    cache: CACHE = DEFAULT_CACHE

    def run(self) -> None:
        root = existing(self.audit, self.cache)
        from concept_audit.store.backup import check_backup, restore
        from concept_audit.store.layout import Layout

        check_backup(self.file)
        confirmed(f"replace the labels, probes and flags of {root} by those in {self.file}", self.yes)
        before = restore(Layout(root), self.file)
        if before is not None:
            print(f"what was there is kept in {before}")
