"""Acts on all rows that pass a filter, each undone as a whole."""

from __future__ import annotations

from concept_audit import Audit, RowFilter

MONEY = RowFilter(metadata={"topic": ("money",)})


def flags(audit: Audit) -> dict[str, tuple[str, str]]:
    rows = audit.rows.list(RowFilter(flag="any"))
    return dict(zip(rows["content_hash"], zip(rows["flag"], rows["note"], strict=True), strict=True))


def test_a_note_goes_on_every_flagged_row_of_a_filter_and_is_undone_at_once(audit):
    money = audit.rank("sae:3", where=MONEY)["content_hash"].tolist()
    audit.flags.set(money[:3], "remove", "old")
    audit.flags.set(money[3:5], "review")
    other = audit.rows.list(RowFilter(without={"topic": ("money",)}), 1)["content_hash"].tolist()
    audit.flags.set(other, "remove", "of another topic")
    before = flags(audit)
    change = audit.flags.note_matching(MONEY, "seen '; DROP TABLE base.flags", "sae:3", top=4, by="Ada")
    assert change.n_texts == 4
    after = flags(audit)
    assert {text: flag for text, (flag, _) in after.items()} == {text: flag for text, (flag, _) in before.items()}
    assert {text for text, (_, note) in after.items() if note.startswith("seen")} == set(money[:4])
    assert audit.flags.log()[["action", "n_texts", "made_by"]].iloc[0].tolist() == ["note", 4, "Ada"]
    again = audit.flags.note_matching(MONEY, "seen '; DROP TABLE base.flags", "sae:3", top=4)
    assert again.event_id is None
    audit.flags.undo(change.event_id)
    assert flags(audit) == before


def test_rows_of_a_filter_are_labelled_at_once_and_the_labels_before_come_back(audit):
    rows = audit.rank("sae:3", where=MONEY)["content_hash"].drop_duplicates().tolist()
    audit.queue.label_matching("tone", 0, RowFilter(text="river"))
    first = {example.content_hash: example.label for example in audit.labels.list("tone")}
    assert set(first.values()) == {0} and set(first) == set(audit.rows.list(RowFilter(text="river"))["content_hash"])
    assert set(first) & set(rows), "some had a label before"
    change = audit.queue.label_matching(" tone ", 1, MONEY, "sae:3")
    now = {example.content_hash: example.label for example in audit.labels.list("tone")}
    assert now == first | dict.fromkeys(rows, 1) and len(change.before) == len(rows)
    assert audit.queue.label_matching("tone", 1, MONEY).before == {}
    assert audit.queue.undo_labels(change) == len(rows)
    assert {example.content_hash: example.label for example in audit.labels.list("tone")} == first
    assert len(audit.queue.label_matching("new", 1, MONEY, "sae:3", top=2).before) == 2
