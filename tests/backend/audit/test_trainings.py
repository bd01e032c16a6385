"""What training a probe again changes in the first rows of its ranking."""

from __future__ import annotations

from concept_audit.audit.trainings import TOP
from tests.backend.test_audit import typed


def test_rows_that_entered_and_left_the_top_are_those_of_the_two_rankings(audit):
    examples = typed(24)
    audit.train_probe("again", examples, layer=2)
    assert audit.trainings.change("again") is None, "the first training has nothing to be held against"
    before = audit.rank("again", top=None)
    audit.train_probe("again", [*examples[4:]], layer=3)
    now = audit.rank("again", top=None)
    change = audit.trainings.change("again")
    assert (change.before, change.now, change.top) == (1, 2, TOP)
    first, once = (set(table["example_id"][:TOP]) for table in (now, before))
    assert first != once, "else there is nothing to tell"
    assert change.entered["example_id"].tolist() == [i for i in now["example_id"][:TOP] if i not in once]
    assert change.left["example_id"].tolist() == [i for i in before["example_id"][:TOP] if i not in first]
    ranks = now.set_index("example_id")["rank"]
    earlier = before.set_index("example_id")["rank"]
    for table in (change.entered, change.left):
        assert table["rank"].tolist() == ranks[table["example_id"]].tolist()
        assert table["before"].tolist() == earlier[table["example_id"]].tolist()
    assert set(change.left["response"]) <= set(before["response"])


def test_the_same_training_again_changes_nothing(audit):
    examples = typed(24)
    for _ in range(2):
        audit.train_probe("same", examples, layer=2)
    change = audit.trainings.change("same")
    assert change.entered.empty and change.left.empty
