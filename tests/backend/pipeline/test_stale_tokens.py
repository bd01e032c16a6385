"""Tokens hang on the tokenizer and its chat template, and on no clock."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
from pathlib import Path

import pytest

from concept_audit import Audit, BuildOptions, DataError, LabelledExample, Message, ModelOptions, StoreError, build
from concept_audit.cli.main import main
from concept_audit.store.examples import read_texts
from tests.chat_templates import LLAMA3
from tests.conftest import CHATML, chat_rows, shards, small_tokenizer, write_jsonl

OTHER = CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n")


@pytest.fixture
def options(tmp_path, model_directory) -> BuildOptions:
    """A build of a few rows with a model whose files may be changed."""
    model = Path(shutil.copytree(model_directory, tmp_path / "model"))
    return BuildOptions(
        data=str(write_jsonl(tmp_path / "rows.jsonl", chat_rows(6))),
        out=tmp_path / "audit",
        model=ModelOptions(str(model), device="cpu"),
        layers=(1,),
        sae="none",
    )


def put_template(options: BuildOptions, template: str) -> None:
    small_tokenizer(template).save_pretrained(options.model.name)


def texts(root: Path) -> list[str]:
    return [row.text for row in read_texts(shards(root, "tokens"), range(6)).values()]


def keys(root: Path) -> dict[str, str]:
    return {stage: entry["key"] for stage, entry in json.loads((root / "manifest.json").read_text())["stages"].items()}


def test_another_template_of_the_same_model_is_refused_and_a_rebuild_makes_the_tokens_anew(options):
    build(options)
    before, said = keys(options.out), texts(options.out)
    put_template(options, OTHER)
    with pytest.raises(StoreError, match=r"tokenizer \(content\) was \w+, is now \w+"):
        build(options)
    with pytest.raises(StoreError, match="made with a tokenizer and chat template of fingerprint"):
        Audit(options.out).model()
    build(dataclasses.replace(options, rebuild=True))
    after = keys(options.out)
    assert texts(options.out) == [text.replace("<|im_end|>\n", "<|im_end|>\n\n") for text in said]
    assert after["rows"] == before["rows"]
    assert all(after[stage] != before[stage] for stage in ("tokens", "activations", "store"))


def test_what_is_kept_of_texts_outside_the_data_hangs_on_the_template_too(options):
    examples = [LabelledExample((Message("user", f"no {i}"), Message("assistant", "yes")), i % 2) for i in range(8)]
    build(options)
    first = Audit(options.out).probes.train("p", examples, layer=1)
    put_template(options, CHATML.replace("<|im_start|>{{", "river money <|im_start|>{{"))
    build(dataclasses.replace(options, rebuild=True))
    second = Audit(options.out).probes.train("q", examples, layer=1)
    assert (first.direction != second.direction).any()


def test_a_build_is_the_same_today_and_tomorrow(options, monkeypatch, capsys):
    put_template(options, LLAMA3)
    build(options)
    tomorrow = dataclasses.replace(options, out=options.out.with_name("tomorrow"))

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2031, 1, 2)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    build(tomorrow)
    assert keys(options.out) == keys(tomorrow.out)
    assert texts(options.out) == texts(tomorrow.out)
    assert Audit(options.out).manifest.configuration["template_date"] == "2024-07-26"
    assert main(["info", str(options.out)]) == 0
    assert "was told 2024-07-26" in capsys.readouterr().out


def test_a_template_without_a_day_leaves_none_in_the_manifest(options, capsys):
    build(options)
    assert "template_date" not in Audit(options.out).manifest.configuration
    main(["info", str(options.out)])
    assert "asks for the day" not in capsys.readouterr().out


def test_an_audit_that_did_not_record_its_tokenizer_opens_and_is_built_anew_when_told(options):
    build(options)
    manifest = json.loads((options.out / "manifest.json").read_text())
    del manifest["fingerprints"]["tokenizer"]
    (options.out / "manifest.json").write_text(json.dumps(manifest))
    assert Audit(options.out).model() is not None
    with pytest.raises(StoreError, match=r"tokenizer \(content\) was not recorded"):
        build(options)
    build(dataclasses.replace(options, rebuild=True))
    assert Audit(options.out).manifest.fingerprints["tokenizer"]


def test_a_row_whose_turns_cannot_be_told_apart_is_named(options):
    put_template(options, CHATML.replace("{{ message['content'] }}", "{{ message['content'] * 2 }}"))
    with pytest.raises(DataError, match=r"rows.jsonl row 1: .*writes it twice.*the turn begins"):
        build(options)
    assert not options.out.exists()
