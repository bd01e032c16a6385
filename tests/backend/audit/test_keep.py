"""A row that somebody has seen and keeps counts as not flagged, and not as unseen."""

from __future__ import annotations

import shutil

import pytest

from concept_audit import Audit, RowFilter
from concept_audit.store import flags as store_flags


@pytest.fixture
def audit(built, tmp_path) -> Audit:
    return Audit(shutil.copytree(built, tmp_path / "small"))


def test_kept_rows_stay_in_cleaned_data_and_are_not_exported_as_flagged(audit):
    everything = audit.overview().n_rows
    first, second = audit.rows.list(limit=2)["content_hash"]
    audit.flags.set([first], "keep")
    audit.flags.set([second], "remove")
    (kept,) = audit.rows.list(RowFilter(flag="keep"))["content_hash"].unique()
    (flagged,) = audit.rows.list(RowFilter(flag="any"))["content_hash"].unique()
    assert (kept, flagged) == (first, second)
    removed = audit.rows.count(RowFilter(flag="any"))
    assert audit.rows.count(RowFilter(flag="none")) == everything - removed
    assert audit.rows.count(RowFilter(without_flags=("remove",))) == everything - removed
    assert audit.overview().n_flagged == removed
    unseen = audit.rows.count(RowFilter(flag="unseen"))
    assert audit.flags.verdicts(RowFilter()) == {"keep": everything - removed - unseen, "remove": removed, None: unseen}


def test_verdicts_are_counted_within_the_filter_of_a_ranking(audit):
    first = audit.rank("sae:3", top=1)
    audit.flags.set(first["content_hash"].tolist(), "keep")
    top = RowFilter(scores=(float(first["score"][0]), float("inf")))
    assert audit.flags.verdicts(top, "sae:3") == {"keep": audit.rows.count(top, "sae:3")}
    audit.flags.undo(audit.flags.latest()[0])
    assert audit.flags.verdicts(top, "sae:3") == {None: audit.rows.count(top, "sae:3")}


def test_verdicts_of_the_first_rows_are_those_that_an_act_on_them_would_change(audit):
    hashes = audit.rank("sae:3", top=12)["content_hash"].tolist()
    audit.flags.set(hashes[:1], "keep")
    audit.flags.set(hashes[-1:], "remove")
    for top in (1, 5, 12, 10_000):
        flags = audit.rank("sae:3", top=top)["flag"]
        wanted = {
            None if flag != flag or flag is None else flag: n for flag, n in flags.value_counts(dropna=False).items()
        }
        assert audit.flags.verdicts(RowFilter(), "sae:3", top=top) == wanted
    assert sum(audit.flags.verdicts(RowFilter(), top=7).values()) == 7


def test_verdicts_are_not_counted_again_until_somebody_changes_a_flag(audit, monkeypatch):
    counted, verdicts = [], store_flags.verdicts
    monkeypatch.setattr(store_flags, "verdicts", lambda *asked: counted.append(asked) or verdicts(*asked))
    unseen = audit.flags.verdicts(RowFilter(), "sae:3")
    unseen.clear()  # what is given is the asker's own
    assert sum(audit.flags.verdicts(RowFilter(), "sae:3").values()) == audit.overview().n_rows
    assert len(counted) == 1
    audit.flags.verdicts(RowFilter(), "sae:3", top=3)
    assert len(counted) == 2
    hashes = audit.rank("sae:3", top=1)["content_hash"].tolist()
    Audit(audit.root).flags.set(hashes, "keep")
    assert audit.flags.verdicts(RowFilter(), "sae:3", top=1) == {"keep": 1}
