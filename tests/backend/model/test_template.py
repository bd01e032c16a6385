"""Chat templates: the same text on any day, and what tells two tokenizers apart."""

from __future__ import annotations

import datetime

import pytest

from concept_audit.errors import ModelError
from concept_audit.model.template import DATE, ChatTemplate, tokenizer_fingerprint
from tests.chat_templates import FAMILIES, LLAMA3, TRL_DATED, family_tokenizer, trl_templates
from tests.conftest import CHATML, small_tokenizer

TURNS = [{"role": "user", "content": "no"}, {"role": "assistant", "content": "yes"}]


def says(template: str) -> str:
    return ChatTemplate(small_tokenizer(template)).render(TURNS)


@pytest.mark.parametrize("asked", ["%d %b %Y", "%Y-%m-%d", "%A, %B %d, %Y", "%d/%m/%y %H:%M", "%j %p 100%%"])
def test_a_template_is_told_the_same_day_in_the_words_of_a_clock(asked):
    day = datetime.datetime.fromisoformat(DATE)
    assert says("{{ strftime_now('" + asked + "') }}") == day.strftime(asked)


def test_a_clock_changes_nothing_else_of_a_template():
    source = "  {% if true %}\n\n  a{% endif %}\n{{ messages[0].content }}\n"
    assert says(source + "{#- strftime_now -#}") == says(source + "{#- -#}")
    inside = "{% macro day() %}{{ strftime_now('%Y') }}{% endmacro %}{% for m in messages %}{{ day() }}{% endfor %}"
    assert says(inside) == "20242024"
    assert says("{% if strftime_now is defined %}yes{% endif %}") == "yes"


def test_only_templates_that_ask_for_the_day_have_one():
    dated = {name for name, family in FAMILIES.items() if ChatTemplate(family_tokenizer(family.template)).date}
    assert dated == {"llama 3"}
    assert "26 Jul 2024" in says(LLAMA3)


@pytest.mark.skipif(not trl_templates(), reason="TRL, which carries real chat templates, is not installed")
@pytest.mark.parametrize("name", TRL_DATED)
def test_real_templates_that_print_the_day_print_the_same_one(name):
    assert "2024" in says(trl_templates()[name]) and ChatTemplate(small_tokenizer(trl_templates()[name])).date == DATE


def test_of_several_templates_the_default_one_is_used():
    several = small_tokenizer({"default": CHATML, "tool_use": "{{ 'tools' }}"})
    assert ChatTemplate(several).render(TURNS) == says(CHATML)
    with pytest.raises(ModelError, match="several chat templates"):
        ChatTemplate(small_tokenizer({"one": CHATML, "other": CHATML}))


def test_a_fingerprint_follows_template_words_and_special_tokens_alone():
    prints = [
        tokenizer_fingerprint(small_tokenizer()),
        tokenizer_fingerprint(small_tokenizer(CHATML + " ")),
        tokenizer_fingerprint(small_tokenizer(None)),
        tokenizer_fingerprint(family_tokenizer(CHATML)),
        tokenizer_fingerprint(family_tokenizer(CHATML, "<|eot|>")),
    ]
    assert len(set(prints)) == len(prints)
    used = small_tokenizer()
    used(["no", "no yes"], truncation=True, max_length=1)
    assert tokenizer_fingerprint(used) == prints[0]
