"""The response mask of agents' trajectories: calls are responses, what tools answer never is."""

from __future__ import annotations

import functools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concept_audit.errors import ModelError
from concept_audit.model.chat import ChatRenderer
from concept_audit.types import TOOLS, Message
from tests.backend.model.test_turns import BRIEFLY, TRL, responses
from tests.chat_templates import FAMILIES, family_tokenizer
from tests.conftest import CHATML, small_tokenizer

TOOL = {"type": "function", "function": {"name": "walk", "description": "d", "parameters": {"type": "object", "properties": {"to": {"type": "string", "description": "where"}}, "required": ["to"]}}}  # fmt: skip
OFFERED = Message(TOOLS, json.dumps([TOOL]))


def called(to: str, content: str = "", count: int = 1, **more) -> Message:
    calls = [{"id": f"call0000{n}", "name": "walk", "arguments": {"to": to}} for n in range(count)]
    return Message("assistant", content, json.dumps(calls), **more)


def answered(text: str) -> Message:
    return Message("tool", text, name="walk", call_id="call00000")


TRAJECTORY = [OFFERED, Message("user", "USER walk"), called("river"), answered("RESULT {green}"), Message("assistant", "yes walks")]  # fmt: skip

CALLS = "{% for c in message.tool_calls %}{{ '\\n' if message.content or not loop.first }}<tool_call>\n{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}\n</tool_call>{% endfor %}"
HERMES = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ message.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ message.role }}\n{% if message.reasoning_content %}<think>\n"
    "{{ message.reasoning_content }}\n</think>\n\n{% endif %}{{ message.content }}"
    "{% if message.tool_calls %}" + CALLS + "{% endif %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }}[/INST]"
    "{% elif message.role == 'tool' %}[TOOL_RESULTS] {{ message.content }}[/TOOL_RESULTS]"
    "{% elif message.tool_calls %}[TOOL_CALLS] [{% for c in message.tool_calls %}{{ c.function | tojson }}{% endfor %}]{{ eos_token }}"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEXT_ARGUMENTS = HERMES.replace(CALLS, "{% for c in message.tool_calls %}{{ c.function.name + '```' + c.function.arguments + '```' }}{% endfor %}")  # fmt: skip


@functools.cache
def renderer(template: str, eos: str = "<|im_end|>") -> ChatRenderer:
    return ChatRenderer(family_tokenizer(template, eos), 4000)


def test_calls_are_responses_with_all_that_the_template_writes_around_them():
    row = renderer(HERMES).render(TRAJECTORY)
    call = '<tool_call>\n{"name": "walk", "arguments": {"to": "river"}}\n</tool_call><|im_end|>'
    assert responses(row) == [call, "yes walks<|im_end|>"]
    assert '"description": "d"' in row.text and "<tool_response>\nRESULT" in row.text


def test_words_reasoning_and_several_calls_of_one_turn_are_one_response():
    turn = called("river", "so:", 2, reasoning="maybe")
    said, _ = responses(renderer(HERMES).render([*TRAJECTORY[:2], turn, *TRAJECTORY[3:]]))
    assert said.startswith("<think>\nmaybe\n</think>\n\nso:\n<tool_call>") and said.count("river") == 2
    assert said.endswith("</tool_call><|im_end|>")


def test_a_turn_that_the_template_opens_by_nothing_begins_where_the_one_before_ends():
    first, second = responses(renderer(MISTRAL, "</s>").render(TRAJECTORY))
    assert first == ' [TOOL_CALLS] [{"name": "walk", "arguments": {"to": "river"}}]</s>'.lstrip()
    assert second.strip() == "yes walks</s>"


def test_a_template_that_takes_arguments_as_text_gets_their_json():
    assert responses(renderer(TEXT_ARGUMENTS).render(TRAJECTORY))[0] == 'walk```{"to": "river"}```<|im_end|>'


def test_calls_that_the_template_does_not_know_are_written_into_the_turn_and_said_to_be():
    plain = ChatRenderer(small_tokenizer(), 400)
    row = plain.render(TRAJECTORY)
    assert responses(row)[0] == '<tool_call>\n{"name": "walk", "arguments": {"to": "river"}}\n</tool_call><|im_end|>'
    told = plain.unknown(TRAJECTORY)
    assert [note.split(":")[0] for note in told] == ["the model's template knows no tools", "the model's template knows no tool calls"]  # fmt: skip
    assert renderer(HERMES).unknown(TRAJECTORY) == []


def test_turns_that_do_not_count_are_read_like_prompts():
    turns = [*TRAJECTORY[:2], called("river", trained=False), *TRAJECTORY[3:]]
    row, all_of_it = renderer(HERMES).render(turns), renderer(HERMES).render(TRAJECTORY)
    assert responses(row) == ["yes walks<|im_end|>"]
    assert row.input_ids.tolist() == all_of_it.input_ids.tolist()


def test_a_template_that_hides_where_calls_end_is_refused_with_the_reason():
    hides = HERMES.replace("</tool_call>{% endfor %}", "{{ '</tool_call>' if messages[-1].tool_calls }}{% endfor %}")
    with pytest.raises(ModelError, match="writes what follows a tool call otherwise"):
        renderer(hides).render(TRAJECTORY)


def test_the_prompt_for_an_answer_is_what_stands_before_it():
    row, prompt = renderer(HERMES).render(TRAJECTORY), renderer(HERMES).prompt(TRAJECTORY[:-1])
    assert row.input_ids[: len(prompt)].tolist() == prompt.tolist()
    assert responses(row)[-1] == row.text[row.starts[len(prompt)] :].strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_whose_templates_know_no_calls_have_them_as_text_or_say_why_not(family):
    rendered = ChatRenderer(family_tokenizer(FAMILIES[family].template, FAMILIES[family].eos), 4000)
    try:
        row = rendered.render(TRAJECTORY[1:])
    except ModelError as error:
        assert "roles must alternate" in str(error)
        return
    first, last = responses(row)
    assert '{"name": "walk", "arguments": {"to": "river"}}' in first and "yes walks" in last
    assert not any(word in text for text in (first, last) for word in ("USER", "RESULT"))


words = st.text('ab{}"<>[]/\n é🙂\ue000', max_size=12)


@pytest.mark.parametrize("template", [HERMES, MISTRAL, TEXT_ARGUMENTS, CHATML])
@BRIEFLY
@given(to=words, result=words, said=words)
def test_whatever_is_called_and_answered_no_result_is_in_a_response(template, to, result, said):
    turns = [*TRAJECTORY[:2], called(to), answered(f"RESULT {result}"), Message("assistant", f"sure {said}")]
    found = responses(renderer(template, "</s>" if template is MISTRAL else "<|im_end|>").render(turns))
    assert len(found) == 2 and "walk" in found[0] and found[1].strip().startswith("sure")
    assert not any(word in text for text in found for word in ("RESULT", "USER"))


REFUSED = {("deepseek_r1_distill_training", False), ("diffusion_gemma_training", True)}
"""Templates, and whether there are words beside the calls, that write such a turn in a way that hides where it went."""
HEADED = ("gptoss_training", "muse_glimmer_training")
"""Those that count the turn's header, which the generation prompt gives the model, as the assistant's too."""
KNOWS = [name for name, text in TRL.items() if name.endswith("_training") and "tool_calls" in text]


@pytest.mark.skipif(not TRL, reason="TRL, which carries real chat templates, is not installed")
@pytest.mark.parametrize("name", KNOWS)
@pytest.mark.parametrize("turn", [called("river"), called("river", "so")], ids=["calls alone", "words and calls"])
def test_real_templates_agree_on_calls_with_those_that_mark_what_training_sees(name, turn):
    """TRL's variants for training enclose what the assistant says in ``generation`` tags: an oracle without our code."""
    messages = [*TRAJECTORY[:2], turn, *TRAJECTORY[3:]]
    tokenizer = family_tokenizer(TRL[name])
    turns = [{"role": m.role, "content": m.content} | m.more for m in messages[1:]]
    for told in turns:
        for place, call in enumerate(told.get("tool_calls", ())):
            told["tool_calls"][place] = {"type": "function", "id": call["id"], "function": call}
    marked = tokenizer.apply_chat_template(
        turns, tools=[TOOL], return_dict=True, return_assistant_tokens_mask=True, return_offsets_mapping=True
    )
    wanted = tokenizer.decode(
        [i for i, seen in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if seen]
    )
    if (name, bool(turn.content)) in REFUSED:
        with pytest.raises(ModelError, match="leaves out an assistant turn, or writes it twice"):
            ChatRenderer(tokenizer, 4000).render(messages)
        return
    row = ChatRenderer(tokenizer, 4000).render(messages)
    ours = tokenizer.decode(row.input_ids[row.response])
    strip = functools.partial(re.sub, r"<[^<>]+>|\s", "")
    assert strip(ours) == strip(wanted).replace("assistant" if name in HEADED else "\0", "")
