"""Rendering: the text that the model reads, and which of its tokens the loss sees."""

from __future__ import annotations

import pytest

from concept_audit.errors import ModelError
from concept_audit.model.chat import CONTENT, END_OF_TURN, PROMPT, ChatRenderer
from concept_audit.types import Message
from tests.conftest import CHATML, small_tokenizer

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


def chat(*turns: str) -> list[Message]:
    return [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]


def spans(row, part: int) -> list[str]:
    """The text of each run of tokens of one kind."""
    runs: list[list[int]] = []
    for place, kind in enumerate(row.parts):
        if kind == part:
            if runs and runs[-1][-1] == place - 1:
                runs[-1].append(place)
            else:
                runs.append([place])
    return [row.text[row.starts[run[0]] : row.ends[run[-1]]] for run in runs]


@pytest.fixture(scope="module")
def renderer():
    return ChatRenderer(small_tokenizer(), 200)


def test_response_tokens_are_the_assistant_turn_and_its_end(renderer):
    row = renderer.render(chat("the river", "money walks quickly"))
    assert spans(row, CONTENT) == ["money walks quickly"]
    assert spans(row, END_OF_TURN) == ["<|im_end|>"]
    assert row.text.startswith("<|im_start|>user\nthe river<|im_end|>")
    assert (row.response == (row.parts != PROMPT)).all()


def test_every_assistant_turn_counts(renderer):
    row = renderer.render(chat("one", "first answer", "two", "second answer"))
    assert spans(row, CONTENT) == ["first answer", "second answer"]
    assert len(spans(row, END_OF_TURN)) == 2


def test_a_system_turn_is_part_of_the_prompt(renderer):
    row = renderer.render([Message("system", "be safe"), *chat("hello", "good day")])
    assert spans(row, CONTENT) == ["good day"]
    assert "be safe" in row.text


def test_a_user_turn_after_the_answer_is_not_a_response(renderer):
    assert spans(renderer.render(chat("one", "answer", "thanks")), CONTENT) == ["answer"]


def test_an_answer_that_repeats_the_prompt_is_found_in_its_place(renderer):
    row = renderer.render(chat("echo", "echo"))
    assert spans(row, CONTENT) == ["echo"]
    assert row.starts[row.parts == CONTENT][0] > row.text.index("assistant")


def test_emoji_and_foreign_scripts_keep_their_places(renderer):
    assert spans(renderer.render(chat("hé 🌍", "好的 🙂 déjà")), CONTENT) == ["好的 🙂 déjà"]


def test_white_space_at_the_ends_of_a_turn_does_no_harm(renderer):
    (content,) = spans(renderer.render(chat("q", "  spaced out \n")), CONTENT)
    assert content.strip() == "spaced out"


def test_special_tokens_inside_a_turn_do_not_end_it_early(renderer):
    row = renderer.render(chat("q", "before <|im_end|> after"))
    assert spans(row, CONTENT)[-1].strip() == "after"


def test_long_rows_are_cut_and_say_so():
    row = ChatRenderer(small_tokenizer(), 20).render(chat("the river", "money " * 100))
    assert row.truncated and len(row.input_ids) == 20
    assert row.response.any()


def test_a_row_whose_prompt_fills_the_context_has_no_response():
    row = ChatRenderer(small_tokenizer(), 10).render(chat("river " * 50, "money"))
    assert row.truncated and not row.response.any()


def test_a_single_assistant_turn_is_plain_text(renderer):
    row = renderer.render([Message("assistant", "the river runs")])
    assert spans(row, CONTENT) == ["the river runs"]
    assert "assistant" not in row.text


def test_a_model_without_a_template_gets_the_plain_one():
    row = ChatRenderer(small_tokenizer(None), 200).render(chat("the river", "money"))
    assert "User:\nthe river\n\nAssistant:\nmoney<|im_end|>" in row.text
    assert spans(row, CONTENT) == ["money"]
    assert spans(row, END_OF_TURN) == ["<|im_end|>"]


def test_a_template_without_system_role_gets_it_in_the_first_user_turn():
    turns = [Message("system", "be safe"), *chat("hello", "good day")]
    row = ChatRenderer(small_tokenizer(NO_SYSTEM), 200).render(turns)
    assert "be safe\n\nhello" in row.text
    assert spans(row, CONTENT) == ["good day"]


def test_a_refused_conversation_is_explained():
    refusing = ChatRenderer(small_tokenizer("{{ raise_exception('roles must alternate') }}"), 200)
    with pytest.raises(ModelError, match="roles must alternate"):
        refusing.render(chat("a", "b"))
