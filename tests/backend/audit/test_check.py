"""`check` finds whatever is not as it was written, and `--repair` has it made again, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from concept_audit import Audit, BuildOptions, ModelOptions, StoreError, build
from concept_audit.audit.repair import RepairOptions, _build_options, check, repair
from concept_audit.cli import main
from concept_audit.store.health import damage
from concept_audit.store.index import index_files
from concept_audit.store.layout import Layout
from concept_audit.store.manifest import read_manifest
from concept_audit.store.partition import RowPartition
from concept_audit.store.shard_store import ShardStore, is_as_written, read_about
from tests.backend.pipeline.test_resume import tables
from tests.conftest import SMALL_SAE, shards


def states(root: Path) -> dict[str, str]:
    return {finding.part: finding.state for finding in check(root)}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.fixture
def store(tmp_path) -> ShardStore:
    return ShardStore(tmp_path / "audit" / "shards")


@pytest.fixture(params=["table", "tensors"])
def written(request, store) -> Path:
    """A file of each format, with a few hundred bytes of content."""
    if request.param == "table":
        schema = pa.schema([("value", pa.int64()), ("text", pa.string())])
        path = store.path("rows", "k", "000000.parquet")
        # Texts that look like what is searched for.
        table = pa.table({"value": list(range(40)), "text": [f'"blake2b": "{"0" * 32}"'] * 40}, schema)
        store.write_table(path, [table], schema, {"rows": 40})
    else:
        path = store.path("activations", "k", "000000.safetensors")
        store.write_tensors(path, {"value": torch.arange(40)}, {"rows": 40})
    return path


def test_any_byte_that_has_changed_is_noticed(written):
    assert is_as_written(written) and damage(written) is None and read_about(written) == {"rows": 40}
    size = written.stat().st_size
    for place in range(0, size, max(1, size // 60)):
        flip(written, place)
        assert damage(written), place
        flip(written, place)
    assert damage(written) is None


def test_what_is_cut_off_empty_or_gone_is_noticed_and_told_in_words(written):
    whole = written.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        written.write_bytes(whole[:size])
        assert damage(written)
        with pytest.raises(
            StoreError, match=f"{written.name}: absent or damaged.*concept-audit check .*audit --repair"
        ):
            read_about(written)
    written.unlink()
    assert damage(written) == "absent"


def test_a_whole_audit_is_right(audit_directory, capsys):
    Audit(audit_directory).flags.set([])
    assert main(["check", str(audit_directory)]) == 0
    told = capsys.readouterr().out
    for part in ("manifest", "rows", "tokens", "activations", "features", "SAE", "store", "workspace"):
        assert f"\n{part} " in f"\n{told}"
    assert "damaged" not in told and "2 of 2 shards, 300 rows" in told


def test_everything_that_is_damaged_is_made_again_and_nothing_else(built, audit_directory, capsys):
    audit = Audit(audit_directory)
    row = audit.rows.list(limit=1)["content_hash"][0]
    audit.flags.set([row], "review", "mine")
    layout = Layout(audit_directory)
    people = layout.workspace.read_bytes()
    kinds = [shards(audit_directory, kind) for kind in ("rows", "tokens", "activations", "features")]
    damaged, others = [kind.path(0) for kind in kinds], [kind.path(1) for kind in kinds]
    empty(damaged[0])
    cut(damaged[1])
    flip(damaged[2], -20)
    damaged[3].unlink()
    flip(layout.sae / "sae_weights.safetensors", -20)
    flip(layout.audit, layout.audit.stat().st_size // 2)
    empty(layout.manifest)
    # All but the last rows, which are read again wherever any are: how many there are is not known before.
    before = [path.stat().st_mtime_ns for path in others[1:]]
    assert main(["check", str(audit_directory)]) == 1
    captured = capsys.readouterr()
    assert "--repair" in captured.err
    for path in (*damaged, layout.sae / "sae_weights.safetensors", layout.audit, layout.manifest):
        assert str(path) in captured.out
    found = states(audit_directory)
    assert {part for part, state in found.items() if state != "right"} == {
        *("manifest", "rows", "tokens", "activations", "features", "SAE", "store")
    }
    assert main(["check", str(audit_directory), "--repair", "--device", "cpu"]) == 0
    assert set(states(audit_directory).values()) == {"right"}
    for path in (*damaged, *others):
        assert path.read_bytes() == (built / path.relative_to(audit_directory)).read_bytes()
    assert [path.stat().st_mtime_ns for path in others[1:]] == before
    assert tables(audit_directory) == tables(built)
    assert layout.workspace.read_bytes() == people
    assert Audit(audit_directory).rows.list(limit=1)["note"][0] == "mine"


def test_the_same_build_mends_what_a_power_cut_tears(built, audit_directory, data_file, model_directory):
    """Without a repair: what does not open is made again by the command that made it."""
    layout = Layout(audit_directory)
    empty(shards(audit_directory, "tokens").path(1))
    cut(layout.sae / "sae_weights.safetensors")
    cut(layout.audit)
    with pytest.raises(StoreError, match=r"audit.duckdb: damaged.*concept-audit check .* --repair"):
        Audit(audit_directory).overview()
    model = ModelOptions(str(model_directory), device="cpu")
    build(BuildOptions(str(data_file), audit_directory, model, layers=(1, 2, 3), sae_training=SMALL_SAE))
    assert tables(audit_directory) == tables(built)
    assert set(states(audit_directory).values()) == {"right"}


@pytest.mark.parametrize("harm", [empty, cut])
def test_a_manifest_that_is_torn_is_told_and_its_copy_takes_its_place(audit_directory, harm):
    layout = Layout(audit_directory)
    whole = layout.manifest.read_bytes()
    harm(layout.manifest)
    with pytest.raises(StoreError, match=r"manifest.json: damaged.*concept-audit check .* --repair"):
        Audit(audit_directory)
    assert states(audit_directory)["manifest"] == "damaged"
    repair(audit_directory)
    assert layout.manifest.read_bytes() == whole
    layout.manifest.unlink()
    layout.manifest_copy.unlink()
    with pytest.raises(StoreError, match="no audit there"):
        check(audit_directory)


def test_a_workspace_is_never_touched_however_damaged(audit_directory):
    workspace = Layout(audit_directory).workspace
    workspace.write_bytes(b"torn" * 5000)
    (finding,) = [finding for finding in repair(audit_directory) if finding.part == "workspace"]
    assert finding.wrong and "backup" in finding.remedy and str(workspace) in finding.detail
    assert workspace.read_bytes() == b"torn" * 5000


def test_rows_coded_with_a_projection_that_is_lost_are_not_kept(audit_directory):
    layout = Layout(audit_directory)
    files = index_files(layout, "k", RowPartition(300))
    write = files.rows.store.write_tensors
    for path in (files.sides, files.projection(1)):
        write(path, {"x": torch.ones(40)})
    for number in range(2):
        files.rows.write_tensors(number, {"codes": torch.ones(40)})
    files.write_description({"done": True, "blocks": [1, 1]})
    assert states(audit_directory)["gradient index"] == "right"
    flip(files.projection(1), -8)
    (finding,) = [finding for finding in check(audit_directory) if finding.part == "gradient index"]
    assert set(finding.files) == {files.projection(1), files.rows.path(0), files.rows.path(1)}
    shutil.rmtree(files.root)
    os.makedirs(files.root)
    files.description.write_text("{")
    assert states(audit_directory)["gradient index"] == "damaged"


def test_what_is_made_on_demand_is_checked_too(audit_directory):
    layout = Layout(audit_directory)
    query = layout.shards.path("influence", "k", "query.safetensors")
    layout.shards.write_tensors(query, {"dense.0": torch.ones(40)}, {"concept_id": "sae:1"})
    factors = layout.shards.path("curvature", "k", "curvature.json")
    layout.shards.write_json(factors, {"model": "one"})
    assert states(audit_directory)["influence"] == states(audit_directory)["curvature"] == "right"
    empty(factors)
    cut(query)
    found = states(audit_directory)
    assert found["influence"] == found["curvature"] == "damaged"
    after = {finding.part: finding.state for finding in repair(audit_directory)}
    assert "influence" not in after and not query.exists() and not factors.exists()


def test_an_audit_of_an_earlier_version_without_checksums_is_checked_as_far_as_can_be(audit_directory):
    layout = Layout(audit_directory)
    manifest = json.loads(layout.manifest.read_text())
    for entry in manifest["stages"].values():
        entry["report"].pop("files", None)
    layout.manifest.write_text(json.dumps(manifest))
    assert set(states(audit_directory).values()) == {"right"}
    cut(layout.sae / "sae_weights.safetensors")
    cut(layout.audit)
    assert states(audit_directory)["SAE"] == states(audit_directory)["store"] == "damaged"


def test_the_table_can_be_read_by_programs(audit_directory, capsys):
    assert main(["check", str(audit_directory), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"part", "state", "detail", "remedy", "maker", "files"} <= told[0].keys()


def test_a_repair_builds_with_the_consent_to_another_models_sae_that_the_build_had(audit_directory):
    layout = Layout(audit_directory)
    manifest = read_manifest(layout.manifest)
    assert not _build_options(layout, manifest, RepairOptions()).sae_from_other_model
    manifest.configuration["sae_from_other_model"] = True
    assert _build_options(layout, manifest, RepairOptions()).sae_from_other_model


def test_a_repair_builds_as_the_build_was_asked_to(audit_directory):
    layout = Layout(audit_directory)
    manifest = read_manifest(layout.manifest)
    usual = _build_options(layout, manifest, RepairOptions())
    assert (usual.turns, usual.on_bad_row, usual.beta, usual.rewards.asked) == ("mask", "stop", 0.1, False)
    rewards = {"rollouts": True, "advantage": None, "reward": "score", "group": "set"}
    manifest.configuration |= {"turns": "last", "on_bad_row": "skip", "beta": 0.3, "rewards": rewards}
    asked = _build_options(layout, manifest, RepairOptions())
    assert (asked.turns, asked.on_bad_row, asked.beta) == ("last", "skip", 0.3)
    assert dataclasses.asdict(asked.rewards) == rewards
