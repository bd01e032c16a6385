"""Where an audit's model runs: where it was built, where one says, or where there is a device at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from concept_audit import Audit, InfluenceOptions, ModelError
from concept_audit.cli.main import main
from concept_audit.model import load, precision
from concept_audit.model.load import find_device
from concept_audit.model.options import ModelOptions
from concept_audit.pipeline import rank
from concept_audit.pipeline.build import build
from concept_audit.pipeline.options import BuildOptions
from concept_audit.progress import Progress


class Said(Progress):
    def __init__(self):
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine on which tensors may be put on cuda:0 and cuda:1."""
    monkeypatch.setattr(load, "_put_something", lambda device: _allowed(device, {"cuda:0", "cuda:1", "cpu"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def _allowed(device: torch.device, there: set[str]) -> None:
    if str(device) not in there:
        raise RuntimeError(f"invalid device ordinal of {device}")


def stored(root: Path, device: str | None) -> Path:
    """The audit, as if it had been built on a device; None for one of an earlier version."""
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["configuration"].pop("device", None)
    if device is not None:
        manifest["configuration"]["device"] = device
    path.write_text(json.dumps(manifest))
    return root


def test_a_device_is_found_by_its_name(two_gpus, monkeypatch):
    assert find_device("auto") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda:1") and find_device("cpu").type == "cpu"
    for absent in ("cuda:2", "mps", "warp", "meta"):
        with pytest.raises(ModelError, match=f"--device {absent}: "):
            find_device(absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert find_device("auto") == torch.device("mps")


def test_an_audit_keeps_the_device_that_it_was_built_on(built):
    assert Audit(built).manifest.configuration["device"] == "cpu"


def test_an_audit_is_opened_where_it_was_built_or_where_one_says(audit_directory, two_gpus, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "concept_audit.audit.opened.load_model", lambda options, *_: seen.append(options.device) or 1 / 0
    )
    stored(audit_directory, "cuda:1")
    for asked, expected in ((None, "cuda:1"), ("cpu", "cpu"), ("cuda:0", "cuda:0"), ("auto", "auto")):
        audit = Audit(audit_directory, device=asked)
        assert audit.opened.sources().device == expected
        assert audit.opened.sources().model_source.options.device == expected
        assert audit.device_note == ""
        with pytest.raises(ZeroDivisionError):
            audit.opened.model()
    assert seen == ["cuda:1", "cpu", "cuda:0", "auto"]
    assert Audit(stored(audit_directory, None)).opened.sources().device == "auto"


def test_an_audit_opens_on_a_machine_without_the_device_that_it_was_built_on(audit_directory):
    progress = Said()
    audit = Audit(stored(audit_directory, "cuda:7"), progress)
    usual = find_device("auto")
    assert audit.opened.model().device.type == usual.type
    assert [line for line in progress.lines if "cuda:7" in line] == [audit.device_note]
    assert audit.device_note == f"Built on cuda:7, which is not here: the model runs on {usual} (--device chooses)"
    with pytest.raises(ModelError, match="--device cuda:7: PyTorch cannot use it here"):
        Audit(audit_directory, device="cuda:7").opened.model()


def test_precision_follows_the_device_that_the_model_runs_on(audit_directory, two_gpus, monkeypatch):
    """bfloat16 is asked of the very device, not of the first there is."""
    asked = []

    def native(device):
        asked.append(device)
        return device.index == 1

    monkeypatch.setattr(precision, "native_bfloat16", native)
    options = InfluenceOptions.of(engine="exact")
    feature = f"sae:{Audit(audit_directory).concepts.features().iloc[0]['feature_id']}"
    found = {}
    for device in ("cuda:0", "cuda:1"):
        opened = Audit(stored(audit_directory, device))
        wanted = rank.request(opened.opened.sources(), opened.concept(feature), "influence_function", options)
        found[device] = wanted.parameters["precision"]
    assert found == {"cuda:0": "float32", "cuda:1": "bfloat16"}
    assert asked == [torch.device("cuda:0"), torch.device("cuda:1")]


def test_whether_cuda_computes_in_bfloat16_is_asked_of_the_device_itself(monkeypatch):
    inside = []

    class Chosen:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            inside.append(self.device)

        def __exit__(self, *_):
            inside.append(None)

    monkeypatch.setattr(torch.cuda, "device", Chosen)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: inside[-1].index == 1)
    assert precision.native_bfloat16(torch.device("cuda:1")) and not precision.native_bfloat16(torch.device("cuda:0"))
    assert not precision.native_bfloat16(torch.device("mps"))


def test_going_on_with_a_build_on_another_device_is_no_other_build(audit_directory, data_file, model_directory):
    made = Audit(stored(audit_directory, "cuda:7")).manifest.configuration
    options = BuildOptions(
        data=str(data_file),
        out=audit_directory,
        model=ModelOptions(str(model_directory), device="auto", dtype="float32"),
        layers=(1, 2, 3),
        sae="none",
    )
    with pytest.raises(Exception, match="sae was train, is now none") as refused:
        build(options)
    assert "device" not in str(refused.value) and made["device"] == "cuda:7"


@pytest.mark.parametrize(
    "command",
    [
        "probe {} --examples x --name y",
        "rank {} --concept sae:0",
        "flag {} --undo 1",
        "index {}",
        "validate {} --concept sae:0",
        "export {} --concept sae:0",
    ],
)
def test_every_command_that_may_need_the_model_takes_a_device(built, command, monkeypatch):
    seen = []

    def opened(self, root, progress=None, device="none", **_how):
        seen.append(device)
        raise ModelError("far enough")

    monkeypatch.setattr(Audit, "__init__", opened)
    assert main([*command.format(built).split(), "--device", "cuda:1"]) == 1
    assert main(command.format(built).split()) == 1
    assert seen == ["cuda:1", None]


def test_the_dashboard_is_told_the_device(built, tmp_path, two_gpus, monkeypatch):
    given, made = [], []
    monkeypatch.setattr("concept_audit.serve.subprocess.run", lambda command, env: given.append(env) or _Done())
    assert main(["serve", str(built), "--device", "cuda:1", "--no-browser"]) == 0
    assert main(["serve", str(built), "--no-browser"]) == 0
    assert [env["CONCEPT_AUDIT_DEVICE"] for env in given] == ["cuda:1", ""]

    def built_demo(cache, progress, rebuild, device, kind):
        made.append(device)
        raise ModelError("far enough")

    monkeypatch.setattr("concept_audit.audit.demo.build_demo", built_demo)
    for arguments in ([], ["--device", "cuda:1"]):
        assert main(["demo", "--cache", str(tmp_path), "--no-serve", *arguments]) == 1
    assert made == [None, "cuda:1"]


class _Done:
    returncode = 0
