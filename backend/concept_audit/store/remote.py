"""An audit in object storage: whole objects, put once, and listed rather than renamed.

An object is either there with all its bytes or not there, which is what storage
promises of a put; nothing is streamed under a name that readers look for. Shards never
change under their key, so the first that is put stays, and whoever comes second with
an equal one is told so and goes on.
"""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from concept_audit.errors import StoreError, first_line
from concept_audit.files import atomic_write

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
ADDRESS = re.compile(rf"({'|'.join(SCHEMES)})://[^/]+(/.*)?")
AT_ONCE = 64 << 20
"""Bytes of an object that is put in one request, and only where there is none yet; a larger one goes up in parts."""
PATIENCE = timedelta(seconds=120)
"""How long a request is tried again while storage is busy or out of reach."""
QUIET = timedelta(seconds=60)
"""How long a request may take."""
SHORTEST_WAIT = 0.1
PART = 1 << 20
Answer = TypeVar("Answer")


def is_address(text: str) -> bool:
    """Whether a text names a place in object storage, such as ``s3://bucket/audit``."""
    return ADDRESS.fullmatch(text) is not None


@dataclass(frozen=True)
class Remote:
    """Objects below one address.

    Credentials come the way that the library looks for them: environment variables, workload and instance identities.

    Attributes:
        url: such as ``s3://bucket/audit``.
    """

    url: str

    def sizes(self, below: str = "") -> dict[str, int]:
        """Every object by its name and bytes, in one listing.

        Args:
            below: only those whose name begins with this, and a slash.

        Raises:
            StoreError: storage does not answer, or refuses.
        """
        store = self._store  # first, since it says what is missing
        import obstore

        def listed() -> dict[str, int]:
            found = obstore.list(store, below or None, chunk_size=1000)
            return {each["path"]: each["size"] for part in found for each in part}

        return self._ask(below or "the list of objects", listed)

    def size(self, name: str) -> int | None:
        """Bytes of an object; None if there is none. Raises as `sizes`."""
        return self._described(name, "size")

    def tag(self, name: str) -> str | None:
        """What changes with an object's content; None if there is none. Raises as `sizes`."""
        return self._described(name, "e_tag")

    def _described(self, name: str, what: str) -> Any:
        store = self._store
        import obstore

        def asked() -> Any:
            try:
                return dict(obstore.head(store, name))[what]
            except FileNotFoundError:
                return None

        return self._ask(name, asked)

    def put(self, name: str, path: Path, once: bool = False) -> bool:
        """Put a file, whole or not at all.

        Args:
            once: it never changes under its name: one that is there stays.

        Returns:
            whether it was put; if not, the one that is there may be of somebody else.

        Raises:
            StoreError: as `sizes`.
        """
        store = self._store
        import obstore
        from obstore.exceptions import AlreadyExistsError

        def put() -> bool:
            if not once or path.stat().st_size > AT_ONCE:
                obstore.put(store, name, path)
                return True
            # Also where an earlier try came through, and its answer did not.
            try:
                obstore.put(store, name, path, mode="create")
            except AlreadyExistsError:
                return False
            return True

        return self._ask(name, put)

    def replace(self, name: str, path: Path, tag: str | None) -> str | None:
        """Put a file in the place of the object that was seen last, where storage can tell; its tag.

        Args:
            tag: of the object that was seen last; None if there was none.

        Raises:
            StoreError: another one is there, or as `sizes`.
        """
        store = self._store
        import obstore
        from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

        def put() -> str | None:
            try:
                made = obstore.put(store, name, path, mode={"e_tag": tag} if tag else "create", use_multipart=False)
            except (NotSupportedError, NotImplementedError):
                made = obstore.put(store, name, path, use_multipart=False)
            except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
                # An earlier try may have come through, and its answer not.
                found = self._bytes(name)
                if found is None or found[0] != path.read_bytes():
                    raise StoreError(
                        f"{self.url}: {name} is not the one that was seen here last: another machine works on this audit; "
                        "wait for it, and run the same command again"
                    ) from error
                return found[1]
            return made["e_tag"]

        return self._ask(name, put)

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; those that are not there are no error. Raises as `sizes`."""
        listed, store = list(names), self._store
        import obstore

        for start in range(0, len(listed), 1000):
            part = listed[start : start + 1000]

            def delete(part: list[str] = part) -> None:
                with suppress(FileNotFoundError):
                    obstore.delete(store, part)

            self._ask(f"{part[0]} and {len(part) - 1} more" if len(part) > 1 else part[0], delete)

    def get(self, name: str, path: Path) -> bool:
        """Fetch an object into a file that is complete or absent; whether there is one.

        Raises:
            StoreError: as `sizes`, or the disk is full.
        """
        import obstore

        def get() -> bool:
            try:
                found = obstore.get(self._store, name)
            except FileNotFoundError:
                return False
            with atomic_write(path) as partial, partial.open("wb") as out:
                for part in found.stream(min_chunk_size=PART):
                    out.write(part)
                if out.tell() != found.meta["size"]:
                    raise OSError(f"{out.tell():,} of {found.meta['size']:,} bytes came")
            return True

        return self._ask(name, get)

    def _bytes(self, name: str) -> tuple[bytes, str | None] | None:
        import obstore

        try:
            found = obstore.get(self._store, name)
        except FileNotFoundError:
            return None
        return bytes(found.bytes()), found.meta["e_tag"]

    def copy(self, name: str, other: str) -> None:
        """Have storage copy an object to another name; raises as `sizes`."""
        import obstore

        self._ask(name, lambda: obstore.copy(self._store, name, other))

    @property
    def _store(self) -> ObjectStore:
        return _opened(self.url)

    def _ask(self, name: str, act: Callable[[], Answer]) -> Answer:
        """What storage answers; asked again while it is busy or out of reach, as whole objects may be.

        The library by itself does not repeat a put whose connection was lost.
        """
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        deadline, wait = time.monotonic() + PATIENCE.total_seconds(), SHORTEST_WAIT
        while True:
            try:
                return act()
            except StoreError:
                raise
            except (PermissionDeniedError, UnauthenticatedError) as error:
                raise StoreError(
                    f"{self.url}: {name} is refused ({first_line(error)}); set the credentials of your storage, such "
                    "as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                ) from error
            except (BaseError, OSError) as error:
                if time.monotonic() + wait > deadline:
                    raise StoreError(
                        f"{self.url}: {name} cannot be reached ({first_line(error)}); run the same command again, it "
                        "goes on where it was"
                    ) from error
            time.sleep(wait)
            wait *= 2


@lru_cache(maxsize=8)
def _opened(url: str) -> Any:
    """A client of storage, which all threads share.

    Raises:
        StoreError: the library is not installed, or the address makes no sense.
    """
    if importlib.util.find_spec("obstore") is None:
        raise StoreError(f"{url}: object storage wants one more package: pip install 'concept-audit[objects]'")
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    # Options that are given here take the place of those in the environment: this one is asked for by name there.
    plain = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("true", "1")
    try:
        return from_url(
            url,
            client_options={"timeout": QUIET, "connect_timeout": timedelta(seconds=10), "allow_http": plain},
            retry_config={"retry_timeout": PATIENCE},
        )
    except (BaseError, ValueError) as error:
        raise StoreError(f"{url}: no address of object storage ({first_line(error)})") from error
