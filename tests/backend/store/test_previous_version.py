"""Audits of the previous version are told from today's, and made anew without losing what people did."""

from __future__ import annotations

import json
import shlex
import tarfile
from pathlib import Path

import duckdb
import pytest
import torch
from scipy.stats import spearmanr

from concept_audit import (
    Audit,
    BuildOptions,
    ConceptError,
    InfluenceOptions,
    ModelOptions,
    RowFilter,
    SaeTraining,
    StoreError,
    build,
)
from concept_audit.cli.building import Demo
from concept_audit.cli.main import main, parsed
from concept_audit.data.conversation import Columns
from concept_audit.data.demo import DATA
from concept_audit.data.rollouts import RewardColumns
from concept_audit.store.manifest import read_manifest, rebuild_command
from tests.conftest import small_model, small_tokenizer

ARCHIVE = Path(__file__).parents[2] / "data" / "previous_version" / "audit.tar.xz"


@pytest.fixture
def previous(tmp_path, monkeypatch) -> Path:
    """An audit of the previous version, with its data, model and SAE beside it, in the working directory."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return Path("audit")


def command_of(sentence: str) -> list[str]:
    """The words between backquotes."""
    _, command, _ = sentence.split("`")
    return shlex.split(command)


def told(root: Path) -> str:
    with pytest.raises(StoreError) as refused:
        Audit(root)
    return str(refused.value)


def change_configuration(root: Path, **values) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["configuration"] |= values
    (root / "manifest.json").write_text(json.dumps(manifest))


def kept(root: Path) -> dict[str, list]:
    """What people did, as it stands in the tables of the workspace."""
    with duckdb.connect(str(root / "workspace.duckdb"), read_only=True) as con:
        return {
            table: con.execute(f"SELECT * FROM base.{table} ORDER BY ALL").fetchall()
            for table in (
                "probes",
                "probe_versions",
                "probe_examples",
                "probe_skips",
                "flags",
                "flag_log",
                "flag_changes",
                "saved_views",
                "feature_labels",
                "evidence",
                "evidence_runs",
                "evidence_results",
                "evidence_scores",
            )
        }


def test_an_audit_of_the_previous_version_names_the_command_that_makes_it_anew(previous):
    assert told(previous) == (
        "audit: made by an earlier version; make it anew with `concept-audit build --data rows.jsonl --model model "
        "--out audit --cache /home/ada/cache --layers 1,2 --dtype float32 --max-tokens 200 --sae sae --sae-layer 2 "
        "--rebuild`, which keeps labels, probes and flags"
    )


def test_the_command_line_says_the_same_and_ends_with_status_1(previous, capsys):
    sentence = told(previous)
    for arguments in (["info", "audit"], ["rank", "audit", "--concept", "first"], ["export", "audit"]):
        assert main(arguments) == 1
        assert capsys.readouterr().err == f"concept-audit: error: {sentence}\n"


def test_a_listing_names_the_command_too(previous, capsys):
    assert main(["info", "--cache", "."]) == 0
    assert told(previous) in capsys.readouterr().out


def test_the_same_build_without_rebuild_changes_nothing(previous):
    before = kept(previous), (previous / "manifest.json").read_text(), (previous / "audit.duckdb").read_bytes()
    program, *arguments = command_of(told(previous))
    arguments.remove("--rebuild")
    assert main(arguments) == 1
    assert (
        kept(previous),
        (previous / "manifest.json").read_text(),
        (previous / "audit.duckdb").read_bytes(),
    ) == before


def test_every_setting_is_in_the_command(previous):
    change_configuration(
        previous,
        data="two words.csv",
        model="org/model",
        dtype="bfloat16",
        device="cuda:1",
        columns={"messages": None, "prompt": "ask", "response": "say so", "text": None},
        rewards={"rollouts": True, "advantage": None, "reward": "score it", "group": "set"},
        split="validation",
        sae="train",
        sae_training={"expansion": 3, "k": 5, "epochs": 2, "batch": 64},
        trust_remote_code=True,
    )
    program, *arguments = command_of(told(previous))
    assert program == "concept-audit"
    assert parsed(arguments).build_options() == BuildOptions(
        data="two words.csv",
        out=Path("audit"),
        model=ModelOptions("org/model", "cuda:1", dtype="bfloat16", trust_remote_code=True),
        cache=Path("/home/ada/cache"),
        columns=Columns(prompt="ask", response="say so"),
        rewards=RewardColumns(True, None, "score it", "set"),
        split="validation",
        layers=(1, 2),
        sae="train",
        sae_layer=2,
        sae_training=SaeTraining(expansion=3, k=5, epochs=2),
        max_tokens=200,
        rebuild=True,
    )


def test_a_demo_of_the_previous_version_names_the_demo_command(previous):
    change_configuration(previous, data="/usr/lib/python3/site-packages/backend/data/demo/rows.jsonl")
    demo = previous
    for cache, words in (("cache", []), ("elsewhere", ["--cache", "elsewhere"])):
        Path(cache).mkdir()
        demo = demo.rename(Path(cache) / "demo")
        command = command_of(told(demo))
        assert command == ["concept-audit", "demo", "--rebuild", *words]
        assert parsed(command[1:]).rebuild


@pytest.mark.parametrize("kind", DATA)
def test_each_demo_names_the_command_that_makes_it_anew(kind):
    data = DATA[kind]
    command = rebuild_command(Path("cache") / data.audit, {"configuration": {"data": str(data.rows)}})
    typed = parsed(shlex.split(command)[1:])
    assert isinstance(typed, Demo) and typed.rebuild and typed.kind == kind


def test_the_command_makes_an_audit_in_which_all_that_people_did_is_there(previous):
    before = kept(previous)
    old_shard = previous / "shards" / "examples" / "000000.parquet"
    old_shard.parent.mkdir(parents=True)
    old_shard.write_bytes(b"rows")
    program, *arguments = command_of(told(previous))
    assert main(arguments) == 0
    assert not old_shard.parent.exists()
    assert read_manifest(previous / "manifest.json").format == 2
    audit = Audit(previous, device="cpu")
    assert audit.overview().n_rows == 24
    assert kept(previous) == before
    labels = audit.labels.counts().set_index("probe")
    assert labels.loc["first", ["positives", "negatives", "skipped", "trained"]].tolist() == [10, 9, 2, True]
    assert labels.loc["untrained", ["positives", "negatives", "skipped", "trained"]].tolist() == [1, 1, 0, False]
    assert [example.label for example in audit.labels.list("first")].count(1) == 10
    flagged = audit.rows.list(RowFilter(flag="any"))
    assert flagged["example_id"].tolist() == [3, 4]
    assert flagged["flag"].tolist() == ["remove", "remove"]
    assert flagged["note"].tolist() == ["asks for it", "asks for it"]
    assert audit.rows.list(RowFilter(flag="keep"))["example_id"].tolist() == [22]
    log = audit.flags.log()
    assert log["action"].tolist() == ["keep", "undo", "review", "remove"]
    assert log["made_by"].tolist() == ["Ben", "Ben", "Ben", "Ada"]
    views = audit.views.list()
    assert views[["name", "page", "query", "saved_by"]].to_numpy().tolist() == [
        ["first rows", "audit", "concept=probe:first", "Ada"]
    ]
    assert "my own name" in audit.concepts.features()["label"].tolist()
    (probe,) = audit.probes.list()
    assert (probe.name, probe.version, probe.layer, probe.details["threshold"]) == ("first", 2, 2, 0.25)
    assert [(old.version, old.layer) for old in audit.probes.versions("first")] == [(1, 1)]


def test_what_was_logged_can_still_be_undone(previous):
    program, *arguments = command_of(told(previous))
    assert main(arguments) == 0
    audit = Audit(previous, device="cpu")
    audit.flags.undo(int(audit.flags.log()["event_id"].min()), by="Ada")
    assert audit.rows.list(RowFilter(flag="any")).empty
    assert audit.rows.list(RowFilter(flag="keep"))["example_id"].tolist() == [22]


def test_a_probe_of_the_previous_version_ranks_as_it_did(previous):
    build_of_then = "(SELECT value FROM a.base.meta WHERE key = 'build_id')"
    with duckdb.connect() as con:
        con.execute("ATTACH 'audit/workspace.duckdb' AS w (READ_ONLY); ATTACH 'audit/audit.duckdb' AS a (READ_ONLY)")
        then = con.execute(
            f"""SELECT method, example_id, score, rank FROM w.base.ranking_scores JOIN w.base.rankings USING (ranking_id)
                WHERE build_id = {build_of_then} ORDER BY method, example_id"""
        ).df()
        features = con.execute(
            """SELECT concept_id, example_id, score, rank FROM a.base.ranking_scores
               JOIN a.base.rankings USING (ranking_id) ORDER BY ALL"""
        ).df()
    program, *arguments = command_of(told(previous))
    assert main(arguments) == 0
    audit = Audit(previous, device="cpu")
    for method, ranked in then.groupby("method"):
        # Then, a row that is a query example was scored by itself as well.
        now = audit.rank("first", method, options=InfluenceOptions.of(leave_out_own=False)).sort_values("example_id")
        if method == "concept_influence":
            # Then it was computed in bfloat16, with labels of the Fisher matrix that other processors draw otherwise.
            assert spearmanr(now["score"], ranked["score"]).statistic > 0.99
            continue
        assert now["score"].to_numpy() == pytest.approx(ranked["score"].to_numpy(), rel=1e-4, abs=1e-7), method
    for concept, ranked in features.groupby("concept_id"):
        now = audit.rank(concept, "vector_filter").sort_values("example_id")
        assert now["score"].to_numpy() == pytest.approx(ranked["score"].to_numpy(), rel=1e-4, abs=1e-7), concept


def test_evidence_of_the_previous_version_is_reported_on_though_not_as_current(previous):
    program, *arguments = command_of(told(previous))
    assert main(arguments) == 0
    audit = Audit(previous, device="cpu")
    (found,) = audit.evidence.list().itertuples()
    assert not found.current
    evidence = audit.evidence.get(found.evidence_id)
    assert len(evidence.runs) == 15
    text, figures = audit.evidence_report(found.evidence_id)
    assert "vector_filter" in text and figures


def test_with_another_model_a_probe_asks_to_be_trained_again_and_keeps_its_labels(previous, tmp_path):
    other = small_model("llama")
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    small_tokenizer().save_pretrained(tmp_path / "other")
    root = build(
        BuildOptions(
            data="rows.jsonl",
            out=previous,
            model=ModelOptions("other", device="cpu"),
            layers=(1, 2),
            sae="none",
            rebuild=True,
        )
    )
    audit = Audit(root, device="cpu")
    with pytest.raises(ConceptError, match="train it again, its labels are kept"):
        audit.rank("first")
    assert len(audit.labels.list("first")) == 19
    audit.train_probe("first")
    assert len(audit.rank("first")) == 24


def test_a_rebuild_that_is_stopped_midway_is_gone_on_with(previous, monkeypatch):
    before = kept(previous)
    program, *arguments = command_of(told(previous))
    with monkeypatch.context() as patched:
        patched.setattr("concept_audit.pipeline.build.assemble", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(arguments) == 130
    with pytest.raises(StoreError, match="not finished"):
        Audit(previous)
    assert kept(previous) == before
    arguments.remove("--rebuild")
    assert main(arguments) == 0
    assert len(Audit(previous, device="cpu").rank("first")) == 24
