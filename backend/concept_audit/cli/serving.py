"""Looking at audits: ``serve``, ``info``, ``list``, ``delete``, ``sql``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from concept_audit.cli.flags import ANY_AUDIT, form, option, switch
from concept_audit.cli.forms import listed
from concept_audit.cli.opening import CACHE, DEFAULT_CACHE, DEVICE, JSON, TRUST, Opening, existing, print_json
from concept_audit.errors import AuditError, StoreError
from concept_audit.progress import Progress
from concept_audit.store.listing import audit_names


@dataclass(frozen=True, kw_only=True)
class Server:
    """How the dashboard is served."""

    port: Annotated[int | None, option("port of the dashboard (None: 8501, or the next free one)", "N")] = None
    address: Annotated[
        str, arg(help="address to listen on: this machine only, unless told otherwise; the dashboard has no password")
    ] = "127.0.0.1"
    no_browser: Annotated[bool, switch("print the address instead of opening a browser")] = False
    read_only: Annotated[bool, switch("show what is there: nothing is changed, computed or written")] = False
    device: DEVICE = None
    trust_remote_code: TRUST = False
    allow: Annotated[
        tuple[str, ...] | None,
        form(listed, "ADDRESS|DOMAIN[,...]", ",".join),
        option(
            "who may log in, where logging in is set up: addresses and domains of e-mail, or * for everybody "
            "whom the provider knows"
        ),
    ] = None

    def start(self, root: Path | None, cache: Path) -> int:
        """Serve until stopped; the exit status."""
        from concept_audit.serve import serve

        return serve(
            root,
            cache,
            self.address,
            self.port,
            self.no_browser,
            self.read_only,
            self.allow or (),
            self.device,
            self.trust_remote_code,
        )


@dataclass(frozen=True, kw_only=True)
class Serve:
    """open the dashboard in a browser"""

    audit: ANY_AUDIT = None
    server: Annotated[Server, OmitArgPrefixes] = Server()
    cache: CACHE = DEFAULT_CACHE

    def run(self) -> int:
        root = existing(self.audit, self.cache) if self.audit else None
        if root is None and not audit_names(self.cache):
            raise StoreError(f"{self.cache}: no audits there yet; make one with `concept-audit demo` or `build`")
        return self.server.start(root, self.cache)


@dataclass(frozen=True, kw_only=True)
class Info:
    """say what an audit holds; without AUDIT, list those in the cache"""

    audit: ANY_AUDIT = None
    cache: CACHE = DEFAULT_CACHE
    json: JSON = False
    skipped: Annotated[bool, switch("list the rows that the build left out, and why")] = False

    def run(self) -> None:
        if self.audit is None:
            List(cache=self.cache, json=self.json).run()
            return
        from concept_audit.audit.audit import Audit
        from concept_audit.cli import info

        root = existing(self.audit, self.cache)
        if now := info.building(root):
            if self.json:
                print_json({"audit": str(root), "building": now})
            else:
                print(f"{root}: being built. {now['stage']}: {now['state']}")
            return
        audit = Audit(root, Progress())
        if self.skipped:
            left_out = audit.rows.skipped()[["source", "source_row", "reason"]].to_dict("records")
            if self.json:
                print_json(left_out)
            else:
                print("\n".join(info.printable(row["reason"]) for row in left_out) or "no row was left out")
            return
        found = info.gather(audit)
        if self.json:
            print_json(found)
        else:
            print(info.words(found))


@dataclass(frozen=True, kw_only=True)
class List:
    """list the audits in the cache"""

    cache: CACHE = DEFAULT_CACHE
    json: JSON = False

    def run(self) -> None:
        from concept_audit.cli import info

        entries = [info.entry(self.cache / name) for name in audit_names(self.cache)]
        if self.json:
            print_json(entries)
        elif entries:
            print("\n".join(f"{e['audit']}: {e['state']}, {e['data']} with {e['model']}" for e in entries))
        else:
            print(f"{self.cache}: no audits yet; make one with `concept-audit demo` or `concept-audit build`")


@dataclass(frozen=True, kw_only=True)
class Delete(Opening):
    """delete an audit, with its labels, probes and flags; or one probe of it"""

    probe: Annotated[str | None, option("delete this probe and its labels, and nothing else", "NAME")] = None
    yes: Annotated[bool, switch("do not ask")] = False

    def run(self) -> None:
        root = existing(self.audit, self.cache)
        if self.probe:
            audit = self.open(Progress())
            if self.probe not in audit.labels.counts()["probe"].tolist():
                raise AuditError(f"probe {self.probe!r}: there is none of this name in {audit.name}")
            confirmed(f"delete the probe {self.probe!r} of {root} with its labels", self.yes)
            audit.probes.delete(self.probe)
            return
        confirmed(f"delete {root} with its labels, probes and flags", self.yes)
        from concept_audit.store.objects import objects_of
        from concept_audit.store.removal import remove_audit

        if (objects := objects_of(root)) is not None:
            print(f"concept-audit: what is in {objects.url} stays; your storage's own tool deletes it", file=sys.stderr)
        for path in remove_audit(root):
            print(f"concept-audit: {path} is not the audit's own and stays", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class Sql(Opening):
    """run one query on the views of an audit, which it cannot change"""

    query: Annotated[str, Positional, arg(metavar="QUERY", help='such as "SELECT * FROM scores WHERE rank <= 10"')]
    format: Annotated[Literal["table", "csv", "jsonl", "parquet"], arg(help="of the result")] = "table"
    out: Annotated[str | None, option("write to this file (None: standard output)", "FILE")] = None

    def run(self) -> None:
        found = self.open(Progress()).query(self.query)
        if self.format == "table":
            print(found.to_string(index=False, max_colwidth=60))
            return
        from concept_audit.data.write import write

        write(found, self.format, self.out)


def confirmed(what: str, yes: bool) -> None:
    """Go on only if the person at the terminal agrees, or has said so beforehand.

    Raises:
        AuditError: they do not, or there is nobody to ask.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise AuditError(f"{what}? Pass --yes to do it without being asked")
    if not agreed(f"{what[0].upper()}{what[1:]}?"):
        raise AuditError("nothing was changed")


def agreed(question: str) -> bool:
    """Whether there is a person at the terminal, who says yes."""
    return sys.stdin.isatty() and input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
