"""Audits to object storage and back: equal, whatever storage does meanwhile, and nothing of anybody's lost."""

from __future__ import annotations

import random
import shutil

import duckdb
import pytest

from concept_audit import Audit, StoreError
from concept_audit.cli.main import main
from concept_audit.progress import Progress
from concept_audit.store import remote as remote_module
from concept_audit.store.layout import Layout
from concept_audit.store.remote import Remote, is_address
from concept_audit.store.transfer import _names, _wanted, pull, push
from tests.backend.store.objects import BUCKET

pytest.importorskip("obstore", reason="object storage is an extra: pip install 'concept-audit[objects]'")
pytest.importorskip("moto", reason="the local S3 server is moto's")


def labelled(root) -> Audit:
    audit = Audit(root)
    audit.flags.set(audit.rows.list(limit=3)["content_hash"].tolist(), "remove", "why")
    return audit


def same(one: Layout, other: Layout) -> None:
    """Every file that is moved is equal byte by byte, and what people did is equal row by row."""
    names = list(_names(one))
    assert names == list(_names(other)) and len(names) > 10
    for name in names:
        assert (one.root / name).read_bytes() == (other.root / name).read_bytes(), name
    flags = [Audit(layout.root).query("SELECT * FROM flags ORDER BY example_id") for layout in (one, other)]
    assert flags[0].equals(flags[1]) and len(flags[0])


def test_an_audit_comes_back_as_it_was_put(audit_directory, remote, tmp_path):
    here, back = Layout(audit_directory), Layout(tmp_path / "back")
    labelled(here.root)
    put = push(here, remote, Progress())
    fetched = pull(back, remote, Progress())
    same(here, back)
    assert (put.there, fetched.there, fetched.kept) == (0, 0, False) and put.files == fetched.files > 10
    mine, theirs = (Audit(layout.root).rank("sae:3", top=9)["example_id"].tolist() for layout in (here, back))
    assert mine == theirs


def test_what_is_there_is_not_moved_again(audit_directory, remote, storage, tmp_path):
    here, back = Layout(audit_directory), Layout(tmp_path / "back")
    labelled(here.root)
    push(here, remote, Progress())
    pull(back, remote, Progress())
    storage.asked.clear()
    again = push(here, remote, Progress())
    put = {path.rsplit("/", 1)[-1] for method, path in storage.asked if method == "PUT"}
    assert again.there > 10 and not any(
        name.endswith((".parquet", ".safetensors")) or name == "audit.duckdb" for name in put
    )
    storage.asked.clear()
    again = pull(back, remote, Progress())
    got = {path.rsplit("/", 1)[-1] for method, path in storage.asked if method == "GET"}
    assert again.there > 10 and again.kept
    large = {name for name in got if name.endswith((".parquet", ".safetensors", ".duckdb"))}
    assert [name.startswith("workspace-before-push-") for name in large] == [True], "the copy that the push has made"


@pytest.mark.parametrize("wrong", ["busy", "slow", "cut"])
def test_storage_that_fails_now_and_then_is_asked_again(audit_directory, remote, storage, tmp_path, wrong):
    here, back = Layout(audit_directory), Layout(tmp_path / "back")
    labelled(here.root)
    chance = random.Random(wrong)
    storage.answer = lambda method, path, number: (
        wrong if chance.random() < (0.05 if wrong == "slow" else 0.3) else None
    )
    push(here, remote, Progress())
    pull(back, remote, Progress())
    storage.answer = lambda *asked: None
    same(here, back)


@pytest.mark.parametrize("wrong", ["busy", "cut"])
@pytest.mark.parametrize("seed", range(2))
def test_a_push_that_storage_ends_is_no_audit_yet_and_goes_on(
    audit_directory, remote, storage, tmp_path, wrong, seed, impatient
):
    impatient()
    here, back = Layout(audit_directory), Layout(tmp_path / "back")
    labelled(here.root)
    last = random.Random(f"{wrong} {seed}").randrange(2, 14)
    puts = []

    def answer(method: str, path: str, number: int) -> str | None:
        puts.append(path) if method == "PUT" else None
        return wrong if method == "PUT" and len(puts) >= last else None

    storage.answer = answer
    with pytest.raises(StoreError, match="cannot be reached .*run the same command again"):
        push(here, remote, Progress())
    storage.answer = lambda *asked: None
    impatient(False)
    for name, size in remote.sizes().items():
        assert size == (here.root / name).stat().st_size, "no object is half of one"
    with pytest.raises(StoreError, match="no audit there"):
        pull(back, remote, Progress())
    assert not back.manifest.exists()
    push(here, remote, Progress())
    pull(back, remote, Progress())
    same(here, back)


def test_half_of_a_file_in_parts_is_never_seen(remote, storage, tmp_path, monkeypatch, impatient):
    impatient()
    monkeypatch.setattr(remote_module, "AT_ONCE", 1 << 20)
    large = tmp_path / "large"
    large.write_bytes(random.Random(0).randbytes(12 << 20))
    parts = []

    def answer(method: str, path: str, number: int) -> str | None:
        parts.append(path) if method == "PUT" else None
        return "cut" if method == "PUT" and len(parts) > 1 else None

    storage.answer = answer
    with pytest.raises(StoreError, match="cannot be reached"):
        remote.put("large", large, once=True)
    storage.answer = lambda *asked: None
    impatient(False)
    assert remote.sizes() == {}
    remote.put("large", large, once=True)
    assert remote.get("large", tmp_path / "back") and (tmp_path / "back").read_bytes() == large.read_bytes()


def test_a_pull_that_storage_ends_goes_on(audit_directory, remote, storage, tmp_path, impatient):
    here, back = Layout(audit_directory), Layout(tmp_path / "back")
    labelled(here.root)
    push(here, remote, Progress())
    impatient()
    storage.asked.clear()
    storage.answer = lambda method, path, number: "busy" if number > 8 else None
    with pytest.raises(StoreError, match="run the same command again"):
        pull(back, remote, Progress())
    assert not back.manifest.exists()
    storage.answer = lambda *asked: None
    impatient(False)
    assert pull(back, remote, Progress()).there > 0
    same(here, back)


def test_what_people_did_is_never_written_over(audit_directory, remote, tmp_path):
    here, other = Layout(audit_directory), Layout(tmp_path / "other")
    shutil.copytree(here.root, other.root)
    labelled(here.root)
    push(here, remote, Progress())
    audit = Audit(other.root)
    audit.flags.set(audit.rows.list(limit=50)["content_hash"].tolist()[40:], "review")
    assert pull(other, remote, Progress()).kept
    assert set(Audit(other.root).query("SELECT flag FROM flags")["flag"]) == {"review"}
    push(other, remote, Progress())
    kept = [name for name in remote.sizes() if name.startswith("backups/workspace-before-push-")]
    assert len(kept) == 1 and remote.get(kept[0], tmp_path / "kept.duckdb")
    with duckdb.connect(str(tmp_path / "kept.duckdb"), read_only=True) as con:
        assert con.execute("SELECT DISTINCT flag FROM base.flags").fetchall() == [("remove",)]


def test_an_object_that_is_not_what_was_put_is_told_and_not_kept(audit_directory, remote, tmp_path):
    here, back = Layout(audit_directory), Layout(tmp_path / "back")
    push(here, remote, Progress())
    name = next(name for name in _names(here) if name.endswith(".parquet"))
    spoiled = bytearray((here.root / name).read_bytes())
    spoiled[len(spoiled) // 2] ^= 1
    (tmp_path / "spoiled").write_bytes(spoiled)
    remote.put(name, tmp_path / "spoiled")
    with pytest.raises(StoreError, match="is not what was put there"):
        pull(back, remote, Progress())
    assert not (back.root / name).exists() and not back.manifest.exists()


def test_another_audit_is_not_written_over(audit_directory, remote, tmp_path):
    here, other = Layout(audit_directory), Layout(tmp_path / "other")
    shutil.copytree(here.root, other.root)
    push(here, remote, Progress())
    for path in (other.manifest, other.manifest_copy):
        path.write_text(path.read_text().replace(Audit(here.root).manifest.fingerprints["data"], "another"))
    for moving in (push, pull):
        with pytest.raises(StoreError, match="an audit of another data lies there"):
            moving(other, remote, Progress())


@pytest.mark.parametrize(
    "name", ["../x.parquet", "/etc/x.json", "shards/../../x.parquet", "shards//x.parquet", "other.txt", "turn.lock",
             "derived.duckdb", "locks/index.lock", "shards/rows/k/.000000.parquet.0123456789ab.partial", "shards/x.py"],
)  # fmt: skip
def test_names_in_storage_lead_nowhere_else(name, tmp_path):
    assert not _wanted(Layout(tmp_path), name)
    assert _wanted(Layout(tmp_path), "shards/rows/key/000000.parquet") and _wanted(Layout(tmp_path), "sae/cfg.json")


def test_the_commands_say_what_they_did(audit_directory, remote, tmp_path, capsys):
    assert main(["push", str(audit_directory), remote.url]) == 0
    assert "files moved" in capsys.readouterr().err
    assert main(["pull", remote.url, "--cache", str(tmp_path)]) == 0
    assert Audit(tmp_path / "where").overview().n_rows == 300
    assert main(["pull", f"s3://{BUCKET}/nothing", str(tmp_path / "n")]) == 1
    assert "no audit there" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    assert main(["pull", remote.url, str(tmp_path / "mine")]) == 1
    assert "not empty and not an audit (thesis.tex)" in capsys.readouterr().err
    assert main(["pull", "bucket/audit"]) == 1
    assert "no address of object storage" in capsys.readouterr().err


def test_without_the_library_it_says_what_to_install(monkeypatch, tmp_path):
    remote_module._opened.cache_clear()
    monkeypatch.setattr(remote_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match=r"pip install 'concept-audit\[objects\]'"):
        Remote("s3://bucket/audit").sizes()


def test_addresses_are_told_from_paths():
    assert all(map(is_address, ["s3://bucket", "s3://bucket/a/b", "gs://b/x", "az://c/x"]))
    assert not any(map(is_address, ["cache/mine", "s3:/bucket", "http://host/x", "file:///x", "s3://"]))
