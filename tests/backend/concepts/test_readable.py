"""What can be read off an SAE feature: words rather than broken pieces."""

from __future__ import annotations

import pytest

from concept_audit.concepts.readable import is_word, promotion_tells

PROMOTED = [" bank", " money", " loan", "zekiel", "crapers", "riday"]


@pytest.mark.parametrize(
    ("before", "token", "after", "whole"),
    [
        ("all the", " money", " is gone", True),
        ("(", "money", ")", True),
        ("the mo", "ney", " is", False),
        ("the ", "mon", "ey is", False),
        ("Eighty", "-", "four", False),
        ("at", " 30", " cm", False),
        ("it", " is", " so", False),  # too short to say anything
        ("", "éclair", "", True),
    ],
)
def test_a_token_is_a_word_by_itself_or_not(before, token, after, whole):
    assert is_word(before + token + after, len(before), len(before + token)) is whole


def test_promoted_tokens_tell_where_they_are_words_of_the_texts():
    texts = ["A bank lends money.", "The loan, again."]
    assert promotion_tells(PROMOTED, [" river", "xx"], texts)
    assert not promotion_tells(PROMOTED, [" a bank", " Bank", " lends", " the"], ["A bank lends money."])
    assert not promotion_tells(["zekiel", "crapers", "riday", "ailure"], [], ["zekiel crapers riday ailure"])
    assert not promotion_tells(PROMOTED, [" bank", " money", " loan"], texts), "no more than what is suppressed"
    assert not promotion_tells([], [], texts)
