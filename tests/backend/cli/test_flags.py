"""Flags come from the options' dataclasses: each is there once, and what is typed comes back as options."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import tyro

from concept_audit import (
    BuildOptions,
    IndexOptions,
    InfluenceOptions,
    ModelOptions,
    Recipe,
    SaeTraining,
    ValidateOptions,
)
from concept_audit.cli import main
from concept_audit.cli.building import BuildFlags, IndexFlags
from concept_audit.cli.flags import documented, made
from concept_audit.cli.main import COMMANDS, parsed
from concept_audit.cli.ranking import InfluenceFlags
from concept_audit.data.conversation import Columns
from concept_audit.influence.options import CurvatureOptions, QueryOptions, ScoringOptions
from concept_audit.pipeline.engines.options import EngineOptions

OPTIONS = [
    BuildOptions,
    ModelOptions,
    SaeTraining,
    Columns,
    QueryOptions,
    CurvatureOptions,
    ScoringOptions,
    IndexOptions,
    ValidateOptions,
    Recipe,
    EngineOptions,
]


def typed(group, *words: str):
    return tyro.cli(group, args=list(words), config=(tyro.conf.FlagCreatePairsOff,))


def command(*words: str):
    return parsed(words)


def help_of(name: str, capsys) -> str:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_is_explained_where_it_is_defined(options):
    nested = {"model", "columns", "sae_training", "query", "curvature", "scoring", "recipe"}
    for field in dataclasses.fields(options):
        if options is not CurvatureOptions and field.name in nested:
            continue
        assert len(documented(options)[field.name]) > 5, field.name


@pytest.mark.parametrize("name", COMMANDS)
def test_a_flag_is_offered_once(name, capsys):
    found = re.findall(r"^[│ ]+(?:-\w, )?(--[a-z][a-z-]*)", help_of(name, capsys), re.M)
    assert len(found) == len(set(found)) > 0


def test_what_is_not_typed_stays_as_the_library_has_it():
    assert made(InfluenceOptions, typed(InfluenceFlags), **{"scoring.engine": "auto"}) == InfluenceOptions()
    assert made(IndexOptions, typed(IndexFlags)) == IndexOptions()
    made_of = typed(BuildFlags, "--data", "rows.jsonl", "--model", "small")
    expected = BuildOptions("rows.jsonl", Path("x"), ModelOptions("small"))
    assert made(BuildOptions, made_of, out=Path("x")) == expected


def test_what_is_typed_reaches_its_part():
    words = "--contrast --layer 8 --curvature kfac --damping 0.5 --seed 3 --blocks 2-4 --rank 16 --precision float32"
    found = made(InfluenceOptions, typed(InfluenceFlags, *words.split()))
    assert found == InfluenceOptions.of(
        contrast=True, layer=8, curvature="kfac", damping=0.5, seed=3, blocks=(2, 4), rank=16, precision="float32"
    )
    words = "--bytes 2048 --samples 60 --curvature-tokens 3000 --layers 12,8 --weights lora"
    found = made(IndexOptions, typed(IndexFlags, *words.split()))
    assert found == IndexOptions(2048, 60, (8, 12), CurvatureOptions(curvature_tokens=3000), "lora")
    words = "--data d --model m --sae-features 2 --sae-k 4 --prompt-column q --max-tokens 9 --rebuild --device cpu"
    words += " --long-documents split"
    found = made(BuildOptions, typed(BuildFlags, *words.split()), out=Path("o"))
    assert found == BuildOptions(
        "d",
        Path("o"),
        ModelOptions("m", "cpu"),
        columns=Columns(prompt="q"),
        long_documents="split",
        sae_training=SaeTraining(expansion=2, k=4),
        max_tokens=9,
        rebuild=True,
    )


def test_a_validation_is_typed_as_its_options():
    words = "validate a --concept c --methods concept_influence:contrast:damping=1,bm25 --removed bm25 --share 0.05,0.1"
    words += " --origin kind=bad,worse --train all --lora-rank 4 --rows 50 --no-retention"
    found = command(*words.split()).validate_options()
    assert [candidate.name for candidate in found.methods] == ["concept_influence:contrast:damping=1", "bm25"]
    assert found.methods[0].options == InfluenceOptions.of(contrast=True, damping=1.0)
    assert (found.removed, found.shares, found.retention, found.pool_rows) == (("bm25",), (0.05, 0.1), False, 50)
    assert (found.origin, found.positive) == ("kind", ("bad", "worse"))
    assert found.recipe == dataclasses.replace(Recipe(), weights="all", rank=4)
    assert command("validate", "a", "--concept", "c", "--quick").validate_options().recipe.batch == 12


@pytest.mark.parametrize(
    "words",
    [
        "rank a --concept c --curvature fast",
        "rank a --concept c --blocks x",
        "rank a --concept c --damping much",
        "build --data d --model m --layers 8,x",
        "build --data d",
        "index a --colour red",
        "paint a",
    ],
)
def test_a_word_that_makes_no_sense_is_a_usage_error(words, capsys):
    with pytest.raises(SystemExit) as done:
        main(words.split())
    assert done.value.code == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("part", ["colour=1", "damping", "damping=much", "contrast=yes"])
def test_a_method_with_an_unknown_option_is_told(part, capsys):
    assert main(["validate", "a", "--concept", "c", "--methods", f"bm25:{part}"]) == 1
    assert "--methods bm25:" in capsys.readouterr().err
