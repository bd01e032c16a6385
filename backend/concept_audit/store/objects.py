"""Shards in object storage, with a directory of this machine that keeps those used last.

Which storage is said by a small file beside the shards' directory. A shard is put before
it has its name here, so that whatever lies here lies there too: it may go at any time,
and is fetched when it is read again. What differs from one machine to the next is only
what is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from concept_audit.errors import StoreError
from concept_audit.files import atomic_write, is_leftover
from concept_audit.store.remote import Remote

MARKER = "objects.json"
"""Says where the shards lie: ``url``, and ``manifest``, the tag of the manifest that was seen there last."""
SHARDS = "shards"
BYTES_VARIABLE = "CONCEPT_AUDIT_SHARD_BYTES"
FREE_SHARE = 0.5
"""Of the disk's free bytes, what shards may take where nobody says how many."""
IN_USE_SECONDS = 60.0
"""For so long after its last use a shard stays, since somebody may be reading it."""
KEPT = (".safetensors", ".parquet")
"""Endings of what may go here; what is smaller stays."""


@dataclass(frozen=True)
class Objects:
    """The shards of one audit in object storage.

    Attributes:
        root: the audit's directory on this machine.
        url: where the audit lies in storage.
    """

    root: Path
    url: str

    @property
    def remote(self) -> Remote:
        """The audit in storage."""
        return Remote(self.url)

    def name(self, path: Path) -> str:
        """What a file below the audit's directory is called in storage."""
        return path.relative_to(self.root).as_posix()

    def names(self, directory: Path) -> list[str]:
        """The files of a directory that storage has, those deeper down too, by their names below it: one listing.

        Raises:
            StoreError: storage does not answer.
        """
        below = self.name(directory)
        # Names come from storage, which anybody may have filled: none leads to another place.
        found = [name[len(below) + 1 :] for name in self.remote.sizes(below) if name.startswith(f"{below}/")]
        return sorted(name for name in found if is_plain(name))

    def there(self, path: Path) -> bool:
        """Whether storage has a file; raises as `names`."""
        return self.remote.size(self.name(path)) is not None

    def put(self, partial: Path, path: Path, once: bool) -> None:
        """Put what is to become a file of this directory, before it does.

        Args:
            partial: what was written; holds afterwards what storage has.
            path: what it is to be called.
            once: it never changes under its name: where somebody was faster, theirs stays, and is fetched.

        Raises:
            StoreError: as `names`.
        """
        name = self.name(path)
        if not self.remote.put(name, partial, once):
            self.remote.get(name, partial)

    def fetch(self, path: Path) -> bool:
        """Bring a file from storage; whether there is one. Others may go for it. Raises as `names`, or the disk is full."""
        found = self.remote.get(self.name(path), path)
        if found:
            self.make_room(path)
        return found

    def delete(self, paths: Iterable[Path]) -> None:
        """Delete files, in storage first; raises as `names`."""
        listed = list(paths)
        self.remote.delete(map(self.name, listed))
        for path in listed:
            path.unlink(missing_ok=True)

    def used(self, path: Path) -> None:
        """Note that a file is being read: it stays for a while, and goes after those that are not."""
        with suppress(OSError):
            os.utime(path, (time.time(), path.stat().st_mtime))

    def make_room(self, new: Path | None = None) -> None:
        """Delete from this machine those used least recently, until the rest takes no more than it may.

        Args:
            new: has just come, and stays.

        Raises:
            StoreError: the environment asks for no number of bytes.
        """
        kept, total = [], 0
        for place, _, names in os.walk(self.root / SHARDS):
            for path in (Path(place, name) for name in names if Path(name).suffix in KEPT and not is_leftover(name)):
                with suppress(OSError):  # another process has deleted it
                    state = path.stat()
                    kept.append((state.st_atime, path, state.st_size))
                    total += state.st_size
        over, before = total - limit(self.root, total), time.time() - IN_USE_SECONDS
        for used, path, size in sorted(kept):
            if over <= 0 or used > before:
                return
            if path == new:
                continue
            path.unlink(missing_ok=True)
            over -= size

    def settle(self) -> None:
        """Make this machine one that works on the audit; the directory may be new to it.

        Where no command is run from it, it has no manifest, and takes the SAE from storage.

        Raises:
            StoreError: as `names`, or the directory is one of another audit.
        """
        found = objects_of(self.root)
        if found is None:
            if (self.root / "manifest.json").exists():
                raise StoreError(
                    f"{self.root}: an audit of this machine alone; shards in {self.url} want another place"
                )
            write_marker(self.root, self.url, None)
        elif found.url != self.url:
            raise StoreError(f"{self.root}: its shards lie in {found.url}, not in {self.url}; choose another --cache")
        if not (self.root / "manifest.json").exists():
            for name in self.names(self.root / "sae"):
                if name in ("cfg.json", "sae_weights.safetensors"):
                    self.remote.get(f"sae/{name}", self.root / "sae" / name)


def is_plain(name: str) -> bool:
    """Whether a name in storage is one of a file below a directory: it leads to no other place."""
    parts = PurePosixPath(name).parts
    return bool(parts) and name == "/".join(parts) and not {"..", "."} & set(parts) and not name.startswith("/")


def objects_of(root: Path) -> Objects | None:
    """Where the shards of an audit lie; None if they lie in its directory alone.

    Raises:
        StoreError: the file that says so is damaged.
    """
    try:
        found = json.loads((root / MARKER).read_text("utf-8"))
        return Objects(root, str(found["url"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{root / MARKER}: damaged; delete that file and run the same command with the address of the audit again"
        ) from error


def objects_for(path: Path) -> Objects | None:
    """As `objects_of`, of the audit that a shard's file belongs to."""
    # shards/<kind>/<key>/<file>; some lie deeper.
    root = next((above.parent for above in path.parents if above.name == SHARDS), None)
    return objects_of(root) if root else None


def seen_manifest(root: Path) -> str | None:
    """The tag of the manifest in storage that this directory has seen last; None if it has seen none."""
    try:
        return json.loads((root / MARKER).read_text("utf-8")).get("manifest")
    except (OSError, ValueError, AttributeError):
        return None


def write_marker(root: Path, url: str, manifest: str | None) -> None:
    """Say where an audit's shards lie, and which manifest was seen there last."""
    with atomic_write(root / MARKER) as partial:
        partial.write_text(json.dumps({"url": url, "manifest": manifest}) + "\n", "utf-8")


def limit(root: Path, taken: int) -> int:
    """Bytes that shards may take on this machine, of which so many are taken.

    Raises:
        StoreError: the environment asks for no number.
    """
    text = os.environ.get(BYTES_VARIABLE, "")
    if text and not text.isdigit():
        raise StoreError(f"{BYTES_VARIABLE}={text}: give a number of bytes, such as {50 << 30}")
    return int(text) if text else int(FREE_SHARE * (shutil.disk_usage(root).free + taken))
