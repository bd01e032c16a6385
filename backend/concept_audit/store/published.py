"""An audit that lies in object storage, and the directory of the machine that works on it.

Databases, manifest and SAE are files of that directory, for DuckDB writes to disks alone.
After each commit they are put where the shards are (`publish`), and taken from there where
another machine has been at work meanwhile (`opened`). The manifest goes last, and only in
the place of the one that was seen here last, so that two machines cannot build one audit.
What people did, the workspace, is put by nothing but `push`, and never written over.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from concept_audit.errors import StoreError
from concept_audit.files import digest, remove_leftovers_of
from concept_audit.store.layout import Layout
from concept_audit.store.locks import held
from concept_audit.store.manifest import Manifest, read_manifest
from concept_audit.store.objects import Objects, is_plain, objects_of, seen_manifest, write_marker
from concept_audit.store.remote import Remote, is_address
from concept_audit.store.removal import is_own

SAE_FILE = re.compile(r"sae/[\w-]+\.(json|safetensors)")


def directory_of(url: str, cache: Path) -> Path:
    """Where an audit in object storage keeps its files on this machine: ``cache/s3-bucket-audits-mine-1a2b3c4d``."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", url).strip("-")[:60].rstrip("-")
    return cache / f"{plain}-{hashlib.blake2b(url.encode(), digest_size=4).hexdigest()}"


def opened(url: str, cache: Path) -> Layout:
    """The audit at an address, as it is there now; what storage has is fetched but for shards and the workspace.

    Where this directory is the one that worked on it last, nothing is fetched but descriptions of shards. A
    workspace is taken from storage only where there is none here.

    Raises:
        StoreError: storage does not answer; something else lies there.
    """
    remote = Remote(url)
    layout = Layout(directory_of(url, cache))
    there = remote.sizes()
    if layout.manifest.name not in there and (found := [name for name in there if not is_own(layout, name)]):
        raise StoreError(
            f"{url}: not empty and not an audit (no manifest.json, but {found[0]}); choose another address"
        )
    if objects_of(layout.root) is None:
        if layout.manifest.exists():
            raise StoreError(f"{layout.root}: an audit of this machine alone lies there; choose another --cache")
        write_marker(layout.root, url, None)
    free = False
    try:
        with held(layout.lock, "{who} is at work on it"):
            free = True
            _refresh(layout, remote, there)
    except StoreError:
        # Where a build of this machine is at work, what is here is what is newest.
        if free:
            raise
    return layout


def found(audit: str | Path, cache: Path) -> Path:
    """The directory of an audit that is given by its own, or by its address in object storage.

    Raises:
        StoreError: no audit lies at the address, or as `opened`.
    """
    if not is_address(str(audit)):
        return Path(audit)
    layout = opened(str(audit).rstrip("/"), cache)
    if not layout.manifest.exists():
        raise StoreError(f"{audit}: no audit there; make one with `concept-audit build --out {audit}`")
    return layout.root


def publish(layout: Layout, manifest: Manifest) -> None:
    """Put what a commit of the driver has changed: SAE and store where they are finished, then the manifest.

    Does nothing for an audit of this machine alone.

    Raises:
        StoreError: storage does not answer, or another machine has put another manifest meanwhile.
    """
    objects = objects_of(layout.root)
    if objects is None:
        return
    remote, seen = objects.remote, seen_manifest(layout.root)
    if remote.tag(layout.manifest.name) != seen:
        raise StoreError(
            f"{objects.url}: its manifest is not the one that was seen here last, so another machine works on this audit; "
            "wait for it, and run the same command again"
        )
    recorded = recorded_files(manifest)
    present = _present(layout, remote, seen)
    for name, told in recorded.items():
        if present.get(name) != told and (layout.root / name).exists():
            remote.put(name, layout.root / name)
    tag = remote.replace(layout.manifest.name, layout.manifest, seen)
    write_marker(layout.root, objects.url, tag)
    remote.put(layout.manifest_copy.name, layout.manifest_copy)


def withdraw(layout: Layout) -> None:
    """Delete from storage what a build has put that came to nothing; nothing where another machine has put a manifest."""
    objects = objects_of(layout.root)
    if objects is not None and objects.remote.tag(layout.manifest.name) == seen_manifest(layout.root):
        objects.remote.delete(name for name in objects.remote.sizes() if is_own(layout, name))


def recorded_files(manifest: Manifest | None) -> dict[str, str]:
    """Files whose digests the manifest tells, by their names below the audit."""
    if manifest is None:
        return {}
    sae = {f"sae/{name}": told for name, told in manifest.report("sae").get("files", {}).items()}
    return sae | manifest.report("store").get("files", {})


def _present(layout: Layout, remote: Remote, seen: str | None) -> dict[str, str]:
    """Recorded files that storage has, as its manifest tells."""
    if seen is None:
        return {}
    there = remote.sizes()
    return {name: told for name, told in recorded_files(_fetched_manifest(layout, remote)).items() if name in there}


def _fetched_manifest(layout: Layout, remote: Remote) -> Manifest:
    path = layout.root / "manifest.there.partial"
    try:
        remote.get(layout.manifest.name, path)
        return read_manifest(path)
    finally:
        path.unlink(missing_ok=True)


def _refresh(layout: Layout, remote: Remote, there: dict[str, int]) -> None:
    """Take what is newer in storage than here."""
    remove_leftovers_of(layout.manifest)
    for name in there:
        if name.startswith("shards/") and name.endswith(".json") and is_own(layout, name) and is_plain(name):
            remote.get(name, layout.root / name)
    if layout.workspace.name in there and not layout.workspace.exists():
        remote.get(layout.workspace.name, layout.workspace)
    tag = remote.tag(layout.manifest.name)
    if tag is None:
        write_marker(layout.root, remote.url, None)  # somebody may have deleted what was there
        return
    if tag == seen_manifest(layout.root) and layout.manifest.exists():
        return
    told = recorded_files(_fetched_manifest(layout, remote))
    for name in there:
        path = layout.root / name
        wanted = name == layout.audit.name or SAE_FILE.fullmatch(name)
        if wanted and not (path.exists() and name in told and digest(path) == told[name]):
            remote.get(name, path)
    for end in (layout.manifest_copy, layout.manifest):
        remote.get(end.name, end)
    write_marker(layout.root, remote.url, tag)


def refuse_kept_elsewhere(layout: Layout, remote: Remote) -> None:
    """Raise StoreError where shards would be missing from what is moved, since this directory keeps but some."""
    objects: Objects | None = objects_of(layout.root)
    if objects is not None and objects.url != remote.url:
        raise StoreError(
            f"{layout.root}: its shards lie in {objects.url}; `concept-audit pull {objects.url} DIR` fetches all of them, "
            "and DIR can be put elsewhere"
        )
