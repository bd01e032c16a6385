"""Views that have a name."""

from __future__ import annotations

import pandas as pd

from concept_audit.audit.opened import OpenAudit, user_name
from concept_audit.store import workspace

LONGEST_NAME = 80


class Views:
    """Pages of the dashboard with their settings, kept under names."""

    def __init__(self, opened: OpenAudit):
        self._opened = opened

    def save(self, name: str, page: str, query: str, by: str = "") -> None:
        """Keep a view under a name: a page's path and its query string."""
        kept, who = name.strip()[:LONGEST_NAME], by or user_name()
        self._opened.change(lambda cursor: workspace.save_view(cursor, kept, page, query, who))

    def list(self) -> pd.DataFrame:
        """Views that have a name: name, page, query, saved_by, saved_at."""
        return self._opened.cached_read("views", workspace.saved_views)

    def delete(self, name: str) -> None:
        """Forget a named view."""
        self._opened.change(lambda cursor: workspace.delete_view(cursor, name))
