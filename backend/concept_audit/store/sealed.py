"""The files of an audit that nothing may be written to, not even a lock: on a medium that is read-only, say."""

from __future__ import annotations

from collections.abc import Mapping

from concept_audit.errors import StoreError
from concept_audit.store.attaching import Access, Attachments


class SealedAttachments(Attachments):
    """Attaches files as they are, with what a killed process left in their logs; one that is absent is empty."""

    writes = False

    def open(self, wanted: Mapping[str, Access]) -> None:
        """Attach files; as `Attachments.open`, without a turn, which would be a file."""
        self._open_when_free(wanted)

    def _attach(self, name: str, access: Access) -> None:
        path = self._paths[name]
        if not path.exists():
            self._attach_empty(name)
            return
        try:
            self._attach_file(name, read_only=True)
        except StoreError:
            if name == "workspace":
                raise
            # What was computed on demand cannot be read: as good as never computed.
            self._attach_empty(name)
            return
        if self._format(name) == self._wanted(name):
            return
        self._detach(name)
        if name == "workspace":
            raise StoreError(
                f"{path}: in the format of an earlier version; open the audit once without --read-only, which brings "
                "it to the present one and keeps a copy"
            )
        self._attach_empty(name)
