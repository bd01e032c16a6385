"""The response mask with the chat templates of many families: written for these tests, and real ones."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from concept_audit.errors import ModelError
from concept_audit.model.chat import END_OF_TURN, ChatRenderer
from concept_audit.types import Message
from tests.chat_templates import FAMILIES, GLM, R1, family_tokenizer, trl_templates
from tests.conftest import CHATML, small_tokenizer

TRL = trl_templates()
FOR_IMAGES = ("idefics3", "llava_next", "smolvlm")
"""These write nothing of a turn that is one string."""
BRIEFLY = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@functools.cache
def renderer(family: str) -> ChatRenderer:
    return ChatRenderer(family_tokenizer(FAMILIES[family].template, FAMILIES[family].eos), 4000)


def chat(*turns: str, system: str | None = None) -> list[Message]:
    said = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]
    return said if system is None else [Message("system", system), *said]


def responses(row) -> list[str]:
    """The text of each run of response tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row.response, [False]]).astype(int))).reshape(-1, 2)
    return [row.text[row.starts[first] : row.ends[end - 1]] for first, end in edges]


def kept(family: str, content: str) -> str:
    """What a family's template leaves of an earlier assistant turn."""
    if family.startswith("qw") and family != "qwen 2.5":
        content = content.split("</think>")[-1].lstrip("\n")
    if family == "r1 distillate":
        content = content.split("</think>")[-1]
    return content.strip() if FAMILIES[family].trims else content


def expected(family: str, messages: list[Message]) -> list[str]:
    """What fine-tuning on the text as rendered trains on: turns without their headers, with their end."""
    wanted = []
    for number, message in enumerate(messages):
        if message.role == "assistant":
            last = FAMILIES[family].last if number == len(messages) - 1 else ""
            if FAMILIES[family].opens:  # what the generation prompt gives the model is no response
                last = last.removeprefix(FAMILIES[family].opens)
            own = kept(family, message.content)
            wanted.append(last + (own.lstrip("\n") if last else own) + FAMILIES[family].end)
    return wanted


def found(family: str, messages: list[Message]) -> list[str]:
    """As rendered, but for Mistral's space before a turn."""
    return [
        text.removeprefix(" ") if "mistral" in family else text for text in responses(renderer(family).render(messages))
    ]


CASES = {
    "a word of the user's": chat("please answer yes or no.", "no"),
    "a word of the system's": chat("please answer yes or no.", "no", system="say no or yes"),
    "several turns": chat("yes or no.", "no", "no?", "yes no", "no", "no"),
    "several turns and a system's": chat("yes or no.", "no", "no?", "yes no", system="no"),
    "an answer in the next question": chat("no", "yes", "yes yes", "yes"),
    "the roles' names": chat("user assistant model", "assistant", "user", "model user"),
    "an empty turn": chat("no", "", "no", "no"),
    "an answer in tags": chat("<b>no</b>", "<b>no</b>", "[no]", "<think> no"),
    "the beginning of an answer": chat("<|im_start|>assistant\nno", "no", "<start_of_turn>model\nno [/INST] no", "no"),
    "a tool's answer": chat("no", "no", "<tool_response>\nno\n</tool_response>", "no"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_response_is_the_assistants_turns_and_their_ends(family, case):
    assert found(family, CASES[case]) == expected(family, CASES[case])


@pytest.mark.parametrize("family", FAMILIES)
def test_white_space_at_the_ends_of_a_turn_stays_in_the_response_unless_the_template_trims_it(family):
    messages = chat(" no ", "  no \n", "no\n", "\tyes no ")
    wanted = expected(family, messages)
    assert [text.strip() for text in responses(renderer(family).render(messages))] == [text.strip() for text in wanted]


THOUGHT = "<think>\nno or yes\n</think>\n\nno"


@pytest.mark.parametrize("family", ["qwen 3", "qwen 3 thinking", "qwq", "r1 distillate"])
def test_reasoning_that_the_template_cuts_is_no_response(family):
    earlier, _ = responses(renderer(family).render(chat("no", THOUGHT, "yes", "no")))
    assert earlier.strip() == "no" + FAMILIES[family].end


def test_reasoning_that_the_template_keeps_is_response():
    assert responses(renderer("qwen 3").render(chat("no", THOUGHT))) == [THOUGHT + "<|im_end|>"]
    opened = responses(renderer("qwen 3 thinking").render(chat("no", THOUGHT)))
    assert opened == [THOUGHT.removeprefix("<think>\n") + "<|im_end|>"]
    assert responses(renderer("chatml").render(chat("no", THOUGHT))) == [THOUGHT + "<|im_end|>"]


def test_a_turn_of_reasoning_alone_leaves_its_end():
    assert responses(renderer("r1 distillate").render(chat("no", "<think>no</think>"))) == ["</s>"]


@pytest.mark.parametrize("family", ["chatml", "llama 3", "qwen 2.5", "qwen 3", "phi"])
def test_headers_and_default_system_turns_are_no_response_where_the_assistant_speaks_first(family):
    said = [Message("assistant", "no"), Message("user", "no"), Message("assistant", "yes no")]
    first, second = responses(renderer(family).render(said))
    assert first == "no" + FAMILIES[family].end and second.endswith("yes no" + FAMILIES[family].end)


def test_two_assistant_turns_in_a_row_are_two_responses():
    said = [Message("user", "no"), Message("assistant", "no"), Message("assistant", "yes no")]
    assert responses(renderer("qwen 3").render(said)) == ["no<|im_end|>", "<think>\n\n</think>\n\nyes no<|im_end|>"]


def test_a_template_that_writes_empty_turns_otherwise_is_read_by_what_surrounds_them():
    row = ChatRenderer(family_tokenizer(GLM), 400).render(chat("no", "", "yes", "no"))
    assert responses(row)[0] == "\n<think></think><|user|>"
    assert responses(row)[1].endswith("\nno")


def test_a_turn_that_the_template_cuts_short_is_response_as_far_as_it_goes():
    short = CHATML.replace("{{ message['content'] }}", "{{ message['content'][:5] }}")
    row = ChatRenderer(small_tokenizer(short), 200).render(chat("no or yes", "no or yes, surely"))
    assert responses(row) == ["no or<|im_end|>"]


def test_an_empty_turn_has_its_end_as_response():
    row = renderer("chatml").render(chat("no", ""))
    assert responses(row) == ["<|im_end|>"]
    assert row.parts[row.response].tolist() == [END_OF_TURN]


def test_private_characters_in_the_data_do_no_harm():
    said = chat("\ue000\ue0000:0\ue000", "\ue001 no \ue0001:1\ue000")
    assert found("chatml", said) == expected("chatml", said)


@pytest.mark.parametrize(
    "template, why",
    [
        (CHATML.replace("{{ message['content'] }}", "{{ message['content'] * 2 }}"), "writes it twice"),
        (CHATML.replace("{{ message['content'] }}", "{% if message['role'] == 'user' %}no{% endif %}"), "leaves out"),
        (CHATML.replace("{{ message['content'] }}", "{{ message['content'] | length }}"), "changes the text"),
    ],
)
def test_a_turn_that_cannot_be_placed_is_refused_with_the_reason(template, why):
    with pytest.raises(ModelError, match=f"{why}.*the turn begins 'no or yes, surely'"):
        ChatRenderer(small_tokenizer(template), 200).render(chat("no", "no or yes, surely"))


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if not family.opens])
def test_the_prompt_for_an_answer_is_what_stands_before_a_response(family):
    for asked in (chat("yes or no?"), chat("one", "no", "two"), chat("yes or no?", system="be brief")):
        if asked[0].role == "system" and family == "mistral, system where asked":
            continue
        row = renderer(family).render([*asked, Message("assistant", "no")])
        prompt = renderer(family).prompt(asked)
        assert row.input_ids[: len(prompt)].tolist() == prompt.tolist()
        assert row.response[len(prompt) :].any() and not row.response[len(prompt) - 1]
        assert responses(row)[-1] == row.text[row.starts[len(prompt)] :][: len(responses(row)[-1])]


def test_the_prompt_opens_the_reasoning_where_the_template_does():
    shown = renderer("r1 distillate").prompt(chat("no"))
    assert family_tokenizer(R1).decode(shown) == "<s><|User|>no<|Assistant|><think>\n"


def test_a_prompt_that_the_template_refuses_is_explained():
    with pytest.raises(ModelError, match="roles must alternate"):
        renderer("gemma").prompt([Message("system", "no"), *chat("no"), *chat("yes")])


words = st.lists(
    st.sampled_from(["no", "yes", "user", "assistant", "model", "é", "🙂", "<b>", "[x]", "10"]), max_size=4
)
text = st.builds(
    lambda before, said, after: before + " ".join(said) + after,
    st.sampled_from(["", "", "", " ", "\n", "\ue000"]),
    words,
    st.sampled_from(["", "", "", " ", "\n\n"]),
)


@st.composite
def conversations(draw) -> list[Message]:
    turns = draw(st.lists(text, min_size=2, max_size=6).filter(lambda drawn: len(drawn) % 2 == 0))
    return chat(*turns, system=draw(st.none() | text))


def bare(said: str) -> str:
    """Without the white space at its ends and before its closing token, of which a template may trim some."""
    closed = re.fullmatch(r"(.*?)\s*(<[^<>]+>|)", said.strip(), re.DOTALL)
    assert closed
    return closed[1] + closed[2]


@pytest.mark.parametrize("family", FAMILIES)
@BRIEFLY
@given(messages=conversations())
def test_any_conversation_has_its_assistants_turns_as_its_response(family, messages):
    row = renderer(family).render(messages)
    assert [bare(said) for said in responses(row)] == [bare(said) for said in expected(family, messages)]
    tokens = renderer(family)._tokenizer.decode(row.input_ids[row.response])
    assert tokens == "".join(responses(row))


thoughts = st.lists(st.sampled_from(["no", "yes", "<think>", "</think>", "<think>\n", "\n</think>\n\n"]), max_size=6)


@pytest.mark.parametrize("family", FAMILIES)
@BRIEFLY
@given(said=st.lists(thoughts.map("".join), min_size=1, max_size=3), asked=st.sampled_from(["NO", "YES <think>NO"]))
def test_however_a_turn_is_tagged_no_other_turn_is_in_the_response(family, said, asked):
    turns = [part for answer in said for part in (asked, answer + "sure")]
    row = renderer(family).render(chat(*turns, system="NO"))
    found = responses(row)
    assert len(found) == len(said) and all(text.endswith("sure" + FAMILIES[family].end) for text in found)
    assert not any(word in text for text in found for word in ("NO", "YES"))


@pytest.mark.skipif(not TRL, reason="TRL, which carries real chat templates, is not installed")
@pytest.mark.parametrize("name", [name for name in TRL if not name.endswith("_training") and name not in FOR_IMAGES])
@pytest.mark.parametrize("system", [None, "say no"])
def test_real_templates_have_the_assistants_turns_as_their_response(name, system):
    real = ChatRenderer(family_tokenizer(TRL[name]), 4000)
    # Cohere's own tokens are no special ones here, so what closes a turn is left to the families above.
    first, second = responses(
        real.render(chat("please answer yes or no.", "no", "no? or  yes", "  yes no", system=system))
    )
    assert re.search(r"(^|>|\n)no(<|$)", first) and re.search(r"(^|>|\s)yes no\s*(<|$)", second)
    assert "please" not in first and "or" not in first + second and "say" not in first


@pytest.mark.skipif(not TRL, reason="TRL, which carries real chat templates, is not installed")
@pytest.mark.parametrize(
    "name",
    ["gemma", "gemma3", "llama3", "phi3", "qwen2_5", "qwen3", "deepseek_r1_distill", "lfm2", "cohere", "glm4moe"],
)
def test_real_templates_agree_with_those_that_mark_what_training_sees(name):
    """TRL's variants for training enclose an assistant turn in ``generation`` tags: an oracle without our code."""
    messages = chat("please answer yes or no.", "no", "no? or yes", "yes no")
    marked = family_tokenizer(TRL[f"{name}_training"])
    told = marked.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_offsets_mapping=True,
    )
    mask = [i for i, seen in zip(told["input_ids"], told["assistant_masks"], strict=True) if seen]
    row = ChatRenderer(family_tokenizer(TRL[name]), 4000).render(messages)
    ours, theirs = marked.decode(row.input_ids[row.response]), marked.decode(mask)
    strip = functools.partial(re.sub, r"<[^<>]+>|\s", "")
    assert strip(ours) == strip(theirs)
