"""Exports in the input's own columns go where they are meant to: `datasets` loads them, and TRL's trainers prepare them."""

from __future__ import annotations

import json

import pytest

from concept_audit import Audit, BuildOptions, ModelOptions, RowFilter, build
from concept_audit.model.chat import ChatRenderer, TokenizedRow
from concept_audit.store.examples import messages_from_json
from concept_audit.types import sides
from tests.backend.model.test_tool_turns import HERMES
from tests.backend.pipeline.test_kinds import ASKED, CALL, RESULT, TOOL
from tests.conftest import small_model, small_tokenizer, write_jsonl

CALLS = CALL | {"tool_calls": [{"type": "function", "function": {"name": "walk", "arguments": {"to": "river"}}}]}
"""With arguments as an object, since the trainer gives the template those that are JSON as they stand."""
YES, NO = ({"role": "assistant", "content": text} for text in ("yes, slowly", "no river"))
TRAINED = {
    "chat": {"messages": [ASKED, YES, ASKED, NO]},
    "tool calls": {"messages": [ASKED, CALLS, RESULT, YES], "tools": [TOOL]},
    "prompt and completion": {"prompt": [ASKED], "completion": [YES]},
    "prompt and completion with tools": {"prompt": [ASKED], "completion": [CALLS, RESULT, YES], "tools": [TOOL]},
    "sharegpt": {"conversations": [{"from": "human", "value": "walk the river"}, {"from": "gpt", "value": "yes"}]},
    "plain prompt and completion": {"prompt": "walks the river?", "completion": " yes, slowly"},
    "transcript": {"text": "\n\nHuman: walk?\n\nAssistant: yes, to the river"},
}
"""What `SFTTrainer` takes."""
PREFERRED = {
    "strings": {"prompt": "walks the river?", "chosen": " yes, slowly", "rejected": " no river"},
    "chats": {"prompt": [ASKED], "chosen": [YES], "rejected": [NO]},
    "chats with the prompt in them": {"chosen": [ASKED, YES], "rejected": [ASKED, NO]},
    "transcripts": {
        "chosen": "\n\nHuman: walks?\n\nAssistant: yes, slowly",
        "rejected": "\n\nHuman: walks?\n\nAssistant: no river",
    },
}
"""What `DPOTrainer` takes."""


@pytest.fixture(scope="module")
def tokenizer():
    """One whose template has tools, and whose padding is set."""
    made = small_tokenizer(HERMES)
    made.pad_token = made.eos_token
    return made


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory, tokenizer):
    """Kind → rows as `datasets` loads them from an export that a removed row is not in, and the audit."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    place = tmp_path_factory.mktemp("trainers")
    small_model("llama").save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    model = ModelOptions(str(place / "model"), device="cpu")

    def made(kind: str, row: dict, file: str = "jsonl"):
        name = kind.replace(" ", "-")
        changed = json.loads(json.dumps(row).replace("river", "garden"))
        data = write_jsonl(place / f"{name}.jsonl", [row | {"number": 0}, changed | {"number": 1}])
        audit = Audit(build(BuildOptions(str(data), place / name, model, layers=(1,), sae="none")))
        audit.flags.set(audit.rows.list()["content_hash"][:1].tolist(), "remove")
        audit.exports.write(place / f"{name}-clean.{file}", file, RowFilter(without_flags=("remove",)), schema="own")
        loaded = datasets.load_dataset(
            {"jsonl": "json"}.get(file, file),
            data_files=str(place / f"{name}-clean.{file}"),
            split="train",
            cache_dir=str(place / "datasets"),
        )
        return audit, loaded

    return made


def without_null(value):
    """What `datasets` adds to objects that others have more keys than."""
    if isinstance(value, dict):
        return {name: without_null(item) for name, item in value.items() if item is not None}
    return [without_null(item) for item in value] if isinstance(value, list) else value


def read_by_the_audit(audit: Audit, tokenizer) -> list[TokenizedRow]:
    """The row that was kept, as the model reads it; of a pair both sides."""
    renderer = ChatRenderer(tokenizer, 256)
    messages = messages_from_json(audit.rows.list()["messages"].iloc[-1])
    return [renderer.render(side) for side in sides(messages)]


@pytest.mark.parametrize("kind", TRAINED)
def test_cleaned_data_are_what_the_trainer_of_chats_takes(kind, cleaned, tokenizer, tmp_path):
    audit, loaded = cleaned(kind, TRAINED[kind])
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    assert without_null(loaded[0])["number"] == 1 and len(loaded) == 1
    settings = trl.SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    trainer = trl.SFTTrainer(small_model("llama"), settings, train_dataset=loaded, processing_class=tokenizer)
    (prepared,) = trainer.train_dataset
    (ours,) = read_by_the_audit(audit, tokenizer)
    learnt = tokenizer.decode([token for token in prepared["labels"] if token >= 0])
    if kind in ("plain prompt and completion", "transcript"):  # the trainer reads strings without a chat template
        assert learnt == loaded[0].get("completion", loaded[0].get("text")) + tokenizer.eos_token
        return
    if kind == "sharegpt":  # its roles the trainer gives to the template as they are, which writes them so
        assert tokenizer.decode(ours.input_ids[ours.response]) in learnt
        return
    assert prepared["input_ids"] == ours.input_ids.tolist()
    if kind == "prompt and completion":  # the line that the template writes after a turn, the trainer counts too
        assert learnt == tokenizer.decode(ours.input_ids[ours.response]) + "\n"


@pytest.mark.parametrize("kind", PREFERRED)
def test_cleaned_pairs_are_what_the_trainer_of_pairs_takes(kind, cleaned, tokenizer, tmp_path):
    audit, loaded = cleaned(kind, PREFERRED[kind])
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    assert loaded[0]["number"] == 1 and len(loaded) == 1
    settings = trl.DPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    trainer = trl.DPOTrainer(
        small_model("llama"), small_model("llama"), settings, train_dataset=loaded, processing_class=tokenizer
    )
    (prepared,) = trainer.train_dataset
    ours = read_by_the_audit(audit, tokenizer)
    for side, mine in zip(("chosen", "rejected"), ours, strict=True):
        said = prepared[f"{side}_ids"]
        if kind in ("strings", "transcripts"):  # the trainer reads strings without a chat template
            assert tokenizer.decode(said) in loaded[0][side] + tokenizer.eos_token
        else:
            assert prepared["prompt_ids"] + said == mine.input_ids.tolist()
            assert tokenizer.decode(said) == tokenizer.decode(mine.input_ids[mine.response]) + "\n"
