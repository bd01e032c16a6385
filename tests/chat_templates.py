"""Chat templates in the shapes of the families in use, written for these tests; and real ones, where a package has some."""

from __future__ import annotations

import copy
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import CHATML, small_tokenizer

SPECIAL = (
    "<s>", "</s>", "<|begin|>", "<|header|>", "<|/header|>", "<|eot|>", "<start_of_turn>", "<end_of_turn>", "<bos>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>", "<|User|>", "<|Assistant|>", "[INST]",
    "[/INST]", "<|observation|>", "[gMASK]", "<sop>",
)  # fmt: skip
"""What the families' templates write around turns; each is one token."""


@dataclass(frozen=True)
class Family:
    """One family of chat models.

    Attributes:
        template: its chat template.
        end: what closes an assistant turn.
        header: what opens an assistant turn.
        eos: the end-of-text token.
        system: whether it has a system role of its own.
        trims: whether white space at the ends of an assistant turn is dropped.
        last: what the template itself writes at the beginning of the last assistant turn.
        opens: what the generation prompt writes after the header.
    """

    template: str
    end: str
    header: str
    eos: str
    system: bool = True
    trims: bool = False
    last: str = ""
    opens: str = ""


LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
  {%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}
  {%- else %}{% set date_string = "01 Jan 2024" %}{% endif %}
{%- endif %}
{%- set first = messages[0] %}
{%- set said = first.content | trim if first.role == "system" else "" %}
{{- "<|header|>system<|/header|>\n\nKnowledge until: December 2023\nToday: " + date_string + "\n\n" + said + "<|eot|>" }}
{%- for message in (messages[1:] if first.role == "system" else messages) %}
  {{- "<|header|>" + message.role + "<|/header|>\n\n" + message.content | trim + "<|eot|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|header|>assistant<|/header|>\n\n" }}{% endif %}"""

QWEN25 = """{%- if messages[0].role == "system" %}
  {{- "<|im_start|>system\n" + messages[0].content + "<|im_end|>\n" }}
{%- else %}
  {{- "<|im_start|>system\nBe a helpful assistant.<|im_end|>\n" }}
{%- endif %}
{%- for message in messages %}
  {%- if message.role == "user" or message.role == "assistant" or not loop.first %}
    {{- "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n" }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n" }}{% endif %}"""

QWEN3 = """{%- set last = namespace(user=-1) %}
{%- for message in messages %}
  {%- if message.role == "user" and not (message.content.startswith("<tool_response>") and message.content.endswith("</tool_response>")) %}{% set last.user = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
  {%- set content = message.content %}
  {%- if message.role == "assistant" %}
    {%- set thought = "" %}
    {%- if "</think>" in content %}
      {%- set thought = content.split("</think>")[0].split("<think>")[-1].strip("\n") %}
      {%- set content = content.split("</think>")[-1].lstrip("\n") %}
    {%- endif %}
    {%- if loop.index0 > last.user and (loop.last or thought) %}
      {%- set content = "<think>\n" + thought + "\n</think>\n\n" + content.lstrip("\n") %}
    {%- endif %}
  {%- endif %}
  {{- "<|im_start|>" + message.role + "\n" + content + "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n" }}{% endif %}"""

QWEN3_THINKING = QWEN3.replace('"<|im_start|>assistant\n"', '"<|im_start|>assistant\n<think>\n"')

QWQ = """{%- for message in messages %}
  {%- set content = message.content %}
  {%- if message.role == "assistant" %}{% set content = content.split("</think>")[-1].lstrip("\n") %}{% endif %}
  {{- "<|im_start|>" + message.role + "\n" + content + "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n<think>\n" }}{% endif %}"""

R1 = """{{- bos_token }}
{%- for message in messages %}
  {%- if message.role == "system" %}{{- message.content }}
  {%- elif message.role == "user" %}{{- "<|User|>" + message.content }}
  {%- else %}
    {%- set content = message.content.split("</think>")[-1] if "</think>" in message.content else message.content %}
    {{- "<|Assistant|>" + content + eos_token }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|Assistant|><think>\n" }}{% endif %}"""

GEMMA = """{{- bos_token }}
{%- if messages[0].role == "system" %}{{- raise_exception("System role not supported") }}{% endif %}
{%- for message in messages %}
  {%- if (message.role == "user") != (loop.index0 % 2 == 0) %}{{- raise_exception("roles must alternate") }}{% endif %}
  {{- "<start_of_turn>" + ("model" if message.role == "assistant" else message.role) + "\n" }}
  {{- message.content | trim + "<end_of_turn>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<start_of_turn>model\n" }}{% endif %}"""

MISTRAL = """{%- set system = messages[0].content if messages[0].role == "system" else none %}
{%- set turns = messages[1:] if system is not none else messages %}
{%- set last = namespace(user=-1) %}
{%- for message in turns %}{% if message.role == "user" %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{{- bos_token }}
{%- for message in turns %}
  {%- if (message.role == "user") != (loop.index0 % 2 == 0) %}{{- raise_exception("roles must alternate") }}{% endif %}
  {%- if message.role == "user" %}
    {{- "[INST] " + (system + "\n\n" if system is not none and loop.index0 == last.user else "") }}
    {{- message.content + "[/INST]" }}
  {%- else %}
    {{- " " + message.content + eos_token }}
  {%- endif %}
{%- endfor %}"""

# Takes the system turn into the user turn only where that is the last turn of all: an answered row has none.
MISTRAL_ASKED = MISTRAL.replace("loop.index0 == last.user", "loop.last")

PHI = """{%- for message in messages %}
  {{- "<|" + message.role + "|>\n" + message.content + "<|end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>\n" }}{% else %}{{- eos_token }}{% endif %}"""

GLM = """[gMASK]<sop>
{%- for message in messages %}
  {%- if message.role == "assistant" %}
    {{- "<|assistant|>\n<think></think>" }}
    {%- set content = message.content.split("</think>")[-1].strip() %}
    {%- if content %}{{- "\n" + content }}{% endif %}
  {%- else %}
    {{- "<|" + message.role + "|>\n" + message.content }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>" }}{% endif %}"""

EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
TRL_DATED = ("llama3_2", "gptoss")
"""Those of the real templates that ask for the day."""
FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>"),
    "llama 3": Family(LLAMA3, "<|eot|>", "<|header|>assistant<|/header|>\n\n", "<|eot|>", trims=True),
    "qwen 2.5": Family(QWEN25, "<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>"),
    "qwen 3": Family(QWEN3, "<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>", last=EMPTY_THOUGHT),
    "qwen 3 thinking": Family(
        QWEN3_THINKING, "<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>", last=EMPTY_THOUGHT, opens="<think>\n"
    ),
    "qwq": Family(QWQ, "<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>", opens="<think>\n"),
    "r1 distillate": Family(R1, "</s>", "<|Assistant|>", "</s>", opens="<think>\n"),
    "gemma": Family(GEMMA, "<end_of_turn>", "<start_of_turn>model\n", "<end_of_turn>", system=False, trims=True),
    "mistral": Family(MISTRAL, "</s>", "[/INST]", "</s>"),
    "mistral, system where asked": Family(MISTRAL_ASKED, "</s>", "[/INST]", "</s>"),
    "phi": Family(PHI, "<|end|>", "<|assistant|>\n", "<|endoftext|>"),
}


@functools.cache
def _untemplated() -> Any:
    tokenizer = small_tokenizer(None)
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    return tokenizer


def family_tokenizer(template: str | None, eos: str = "</s>") -> Any:
    """The small tokenizer with the special tokens of every family."""
    tokenizer = copy.deepcopy(_untemplated())
    tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token = template, "<s>", eos
    return tokenizer


def trl_templates() -> dict[str, str]:
    """The chat templates of real models that TRL carries, by name; empty where it is not installed."""
    found = importlib.util.find_spec("trl")  # not imported: its dependencies are not needed to read files
    places = list(found.submodule_search_locations or ()) if found else []
    files = sorted(path for place in places for path in (Path(place) / "chat_templates").glob("*.jinja"))
    return {path.stem: path.read_text("utf-8") for path in files}
