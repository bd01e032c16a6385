"""The directory that an audit is built in: no one else's, and held by one process at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from concept_audit.errors import StoreError
from concept_audit.progress import Progress
from concept_audit.store.layout import Layout
from concept_audit.store.locks import all_held, awaited, held
from concept_audit.store.manifest import Manifest, read_manifest
from concept_audit.store.published import opened
from concept_audit.store.remote import is_address
from concept_audit.store.removal import strangers


def layout_at(out: Path | str, cache: Path, progress: Progress) -> Layout:
    """Where an audit is built: a directory, or an address of object storage, of which a directory is the working copy.

    Raises:
        StoreError: storage does not answer, or something else lies there.
    """
    if not is_address(str(out)):
        return Layout(Path(out))
    layout = opened(str(out).rstrip("/"), cache)
    progress.say(f"{out}: its databases are in {layout.root}, and so are the shards that were used last")
    return layout


def refuse_foreign(layout: Layout) -> None:
    """Raise StoreError for a directory that holds something else than an audit."""
    if layout.manifest.exists() or not layout.root.exists():
        return
    # A build that was killed at its very start has left its lock, and no manifest.
    if found := strangers(layout):
        raise StoreError(
            f"{layout.root}: not empty and not an audit (no manifest.json, but {found[0].name}); "
            "choose another --out, or empty it"
        )


@contextmanager
def building(layout: Layout) -> Iterator[None]:
    """Keep other builds of this audit out.

    Raises:
        StoreError: another process is building it, or the place may not be written to.
    """
    with held(layout.lock, f"{_plain(layout)}: {{who}} is building this audit; wait for it, or choose another --out"):
        yield


@contextmanager
def idle(layout: Layout, purpose: str) -> Iterator[None]:
    """Keep out whoever makes something on demand: an index, curvature factors, a ranking.

    Args:
        purpose: for the error: ``what it reads is to be made anew``.

    Raises:
        StoreError: another process is making something.
    """
    with all_held(layout.locks, f"{_plain(layout)}: {{who}} computes on this audit, and {purpose}; wait for it"):
        yield


@contextmanager
def making(layout: Layout, manifest: Manifest, name: str, what: str) -> Iterator[None]:
    """Be the only process that makes one thing on demand; a second one is refused.

    Args:
        manifest: of the build that it is made from.
        name: of the lock; see `Layout.lock_of`.
        what: is made.

    Raises:
        StoreError: another process is making it, or the audit has been built anew.
    """
    with held(layout.lock_of(name), f"{_plain(layout)}: {{who}} is building its {what}; wait for it"):
        _refuse_rebuilt(layout, manifest)
        yield


@contextmanager
def taking_turns(
    layout: Layout, manifest: Manifest, name: str, doing: str, say: Callable[[str], None]
) -> Iterator[None]:
    """As `making`, but a second process waits, for what it finds then is what it was to make."""
    with awaited(layout.lock_of(name), doing, say):
        _refuse_rebuilt(layout, manifest)
        yield


def _refuse_rebuilt(layout: Layout, manifest: Manifest) -> None:
    """Raise StoreError if the rows are not those any more that a process has begun with."""
    # Whoever builds takes these locks, too, before anything goes: asked now, it holds until the lock is given back.
    if read_manifest(layout.manifest).stages.get("tokens") != manifest.stages.get("tokens"):
        raise StoreError(f"{layout.root}: has been built anew meanwhile; open it again")


def _plain(layout: Layout) -> str:
    return str(layout.root).replace("{", "{{").replace("}", "}}")
