"""An audit between a directory and object storage: what is there already is not moved again.

The manifest goes last either way, so what was cut short is not taken for an audit, and
the same command goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from concept_audit.errors import StoreError
from concept_audit.files import digest, is_leftover, partial_name, remove
from concept_audit.progress import Progress
from concept_audit.store.backup import back_up
from concept_audit.store.database_files import log_of
from concept_audit.store.layout import Layout
from concept_audit.store.locks import all_held, held
from concept_audit.store.manifest import Manifest, read_manifest
from concept_audit.store.objects import MARKER, is_plain
from concept_audit.store.published import recorded_files, refuse_kept_elsewhere
from concept_audit.store.remote import Remote
from concept_audit.store.removal import is_own, own_files, strangers
from concept_audit.store.shard_store import TABLE, TENSORS, is_as_written

SHARD = {f".{TABLE}", f".{TENSORS}"}
BESIDE = {".lock", ".pid", ".wal", ".tmp", ".log"}
"""Endings of what belongs to processes and not to the audit."""


@dataclass(frozen=True)
class Moved:
    """What was done.

    Attributes:
        files, bytes: that were moved.
        there: files that were there already.
        kept: whether the workspace that was there stayed.
    """

    files: int
    bytes: int
    there: int
    kept: bool = False


def push(layout: Layout, remote: Remote, progress: Progress) -> Moved:
    """Put a finished audit into object storage.

    What people did is copied while nobody writes to it. A workspace that is there already is kept beside the new one,
    under ``backups``. What was computed on demand stays here.

    Raises:
        StoreError: the audit is not finished, or is being worked on; another one lies there; storage does not answer.
    """
    refuse_kept_elsewhere(layout, remote)
    with _alone(layout):
        manifest = read_manifest(layout.manifest)
        if not manifest.complete:
            raise StoreError(
                f"{layout.root}: this audit is not finished; run the same `concept-audit build` again first"
            )
        there = remote.sizes()
        earlier = _manifest_there(layout, remote) if layout.manifest.name in there else None
        _refuse_other(manifest, earlier, remote.url)
        same = recorded_files(manifest).items() & recorded_files(earlier).items()
        names = [name for name in _names(layout) if name not in _ends(layout)]
        moved, bytes_, skipped = 0, 0, 0
        with progress.stage(f"Putting {layout.root.name} into {remote.url}", len(names) + 1, "files") as stage:
            for name in names:
                path, size = layout.root / name, (layout.root / name).stat().st_size
                settled = path.suffix in SHARD and name.startswith("shards/")
                unchanged = settled or (
                    name in recorded_files(manifest) and (name, recorded_files(manifest)[name]) in same
                )
                if unchanged and there.get(name) == size:
                    skipped += 1
                else:
                    remote.put(name, path, once=settled and name not in there)
                    moved, bytes_ = moved + 1, bytes_ + size
                stage.advance()
            if layout.workspace.exists():
                bytes_ += _push_workspace(layout, remote, layout.workspace.name in there)
                moved += 1
            for name in _ends(layout):
                remote.put(name, layout.root / name)
            stage.advance()
    return Moved(moved, bytes_, skipped)


def pull(layout: Layout, remote: Remote, progress: Progress) -> Moved:
    """Fetch an audit from object storage.

    Raises:
        StoreError: there is none; another one lies here; what comes is not what was put; storage does not answer.
    """
    there = remote.sizes()
    if layout.manifest.name not in there:
        raise StoreError(f"{remote.url}: no audit there (no {layout.manifest.name}); check the address, or push one")
    if not layout.manifest.exists() and layout.root.is_dir() and (found := strangers(layout)):
        raise StoreError(f"{layout.root}: not empty and not an audit ({found[0].name}); choose another place")
    with _alone(layout):
        manifest = _manifest_there(layout, remote)
        if layout.manifest.exists():
            _refuse_other(manifest, read_manifest(layout.manifest), str(layout.root))
        known, moved, bytes_, skipped = recorded_files(manifest), 0, 0, 0
        kept = layout.workspace.exists()
        ends = _ends(layout)
        names = sorted(name for name in there if _wanted(layout, name) and name not in ends)
        with progress.stage(f"Fetching {remote.url}", len(names) + 1, "files") as stage:
            for name in names:
                path = layout.root / name
                if name == layout.workspace.name and kept:
                    pass
                elif (
                    path.suffix != ".json"
                    and path.exists()
                    and path.stat().st_size == there[name]
                    and _is_whole(path, name, known)
                ):
                    skipped += 1
                else:
                    if name in (layout.audit.name, layout.workspace.name):
                        log_of(path).unlink(missing_ok=True)
                    remote.get(name, path)
                    if not _is_whole(path, name, known):
                        path.unlink()
                        raise StoreError(
                            f"{remote.url}: {name} is not what was put there; push the audit again from where it is whole"
                        )
                    moved, bytes_ = moved + 1, bytes_ + there[name]
                stage.advance()
            for name in ends:
                remote.get(name, layout.root / name)
            stage.advance()
    return Moved(moved, bytes_, skipped, kept)


def _ends(layout: Layout) -> tuple[str, ...]:
    """What says that all the rest is there."""
    return layout.manifest_copy.name, layout.manifest.name


def _names(layout: Layout) -> Iterator[str]:
    """The files to put, by their names below the audit."""
    for path in sorted(own_files(layout)):
        name = path.relative_to(layout.root).as_posix()
        if _wanted(layout, name) and name != layout.workspace.name and not path.is_symlink():
            yield name


def _wanted(layout: Layout, name: str) -> bool:
    """Whether a name is one of an audit's files that are moved: it comes from storage, which anybody may have filled."""
    path = PurePosixPath(name)
    beside = BESIDE & set(path.suffixes) or any(map(is_leftover, path.parts))
    return is_plain(name) and not beside and name not in (layout.derived.name, MARKER) and is_own(layout, name)


def _push_workspace(layout: Layout, remote: Remote, there: bool) -> int:
    copied = partial_name(layout.root / "pushed")
    try:
        back_up(layout, copied)
        if there:
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
            remote.copy(layout.workspace.name, f"{layout.backups.name}/workspace-before-push-{stamp}.duckdb")
        remote.put(layout.workspace.name, copied)
        return copied.stat().st_size
    finally:
        remove(copied)
        remove(log_of(copied))


def _manifest_there(layout: Layout, remote: Remote) -> Manifest:
    fetched = partial_name(layout.manifest)
    try:
        remote.get(layout.manifest.name, fetched)
        return read_manifest(fetched)
    finally:
        remove(fetched)


def _refuse_other(one: Manifest, other: Manifest | None, where: str) -> None:
    if other is not None and one.fingerprints != other.fingerprints:
        differ = sorted(
            n
            for n in {**one.fingerprints, **other.fingerprints}
            if one.fingerprints.get(n) != other.fingerprints.get(n)
        )
        raise StoreError(f"{where}: an audit of another {' and '.join(differ)} lies there; choose another place")


def _is_whole(path: Path, name: str, known: Mapping[str, str]) -> bool:
    """Whether a file is what was written, as far as anybody can tell."""
    if name in known:
        return digest(path) == known[name]
    if path.suffix in SHARD and name.startswith("shards/"):
        try:
            return is_as_written(path)
        except StoreError:
            return False
    if path.suffix == ".json":
        try:
            json.loads(path.read_text("utf-8"))
        except ValueError:
            return False
    return True


@contextmanager
def _alone(layout: Layout) -> Iterator[None]:
    """Keep builds and whoever computes on the audit out."""
    busy = str(layout.root).replace("{", "{{").replace("}", "}}") + ": {who} is at work on it; wait for it"
    with held(layout.lock, busy), all_held(layout.locks, busy):
        yield
