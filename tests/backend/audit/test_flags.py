"""Flags: the log, undoing, many at once, and views that have a name."""

from __future__ import annotations

import pytest

from concept_audit import Audit, RowFilter, StoreError


def hashes(audit: Audit, count: int) -> list[str]:
    return audit.rows.list(limit=count)["content_hash"].tolist()


def flagged(audit: Audit) -> dict[str, str]:
    rows = audit.rows.list(RowFilter(flag="any"))
    return dict(zip(rows["content_hash"], rows["flag"], strict=True))


def test_every_change_is_in_the_log_with_who_and_how(audit):
    one, two, three = hashes(audit, 3)
    audit.flags.set([one, two], "remove", "bad", by="Ada")
    audit.flags.set([three], "review", by="Grace")
    audit.flags.clear([two], by="Grace")
    log = audit.flags.log()
    assert log["action"].tolist() == ["unflag", "review", "remove"]
    assert log["n_texts"].tolist() == [1, 1, 2] and log["made_by"].tolist() == ["Grace", "Grace", "Ada"]
    assert log["note"].iloc[-1] == "bad" and not log["undone"].any()


def test_another_verdict_leaves_a_row_its_note_unless_it_comes_with_one(audit):
    one, two, three = hashes(audit, 3)

    def notes() -> list[tuple[str | None, str | None]]:
        rows = audit.rows.list(limit=3).set_index("content_hash").loc[[one, two, three]]
        return list(zip(rows["flag"], rows["note"], strict=True))

    audit.flags.set([one], "review", "ask Grace", by="Ada")
    audit.flags.set([two], "remove", "wrong", by="Ada")
    audit.flags.set([one], "remove", by="Ada")
    assert notes()[0] == ("remove", "ask Grace")
    change = audit.flags.set_matching(RowFilter(), "remove", by="Ada")
    assert notes() == [("remove", "ask Grace"), ("remove", "wrong"), ("remove", "")]
    assert change.n_texts == len({*audit.rows.list()["content_hash"]}) - 2, "the two are so already"
    audit.flags.set_matching(RowFilter(), "keep", note="all right", by="Ada")
    assert {note for _, note in notes()} == {"all right"}
    audit.flags.set([two], "keep", "", by="Ada")
    assert notes()[1] == ("keep", ""), "a note that is written empty is empty"


def test_undo_puts_back_what_was_there_before(audit):
    one, two = hashes(audit, 2)
    audit.flags.set([one], "review", "first", by="Ada")
    change = audit.flags.set([one, two], "remove", "second", by="Ada")
    undone = audit.flags.undo(change.event_id, by="Ada")
    assert (undone.n_texts, undone.left_alone) == (2, 0)
    assert flagged(audit) == {one: "review"}
    assert audit.rows.list(RowFilter(flag="any"))["note"].tolist()[0] == "first"
    assert audit.flags.undoable("Ada")["event_id"].tolist() == [1], "an undone change is not offered again"
    audit.flags.undo(undone.event_id)
    assert flagged(audit) == {one: "remove", two: "remove"}


def test_undo_leaves_alone_what_somebody_has_changed_since(audit):
    one, two = hashes(audit, 2)
    change = audit.flags.set([one, two], "remove", by="Ada")
    audit.flags.set([two], "review", by="Grace")
    undone = audit.flags.undo(change.event_id, by="Ada")
    assert (undone.n_texts, undone.left_alone) == (1, 1)
    assert flagged(audit) == {two: "review"}


def test_a_change_that_changes_nothing_is_not_logged(audit):
    (one,) = hashes(audit, 1)
    assert audit.flags.clear([one]).event_id is None
    audit.flags.set([one])
    assert audit.flags.set([one]).event_id is None
    assert len(audit.flags.log()) == 1


def test_undoing_a_change_that_is_not_there_is_refused(audit):
    with pytest.raises(StoreError, match="flag change 77"):
        audit.flags.undo(77)


def test_the_first_rows_of_a_filter_are_flagged(audit):
    money = RowFilter(metadata={"topic": ("money",)})
    change = audit.flags.set_matching(money, "remove", "sae:3", top=7)
    top = audit.rank("sae:3", top=7, where=money)
    assert change.n_texts == 7 and set(flagged(audit)) == set(top["content_hash"])
    assert "first 7" in audit.flags.log()["how"].iloc[0]


def test_flags_of_another_process_are_seen_at_once(audit, audit_directory):
    from concept_audit.audit.opened import OpenAudit

    assert audit.rows.count(RowFilter(flag="any")) == 0 and audit.flags.latest() == (0, "")
    other = OpenAudit(audit_directory)
    (one,) = hashes(audit, 1)
    from concept_audit.store import flags

    other.write(lambda cursor: flags.set_flags(cursor, [one], "remove", "", "Grace"))
    assert audit.flags.latest() == (1, "Grace")
    assert audit.overview().n_flagged == 2, "row 299 is a copy of row 0"


def test_a_read_only_audit_refuses_what_people_do(audit_directory):
    audit = Audit(audit_directory, read_only=True)
    (one,) = hashes(audit, 1)
    for change in (
        lambda: audit.flags.set([one]),
        lambda: audit.views.save("v", "audit", "q=1"),
        lambda: audit.concepts.label(3, "mine"),
        lambda: audit.queue.skip("p", [one]),
        lambda: audit.probes.rename("a", "b"),
    ):
        with pytest.raises(StoreError, match="read-only"):
            change()


def test_views_have_names(audit):
    audit.views.save(" second look ", "audit", "concept=sae:3&page=2", by="Ada")
    audit.views.save("second look", "audit", "concept=sae:4")
    assert audit.views.list()[["name", "page", "query"]].values.tolist() == [["second look", "audit", "concept=sae:4"]]
    audit.views.delete("second look")
    assert audit.views.list().empty
