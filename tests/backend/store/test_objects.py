"""Audits that are built in object storage: equal to those of a disk, whatever ends midway and whoever goes on."""

from __future__ import annotations

import dataclasses
import pickle
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from concept_audit import Audit, BuildOptions, CurvatureOptions, IndexOptions, ModelOptions, StoreError, build
from concept_audit.cli.main import main
from concept_audit.pipeline.engine import Engine, Work
from concept_audit.pipeline.engines.worker import Receipt, WorkerProcess
from concept_audit.progress import Progress, Stage
from concept_audit.store import objects
from concept_audit.store.layout import Layout
from concept_audit.store.published import directory_of
from concept_audit.store.remote import Remote
from tests.backend.influence.test_attribution import labelled
from tests.backend.pipeline.test_resume import tables
from tests.backend.store.objects import BUCKET
from tests.conftest import SMALL_SAE

pytest.importorskip("obstore", reason="object storage is an extra: pip install 'concept-audit[objects]'")
pytest.importorskip("moto", reason="the local S3 server is moto's")

URL = f"s3://{BUCKET}/some/where"


def options(data_file: Path, model_directory: Path, cache: Path, out: Path | str = URL) -> BuildOptions:
    model = ModelOptions(str(model_directory), device="cpu")
    return BuildOptions(str(data_file), out, model, cache, layers=(1, 2, 3), sae_training=SMALL_SAE)


@pytest.fixture
def asked(data_file, model_directory, tmp_path) -> BuildOptions:
    return options(data_file, model_directory, tmp_path / "cache")


@pytest.fixture
def plain(asked) -> BuildOptions:
    """Without an SAE, which takes longest."""
    return dataclasses.replace(asked, sae="none", layers=(1, 2))


@pytest.fixture(scope="module")
def on_disk(data_file, model_directory, tmp_path_factory) -> Path:
    """What `plain` asks for, on a disk."""
    made = options(data_file, model_directory, Path("cache"), tmp_path_factory.mktemp("disk") / "audit")
    return build(dataclasses.replace(made, sae="none", layers=(1, 2)))


def put(storage) -> Counter[str]:
    """How often each shard was asked to be put."""
    return Counter(path for method, path in storage.asked if method == "PUT" and "/shards/" in path)


def test_a_build_in_storage_equals_one_on_disk_and_every_shard_is_put_once(storage, remote, asked, built):
    root = build(asked)
    assert root == directory_of(URL, asked.cache) and tables(root) == tables(built)
    assert set(put(storage).values()) == {1}
    here = {path.relative_to(root).as_posix() for path in (root / "shards").rglob("*") if path.is_file()}
    there = set(remote.sizes())
    assert here == {name for name in there if name.startswith("shards/")} and len(here) > 8
    assert {"manifest.json", "audit.duckdb", "sae/cfg.json"} <= there and "workspace.duckdb" not in there
    storage.asked.clear()
    build(asked)
    assert not put(storage), "nothing was left to do"
    with pytest.raises(StoreError, match="made with other settings"):
        build(dataclasses.replace(asked, layers=(2,)))


def test_what_is_kept_here_has_a_limit_and_what_has_gone_is_fetched(
    storage, remote, asked, audit_directory, monkeypatch
):
    monkeypatch.setenv(objects.BYTES_VARIABLE, "1")
    root = build(asked)
    layout = Layout(root)
    assert tables(root) == tables(audit_directory)
    objects.Objects(root, URL).make_room()
    assert len(list(layout.shards.root.rglob("*.parquet"))) > 2, "what was used just now may be in use"
    monkeypatch.setattr(objects, "IN_USE_SECONDS", 0.0)
    objects.Objects(root, URL).make_room()
    kept = lambda: [path for path in layout.shards.root.rglob("*") if path.suffix in objects.KEPT]  # noqa: E731
    assert not kept() and len(remote.sizes("shards")) > 8
    wanted = Audit(audit_directory).rank("sae:3", "activation_similarity", top=9)["example_id"].tolist()
    assert Audit(root).rank("sae:3", "activation_similarity", top=9)["example_id"].tolist() == wanted
    assert len(kept()) == 1, "one shard is read after the other"
    monkeypatch.setenv(objects.BYTES_VARIABLE, str(1 << 30))
    assert Audit(root).rank("sae:3", "bm25", top=9)["example_id"].tolist()
    fetched = {path: path.stat().st_size for path in kept()}
    assert len(fetched) > 1
    # The one that was read last stays.
    last = max(fetched, key=lambda path: path.stat().st_atime)
    monkeypatch.setenv(objects.BYTES_VARIABLE, str(fetched[last]))
    objects.Objects(root, URL).make_room()
    assert kept() == [last]
    monkeypatch.setenv(objects.BYTES_VARIABLE, "a lot")
    with pytest.raises(StoreError, match="give a number of bytes"):
        objects.Objects(root, URL).make_room()


@pytest.mark.parametrize("wrong", ["busy", "cut"])
def test_a_build_goes_on_where_storage_fails_now_and_then(storage, plain, on_disk, wrong):
    chance = random.Random(wrong)
    storage.answer = lambda method, path, number: wrong if chance.random() < 0.2 else None
    assert tables(build(plain)) == tables(on_disk)


@pytest.mark.parametrize("seed", range(3))
def test_a_build_that_storage_ends_is_gone_on_with_by_another_machine(
    storage, remote, plain, on_disk, tmp_path, impatient, seed
):
    impatient()
    last, puts = random.Random(seed).randrange(3, 24), []

    def answer(method: str, path: str, number: int) -> str | None:
        puts.append(path) if method == "PUT" else None
        return "busy" if len(puts) >= last else None

    storage.answer = answer
    with pytest.raises(StoreError, match=r"cannot be reached .*run the same command again"):
        build(plain)
    storage.answer = lambda *asked: None
    impatient(False)
    before = {name for name in remote.sizes() if name.startswith("shards/") and not name.endswith(".json")}
    storage.asked.clear()
    root = build(dataclasses.replace(plain, cache=tmp_path / "other"))
    assert tables(root) == tables(on_disk)
    again = {path.split("/some/where/")[1] for path in put(storage)} & before
    # While rows are read nobody knows which shard is the last, and whether it is whole.
    assert all(name.startswith("shards/rows/") and name.endswith("/000001.parquet") for name in again)


def test_two_machines_cannot_build_one_audit_at_a_time(storage, remote, plain, tmp_path):
    other = dataclasses.replace(plain, cache=tmp_path / "other", layers=(2,), rebuild=True)

    class Meanwhile:
        """Another machine begins as soon as this one works."""

        def run(self, work: Work[Any], missing: Sequence[int], stage: Stage, progress: Progress) -> None:
            build(other)
            opened = WorkerProcess(None, 1)
            assert all(isinstance(opened.do(work, number), Receipt) for number in missing)

    with pytest.raises(StoreError, match="another machine works on this audit"):
        build(dataclasses.replace(plain, rebuild=True), engine=Meanwhile())
    assert Audit(directory_of(URL, other.cache)).layers == (2,)
    assert {"manifest.json", "audit.duckdb"} <= set(remote.sizes()), "what the other one has made stays"


@dataclasses.dataclass
class Elsewhere:
    """Works as on another machine: whatever path is relative leads to a directory of its own."""

    place: Path
    receipts: int = 0

    def run(self, work: Work[Any], missing: Sequence[int], stage: Stage, progress: Progress) -> None:
        sent = pickle.loads(pickle.dumps(work))
        with chdir(self.place):
            worker = WorkerProcess(None, 1)
            for number in missing:
                outcome = worker.do(sent, number)
                assert isinstance(outcome, Receipt), outcome
                self.receipts += 1
        for number in missing:
            for output in work.outputs:
                output.confirm(number)


def test_workers_need_no_disk_in_common(storage, asked, built, tmp_path, monkeypatch):
    (tmp_path / "driver").mkdir()
    (tmp_path / "worker").mkdir()
    monkeypatch.chdir(tmp_path / "driver")
    engine: Engine = Elsewhere(tmp_path / "worker")
    root = build(dataclasses.replace(asked, cache=Path("cache")), engine=engine)
    assert tables(root) == tables(built)
    here, there = (len(list((base / root / "shards").rglob("*.*"))) for base in (Path(), tmp_path / "worker"))
    assert there >= engine.receipts and here > 0
    assert not (tmp_path / "worker" / root / "manifest.json").exists()


def test_commands_take_an_address_and_another_machine_sees_what_is_there(
    storage, remote, asked, built, tmp_path, capsys
):
    build(asked)
    cache = ["--cache", str(tmp_path / "other")]
    assert main(["rank", URL, "--concept", "sae:3", "--method", "vector_filter", "--top", "3", *cache]) == 0
    there = directory_of(URL, tmp_path / "other")
    assert not list((there / "shards").rglob("*.parquet")), "what is not read is not fetched"
    audit = Audit(URL, cache=tmp_path / "other")
    assert audit.root == there
    audit.flags.set(audit.rows.list(limit=3)["content_hash"].tolist(), "remove", "why")
    assert main(["push", str(there), URL]) == 0
    assert main(["info", URL, *cache]) == 0
    assert main(["info", URL, "--cache", str(tmp_path / "third")]) == 0
    assert "flags    4 rows" in capsys.readouterr().out
    # A build afterwards takes no workspace away, neither here nor there.
    build(dataclasses.replace(asked, cache=tmp_path / "other"))
    assert Audit(there).overview().n_flagged == 4 and "workspace.duckdb" in remote.sizes()
    assert main(["push", str(there), f"s3://{BUCKET}/elsewhere"]) == 1
    assert "its shards lie in" in capsys.readouterr().err
    assert main(["info", f"s3://{BUCKET}/nothing", *cache]) == 1
    assert "no audit there; make one with" in capsys.readouterr().err
    with pytest.raises(StoreError, match="no audit there; make one with"):
        Audit(f"s3://{BUCKET}/nothing", cache=tmp_path / "other")
    assert main(["delete", str(there), "--yes"]) == 0
    assert f"{URL} stays" in capsys.readouterr().err and "manifest.json" in remote.sizes()


def test_an_index_in_storage_answers_on_another_machine(storage, plain, tmp_path):
    index = IndexOptions(row_bytes=1024, samples=60, curvature=CurvatureOptions(curvature_tokens=4_000))
    audit = Audit(build(plain), device="cpu")
    audit.build_index(index)
    audit.train_probe("tone", labelled(), layer=2)
    first = audit.rank("tone", "concept_influence", top=20)
    assert main(["push", str(audit.root), URL]) == 0
    cache = tmp_path / "other"
    assert main(["info", URL, "--cache", str(cache)]) == 0
    there = Audit(directory_of(URL, cache), device="cpu")
    again = there.rank("tone", "concept_influence", top=20)
    assert first["example_id"].tolist() == again["example_id"].tolist()
    assert first["score"].tolist() == again["score"].tolist()


def test_a_damaged_shard_in_storage_is_found_and_made_again(storage, remote, plain, on_disk, tmp_path):
    root = build(plain)
    name = next(name for name in remote.sizes() if name.startswith("shards/activations/"))
    spoiled = bytearray((root / name).read_bytes())
    spoiled[len(spoiled) // 2] ^= 1
    (tmp_path / "spoiled").write_bytes(spoiled)
    remote.put(name, tmp_path / "spoiled")
    (root / name).unlink()
    assert main(["check", str(root)]) == 1
    assert main(["check", str(root), "--repair"]) == 0
    assert tables(root) == tables(on_disk)
    assert remote.get(name, tmp_path / "back") and (tmp_path / "back").read_bytes() != bytes(spoiled)


def test_a_build_that_comes_to_nothing_leaves_nothing_in_storage(storage, remote, asked, tmp_path, write_rows):
    short = write_rows(tmp_path / "short.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(Exception, match="no assistant turn"):
        build(dataclasses.replace(asked, data=str(short)))
    tiny = write_rows(tmp_path / "tiny.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(Exception, match="add rows"):
        build(dataclasses.replace(asked, data=str(tiny)))
    assert remote.sizes() == {}
    (tmp_path / "thesis.tex").write_text("mine")
    Remote(URL).put("thesis.tex", tmp_path / "thesis.tex")
    with pytest.raises(StoreError, match=r"not empty and not an audit .*thesis\.tex"):
        build(asked)
    assert list(remote.sizes()) == ["thesis.tex"]


def test_storage_that_knows_no_conditions_takes_the_manifest_all_the_same(remote, tmp_path, monkeypatch):
    import obstore
    from obstore.exceptions import NotSupportedError

    plain = obstore.put

    def unconditional(store: Any, name: str, file: Any, **how: Any) -> Any:
        if "mode" in how:
            raise NotSupportedError("no conditions")
        return plain(store, name, file, **how)

    monkeypatch.setattr(obstore, "put", unconditional)
    (tmp_path / "one").write_text("1")
    assert remote.replace("manifest.json", tmp_path / "one", None)
    assert remote.sizes() == {"manifest.json": 1}
